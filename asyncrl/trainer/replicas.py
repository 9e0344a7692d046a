"""Replicas of a model (hybrid sharding, HSDP): the mesh of the ranks that hold it, and whether equal slices are equal.

    six ranks, learner.replicas=2     slice   0  1  2
                          replica 0   rank    0  1  2    a layer is gathered within a row,
                          replica 1   rank    3  4  5    its gradient is summed within a row, then within a column

The ranks of a column are counterparts. Each of them updates its slices by itself, with the same gradient: they stay
equal to the bit, or train different policies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore  # torch.distributed's own, with its types
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from asyncrl.errors import ConfigError
from asyncrl.trainer.world import World
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.shards import local_of

REPLICA, SLICE = "replica", "slice"  # dimensions of the mesh where there are replicas


def mesh_of(world: World, device: torch.device) -> DeviceMesh:
    """The ranks as `fully_shard` takes them: [slices], or [replicas, slices]."""
    if not dist.is_initialized():  # one rank: it has formed no world
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
        )
    if world.num_replicas == 1:
        return init_device_mesh(device.type, (dist.get_world_size(),))
    return DeviceMesh.from_group(
        [world.counterpart_group, world.replica_group],
        device.type,
        mesh=torch.arange(world.size).reshape(world.num_replicas, -1),
        mesh_dim_names=(REPLICA, SLICE),
    )


def agreed_norm(norm: Tensor) -> Tensor:
    """A norm of all slices on every rank, the same bits.

    Each replica adds it up for itself, and a library may do so in another order on another host: the first's counts.
    """
    if not isinstance(norm, DTensor):
        return norm
    whole, mesh = norm.full_tensor(), norm.device_mesh
    if mesh.mesh_dim_names is not None and REPLICA in mesh.mesh_dim_names:
        dist.broadcast(whole, group=mesh.get_group(REPLICA), group_src=0)
    return whole


def differing_slice(world: World, tensors: Mapping[str, Tensor]) -> str | None:
    """The first of these tensors whose slice is not the same bits on counterparts, in words. All ranks call this."""
    if world.num_replicas == 1:
        return None
    digests = {
        f"their slice of {name}": digest(local_of(tensor).detach().contiguous()) for name, tensor in tensors.items()
    }
    return world.first_difference(digests, world.first_counterpart)


def check_loaded(world: World, model: nn.Module, of: str) -> None:
    """Raises ConfigError unless replicas have loaded the same: what is not trained is never compared again."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if problem := differing_slice(world, {f"{name} of {of}": tensor.data for name, tensor in tensors.items()}):
        raise ConfigError(f"{problem}: their hosts have different files; give all of them one model folder")
