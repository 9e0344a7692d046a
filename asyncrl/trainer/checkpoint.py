"""What the trainer puts into a checkpoint and takes out again.

The folder is a Hugging Face model (`engines.export`), and beside it lies the rest of the trainer's state: a critic, the
optimizer, random state. Weights are safetensors; the others are written by torch.save and only ever read with
weights_only=True. Folders, digests and retention are `checkpoint_files`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import (
    STATE_FOLDER,
    WEIGHTS_ONLY,
    Manifest,
    find_latest,
    load_desk_state,
    write_checkpoint,
)
from asyncrl.trainer.engines.base import EngineState, ModelIdentity, PartState
from asyncrl.trainer.engines.part import by_name
from asyncrl.trainer.step import StepRunner, StepState

CRITIC_WEIGHTS = "critic.safetensors"
TRAINER_STATE = "trainer.pt"


def save_checkpoint(
    root: Path,
    runner: StepRunner,
    *,
    run_epoch: int,
    desk_state: bytes = b"",
    keep: int = 2,
) -> Path:
    """Saves weights, optimizer state and random state of the runner's version; see `write_checkpoint`.

    Returns the checkpoint's folder. Raises CheckpointError; then earlier checkpoints are as they were.
    """
    actor = runner.engines.actor
    state = runner.state()
    policy, critic = _parts(state)

    def write_files(folder: Path) -> None:
        actor.save(folder)
        own = folder / STATE_FOLDER
        own.mkdir(exist_ok=True)
        if critic is not None:
            save_file(critic.weights, own / CRITIC_WEIGHTS)
        torch.save(_trainer_state(state), own / TRAINER_STATE)

    tensors = [*policy.weights.values(), *(critic.weights.values() if critic else ())]
    manifest = write_checkpoint(
        root,
        state.version,
        write_files,
        run_epoch=run_epoch,
        desk_state=desk_state,
        extra={**dataclasses.asdict(actor.identity()), "torch": torch.__version__},
        keep=keep,
        # The model, a critic, and of all that is trained two moments of the same size.
        expected_bytes=actor.saved_bytes()
        + sum(tensor.nbytes for tensor in (critic.weights.values() if critic else ()))
        + 2 * sum(tensor.nbytes for tensor in tensors),
    )
    return manifest.path


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the trainer's state came from, and what the desk had put beside it."""

    path: Path
    version: int
    run_epoch: int
    desk_state: bytes


def load_checkpoint(root: Path, runner: StepRunner) -> Restored | None:
    """Puts the newest checkpoint under `root` that verifies into `runner`.

    Training then goes on bit for bit as if it had not been interrupted. Checkpoints that do not verify are skipped with
    a warning. Returns None, and changes nothing, where no checkpoint is left.

    Raises CheckpointError when the newest is of another model, or verifies but cannot be loaded.
    """
    manifest = find_latest(root)
    if manifest is None:
        return None
    _restore(manifest, runner)
    return Restored(manifest.path, manifest.version, manifest.run_epoch, load_desk_state(manifest))


def _restore(manifest: Manifest, runner: StepRunner) -> None:
    path = manifest.path
    actor = runner.engines.actor
    _check_identity(manifest, actor.identity())
    if manifest.extra.get(WEIGHTS_ONLY):
        _restore_weights_only(manifest, runner)
        return
    policy, critic = _parts(runner.state())
    # Older releases had everything in one folder.
    own = path / STATE_FOLDER if (path / STATE_FOLDER / TRAINER_STATE).exists() else path
    if (critic is not None) != (own / CRITIC_WEIGHTS).exists():
        raise CheckpointError(
            f"{path} was saved {'without' if critic else 'with'} a critic and algorithm.advantage asks for the "
            "opposite; resume with the method the run was started with, or use another run.dir"
        )
    try:
        weights = actor.load_saved(path)
        critic_weights = load_file(own / CRITIC_WEIGHTS) if critic else {}
        state: dict[str, Any] = torch.load(own / TRAINER_STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{path} verifies but cannot be loaded: {type(error).__name__}: {error}") from error
    _check_weights(path, weights, policy.weights)
    if critic is not None:
        _check_weights(own / CRITIC_WEIGHTS, critic_weights, critic.weights)
    engines = EngineState(
        policy=PartState(weights, _moments(path, state["optimizer"], policy), policy.trained),
        critic=PartState(critic_weights, _moments(path, state["critic_optimizer"], critic), critic.trained)
        if critic
        else None,
    )
    runner.load_state(
        StepState(
            version=state["version"],
            kl_coef=state["kl_coef"],
            engines=engines,
            cpu_rng=state["cpu_rng"],
            cuda_rng=state.get("cuda_rng"),
        )
    )


def _restore_weights_only(manifest: Manifest, runner: StepRunner) -> None:
    """Begins a run with these weights: optimizer, critic, KL coefficient and random state are those of a new run."""
    state = runner.state()
    policy, critic = _parts(state)
    try:
        weights = runner.engines.actor.load_saved(manifest.path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{manifest.path} verifies but cannot be loaded: {error}") from error
    _check_weights(manifest.path, weights, policy.weights)
    engines = EngineState(policy=PartState(weights, policy.optimizer, policy.trained), critic=critic)
    runner.load_state(dataclasses.replace(state, version=manifest.version, engines=engines))


def _moments(path: Path, saved: dict[str, Any], own: PartState) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by name. Older releases kept it by number. Raises CheckpointError."""
    try:
        moments = by_name(saved, own) if saved.keys() == {"state", "param_groups"} else saved
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if moments and moments.keys() != set(own.trained):
        raise CheckpointError(f"{path} has the optimizer state of {len(moments)} parameters, not of {len(own.trained)}")
    return moments


def _parts(state: StepState) -> tuple[PartState, PartState | None]:
    assert state.engines.policy is not None, "a step has a policy"
    return state.engines.policy, state.engines.critic


def _trainer_state(state: StepState) -> dict[str, Any]:
    """What is in TRAINER_STATE: all but the weights."""
    policy, critic = _parts(state)
    trainer_state: dict[str, Any] = {
        "version": state.version,
        "optimizer": policy.optimizer,
        "kl_coef": state.kl_coef,
        "cpu_rng": state.cpu_rng,
    }
    if critic is not None:
        trainer_state["critic_optimizer"] = critic.optimizer
    if state.cuda_rng is not None:
        trainer_state["cuda_rng"] = state.cuda_rng
    return trainer_state


def _check_identity(manifest: Manifest, own: ModelIdentity) -> None:
    # Checkpoints of the time before there was a choice are of full updates.
    saved = {"update": "full", "frozen": ""} | manifest.extra
    for name, what, remedy in (
        ("architecture", "model", "the model.path"),
        ("update", "update", "the section update"),
        ("frozen", "frozen weights", "the weights in model.path and the section update"),
    ):
        if saved.get(name) != getattr(own, name):
            raise CheckpointError(
                f"{manifest.path} is of {what} {saved.get(name)}, the trainer holds {getattr(own, name)}; use {remedy} "
                "the run was started with, or another run.dir"
            )


def _check_weights(place: Path, weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless the `weights` of `place` fit into the trainer's `own`."""
    if weights.keys() != own.keys():
        differing = sorted(weights.keys() ^ own.keys())
        raise CheckpointError(f"{place}: {len(differing)} names differ from the model's, {differing[0]} first")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(f"{place}: {name} is {tuple(weights[name].shape)}, the model's {tuple(tensor.shape)}")
