"""The trainer's state as the files of a checkpoint, each rank's part by itself: copied, written, read.

    trainer/state.json          what is one number: the KL coefficient, how many ranks and replicas there were
    trainer/optimizer/          two moments and a count of steps for each trained parameter
    trainer/critic/  critic_optimizer/                         the same of a critic, weights apart
    trainer/random/             random state of each rank
    trainer/weights/            with several ranks: what training changes of the policy

Each folder holds one file a rank (`engines.shards`); of a slice that several ranks hold, each writes a part. With one
rank the policy's weights are the Hugging Face model above `trainer/` (`engines.export`), and nothing is stored twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import STATE_FOLDER, WEIGHT_SHARDS
from asyncrl.storage.disk import make_durable
from asyncrl.storage.tensor_files import SUFFIX, FileProof
from asyncrl.trainer.engines.base import EngineState, PartState, PolicyEngine
from asyncrl.trainer.engines.part import by_name
from asyncrl.trainer.engines.shards import (
    Extent,
    HeldPiece,
    HostCopies,
    TensorFiles,
    cut,
    extent_of,
    read_blocks,
    shard_name,
    write_shard,
)
from asyncrl.trainer.step import StepState

STATE_FILE = "state.json"
WEIGHTS = WEIGHT_SHARDS
OPTIMIZER = "optimizer"
CRITIC = "critic"
CRITIC_OPTIMIZER = "critic_optimizer"
RANDOM = "random"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, the last one a number
# Of releases up to 0.1: everything but weights, by torch.save, the optimizer's state by number.
OLD_STATE = "trainer.pt"
OLD_CRITIC = "critic.safetensors"
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, UnpicklingError)


@dataclass(frozen=True, slots=True)
class CopiedState:
    """What one rank writes of a state: copies that training does not touch, by folder and name."""

    version: int
    kl_coef: float
    num_ranks: int
    num_replicas: int
    rank: int
    pieces: dict[str, dict[str, HeldPiece]]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(piece.tensor.nbytes for pieces in self.pieces.values() for piece in pieces.values())


def copy_state(state: StepState, copies: HostCopies, rank: int, num_ranks: int, num_replicas: int = 1) -> CopiedState:
    """Copies this rank's part of a state into host memory; complete after `copies.wait`."""
    policy, critic = state.engines.policy, state.engines.critic
    assert policy is not None, "a step has a policy"
    pieces = {
        WEIGHTS: copies.take(WEIGHTS, policy.weights, rank),
        OPTIMIZER: copies.take(OPTIMIZER, _flat(policy.optimizer), rank),
        RANDOM: {f"cpu.{rank}": _whole(state.cpu_rng)},
    }
    if state.cuda_rng is not None:
        pieces[RANDOM][f"cuda.{rank}"] = _whole(state.cuda_rng)
    if critic is not None:
        pieces[CRITIC] = copies.take(CRITIC, critic.weights, rank)
        pieces[CRITIC_OPTIMIZER] = copies.take(CRITIC_OPTIMIZER, _flat(critic.optimizer), rank)
    copies.mark()
    return CopiedState(state.version, state.kl_coef, num_ranks, num_replicas, rank, pieces)


def write_state(state: CopiedState, actor: PolicyEngine, folder: Path) -> dict[str, FileProof]:
    """Writes what this rank has to write, durably. Returns size and digest of the files, by their paths below `folder`.

    Raises OSError and whatever else a writer raises.
    """
    proofs: dict[str, FileProof] = {}
    own = folder / STATE_FOLDER
    own.mkdir(exist_ok=True)
    if state.rank == 0:
        whole = {name: piece.tensor for name, piece in state.pieces[WEIGHTS].items()} if state.num_ranks == 1 else None
        proofs |= actor.save(folder, whole)
        fields: dict[str, float] = {"version": state.version, "kl_coef": state.kl_coef, "ranks": state.num_ranks}
        if state.num_replicas > 1:
            fields["replicas"] = state.num_replicas
        (own / STATE_FILE).write_text(json.dumps(fields), encoding="utf-8")
    for kind, pieces in state.pieces.items():
        if pieces and not (kind == WEIGHTS and state.num_ranks == 1):
            (own / kind).mkdir(exist_ok=True)
            file = own / kind / shard_name(state.rank, state.num_ranks)
            proofs[file.relative_to(folder).as_posix()] = write_shard(file, pieces)
    if state.rank != 0:
        for name in proofs:  # rank 0 makes durable what it wrote itself, once it is complete
            make_durable(folder / name)
    return proofs


@dataclass(frozen=True, slots=True)
class ReadState:
    """A state that was read, and by how many ranks it had been written, with how many replicas."""

    state: StepState
    num_ranks: int
    num_replicas: int = 1


def read_state(folder: Path, own: StepState, actor: PolicyEngine, rank: int, num_ranks: int) -> ReadState:
    """What this rank holds of the state in a checkpoint's folder; `own` says what that is.

    Raises CheckpointError when it does not fit, or cannot be read.
    """
    policy, critic = own.engines.policy, own.engines.critic
    assert policy is not None, "a step has a policy"
    # Older releases had everything in one folder.
    below = next((below for below in (folder / STATE_FOLDER, folder) if (below / OLD_STATE).exists()), None)
    place = below or folder / STATE_FOLDER
    has_critic = (place / CRITIC).is_dir() or (place / OLD_CRITIC).exists()
    if (critic is not None) != has_critic:
        raise CheckpointError(
            f"{folder} was saved {'without' if critic else 'with'} a critic and algorithm.advantage asks for the "
            "opposite; resume with the method the run was started with, or use another run.dir"
        )
    try:
        weights = actor.load_saved(folder)
        if below is not None:
            return ReadState(_read_old(below, own, weights), 1)
        fields = json.loads((place / STATE_FILE).read_text(encoding="utf-8"))
        saved_ranks = int(fields["ranks"])
        chance = _random_state(place / RANDOM, rank if saved_ranks == num_ranks else 0)
        engines = EngineState(
            policy=PartState(weights, _moments(place / OPTIMIZER, policy), policy.trained),
            critic=None if critic is None else _read_critic(place, critic),
        )
        state = StepState(fields["version"], fields["kl_coef"], engines, chance["cpu"], chance.get("cuda"))
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} verifies but cannot be loaded: {type(error).__name__}: {error}") from error
    return ReadState(state, saved_ranks, int(fields.get("replicas", 1)))


def _read_critic(place: Path, own: PartState) -> PartState:
    file = place / OLD_CRITIC
    files = [file] if file.exists() else sorted((place / CRITIC).glob(f"*{SUFFIX}"))
    return PartState(
        read_blocks(TensorFiles(files), own.weights, place / CRITIC),
        _moments(place / CRITIC_OPTIMIZER, own),
        own.trained,
    )


def _moments(folder: Path, own: PartState) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by name; empty of a part that was not trained yet."""
    if not folder.is_dir():
        return {}
    files = TensorFiles(sorted(folder.glob(f"*{SUFFIX}")))
    wanted = {f"{name}.{key}": name for name in own.trained for key in MOMENTS}
    if files.shapes.keys() != wanted.keys():
        raise CheckpointError(
            f"{folder} is of {len(files.shapes) // len(MOMENTS)} parameters and {len(own.trained)} are trained; "
            "resume with the model and the section update the run was started with"
        )
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in own.trained}
    for long_name, name in wanted.items():
        extent = extent_of(own.weights[name]) if files.shapes[long_name] else Extent((), (), ())
        moments[name][long_name.removeprefix(f"{name}.")] = files.read(long_name, extent)
    return moments


def _random_state(folder: Path, rank: int) -> dict[str, Tensor]:
    files = TensorFiles(sorted(folder.glob(f"*{SUFFIX}")))
    wanted = {name: shape for name, shape in files.shapes.items() if name.endswith(f".{rank}")}
    return {
        name.partition(".")[0]: files.read(name, Extent(shape, (0,) * len(shape), shape))
        for name, shape in wanted.items()
    }


def _read_old(below: Path, own: StepState, weights: dict[str, Tensor]) -> StepState:
    """What releases up to 0.1 wrote: whole tensors, of which this rank takes its blocks."""
    policy, critic = own.engines.policy, own.engines.critic
    assert policy is not None, "a step has a policy"
    state: dict[str, Any] = torch.load(below / OLD_STATE, map_location="cpu", weights_only=True)
    engines = EngineState(
        policy=PartState(weights, _old_moments(state["optimizer"], policy), policy.trained),
        critic=None
        if critic is None
        else PartState(
            read_blocks(TensorFiles([below / OLD_CRITIC]), critic.weights, below / OLD_CRITIC),
            _old_moments(state["critic_optimizer"], critic),
            critic.trained,
        ),
    )
    return StepState(state["version"], state["kl_coef"], engines, state["cpu_rng"], state.get("cuda_rng"))


def _old_moments(saved: dict[str, Any], own: PartState) -> dict[str, dict[str, Tensor]]:
    return {
        name: {
            key: cut(value, extent_of(own.weights[name])) if value.dim() else value for key, value in moments.items()
        }
        for name, moments in by_name(saved, own).items()
    }


def _flat(optimizer: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": moments[key] for name, moments in optimizer.items() for key in MOMENTS}


def _whole(tensor: Tensor) -> HeldPiece:
    return HeldPiece(extent_of(tensor), tensor)
