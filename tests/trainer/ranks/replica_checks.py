"""What is asked of a world with replicas beside its figures, as each rank sees it: what it sends, loads and saves."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from asyncrl.errors import AsyncRLError
from asyncrl.storage.checkpoint_files import find_latest
from asyncrl.storage.tensor_files import pieces_of, whole_shape
from asyncrl.trainer.agreement import check_agreement
from asyncrl.trainer.checkpoint import load_checkpoint, save_checkpoint
from asyncrl.trainer.checkpoint_writer import SOLO, CheckpointPeers
from asyncrl.trainer.engines.fsdp import load_fsdp_engines
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.replicas import agreed_norm, mesh_of
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import World
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import bucket_bytes, runs_of
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.trainer.ranks import loading_cases
from tests.trainer.ranks.cases import CPU, LORA, PPO, Case, groups_of, runner_of
from tests.trainer.ranks.loading_program import differences

BUCKET_BYTES = 2048
FLOAT32 = {"full": Case(PPO, dtype=torch.float32), "lora": Case(LORA, dtype=torch.float32)}
LOADED = ("own critic", "lora in bfloat16")
REFUSED = {"the policy": "lora", "the reference policy": "tied"}  # what is compared first, and in which case
STEPS = 2


def look_at_replicas(world: World, folder: Path) -> list[dict[str, Any]]:
    """Everything below, as each rank saw it. FOLDER has the models that are loaded."""
    full, lora = (stepped(case, world) for case in FLOAT32.values())
    seen = {
        "sent": {"full": sent(full, world), "lora": sent(lora, world)},
        "loaded": {name: differences(name, folder, world) for name in LOADED if (folder / name).is_dir()},
        "other files": {of: refused_files(name, world, folder) for of, name in REFUSED.items()},
        "norms": agreed(world),
        "diverged": {name: diverged(name, full) for name in ("weights", "moments", "critic")},
        "checkpoint": checkpoint(full, world, folder),
    }
    return CheckpointPeers(world.new_group(60.0)).gather(seen)


def stepped(case: Case, world: World, steps: int = STEPS) -> StepRunner:
    runner = runner_of(case, world)
    go_on(runner, case, steps)
    return runner


def go_on(runner: StepRunner, case: Case, steps: int) -> None:
    for number in range(runner.version, runner.version + steps):
        runner.step(groups_of(case, number)) if runner.world.rank == 0 else runner.follow()


def sent(runner: StepRunner, world: World) -> dict[str, Any]:
    """The buckets of this rank against the weights put together; a layout that leaves a byte out cannot be made."""
    named = runner.engines.actor.tensors().named
    buffer = SnapshotBuffer(named, BUCKET_BYTES, sender=world.rank, senders=world.size)
    buffer.snapshot()
    layout = buffer.layout
    whole = [(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in named]
    expected = SnapshotBuffer(whole, BUCKET_BYTES)
    expected.snapshot()
    own = [bucket for bucket in layout.buckets if bucket.sender == world.rank]
    pairs = zip(own, buffer.buckets(), strict=True)
    return {
        "wrong": sum(not torch.equal(bucket_bytes(expected.flat, bucket), raw) for bucket, raw in pairs),
        "bytes": sum(run.stop - run.start for run in runs_of(layout, world.rank)),
        "total": sum(entry.num_bytes for entry in {entry.offset: entry for entry in layout.tensors}.values()),
        "layout": zlib.crc32(repr(layout).encode()),
    }


def refused_files(name: str, world: World, folder: Path) -> str:
    """What is said where the hosts of the last replica have another model than the others."""
    is_last = world.rank >= world.size - world.size // world.num_replicas
    config = loading_cases.config_of(name, folder / ("other" if is_last else "lora in bfloat16"))
    try:
        load_fsdp_engines(config, CPU, world)
    except AsyncRLError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def agreed(world: World) -> float:
    """A norm that each replica has added up to other bits."""
    mine = torch.tensor([1.0 + 2.0**-20 * world.rank])
    norm = DTensor.from_local(mine, mesh_of(world, CPU), [Replicate(), Shard(0)])
    return float(agreed_norm(norm)[0])


def diverged(what: str, runner: StepRunner) -> str:
    """What is said when one bit of the last rank's slices is another one; as it was, nothing is said."""
    state, world = runner.state().engines, runner.world
    assert state.policy is not None and state.critic is not None
    tensor = {
        "weights": state.policy.weights["model.layers.1.mlp.up_proj.weight"],
        "moments": state.policy.optimizer["model.norm.weight"]["exp_avg_sq"],
        "critic": state.critic.weights["trunk.norm.weight"],
    }[what]
    check_agreement(world, runner)
    flip = int(world.rank == world.size - 1)
    word = local(tensor).detach().view(torch.int32).view(-1)[-1:]
    word ^= flip
    try:
        check_agreement(world, runner)
    except AsyncRLError as error:
        return str(error)
    finally:
        word ^= flip
    return ""


def checkpoint(runner: StepRunner, world: World, folder: Path) -> dict[str, Any]:
    """Saved by replicas, loaded by them, without replicas, and by one rank; and one rank's, loaded by replicas.

    FOLDER/given, if it is there, is what a world of another size has saved.
    """
    case, peers = FLOAT32["full"], CheckpointPeers(world.new_group(60.0))
    save_checkpoint(folder / "saved", runner, run_epoch=1, peers=peers)
    runner.engines.actor.export(folder / "export", None)
    expected = whole(runner)
    if world.rank == 0:
        (folder / "saved.json").write_text(json.dumps(expected))
    go_on(runner, case, 1)
    after = held(runner)

    def loaded(root: str, ranks: World | None, peers: CheckpointPeers = peers) -> StepRunner:
        runner = disturbed(runner_of(case, ranks))
        assert load_checkpoint(folder / root, runner, peers=peers) is not None, root
        return runner

    again = loaded("saved", world)
    seen: dict[str, Any] = {"same": whole(again) == expected}
    go_on(again, case, 1)
    seen["went on"] = held(again) == after
    seen["without"] = whole(loaded("saved", World(world._place, world._store, world._control))) == expected
    if world.rank == 0:
        seen |= pieces(folder / "saved", world)
        one = loaded("saved", None, SOLO)
        seen["one"] = whole(one) == expected
        save_checkpoint(folder / "of one", one, run_epoch=1)
    world.sum(torch.zeros(1))
    seen["back"] = whole(loaded("of one", world)) == expected
    if (folder / "given").is_dir():
        seen["given"] = whole(loaded("given", world)) == json.loads((folder / "given.json").read_text())
    return seen


def pieces(root: Path, world: World) -> dict[str, Any]:
    """Elements in the files of a checkpoint and in the whole tensors, and the largest share that a rank has written."""
    manifest = find_latest(root)
    assert manifest is not None
    trainer = manifest.path / "trainer"
    found = [piece for kind in ("weights", "optimizer") for piece in pieces_of((trainer / kind).iterdir()).items()]
    written = sum(math.prod(piece.shape) for _, pieces in found for piece in pieces)
    sizes = [sum(file.stat().st_size for file in trainer.glob(f"*/rank_{n + 1:05d}_*")) for n in range(world.size)]
    return {
        "elements": [written, sum(math.prod(whole_shape(pieces)) for _, pieces in found)],
        "share": max(sizes) / sum(sizes),
    }


def disturbed(runner: StepRunner) -> StepRunner:
    """With other values everywhere: nothing may be equal by chance."""
    with torch.no_grad():
        for part in (runner.state().engines.policy, runner.state().engines.critic):
            for tensor in part.weights.values():
                local(tensor).add_(1.0)
    return runner


def tensors(runner: StepRunner) -> dict[str, torch.Tensor]:
    """Weights and moments, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, part in (("policy", runner.state().engines.policy), ("critic", runner.state().engines.critic)):
        found |= {f"{name}.{key}": tensor for key, tensor in part.weights.items()}
        for key, moments in part.optimizer.items():
            found |= {f"{name}.{key}.{which}": moment for which, moment in moments.items()}
    return found


def whole(runner: StepRunner) -> dict[str, int]:
    """Digests of weights and moments, put together over the ranks of a replica."""
    return {
        name: digest((t.full_tensor() if isinstance(t, DTensor) else t).detach().reshape(-1).contiguous())
        for name, t in tensors(runner).items()
    }


def held(runner: StepRunner) -> dict[str, int]:
    """The same of what this rank holds."""
    return {name: digest(local(t).detach().reshape(-1).contiguous()) for name, t in tensors(runner).items()}
