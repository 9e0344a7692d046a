"""Saving a trainer's state and going on from it: the newest checkpoint that verifies, on any number of ranks.

What is in the folder is `checkpoint_state`, how it gets there `checkpoint_writer`; folders, digests and retention are
`storage.checkpoint_files`.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import (
    WEIGHTS_ONLY,
    Manifest,
    complete_folders,
    load_desk_state,
    read_manifest,
)
from asyncrl.trainer.checkpoint_state import UNREADABLE, read_state
from asyncrl.trainer.checkpoint_writer import SOLO, CheckpointPeers, CheckpointWriter
from asyncrl.trainer.engines.base import EngineState, ModelIdentity, PartState
from asyncrl.trainer.step import StepRunner

log = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 3600.0


def save_checkpoint(
    root: Path,
    runner: StepRunner,
    *,
    run_epoch: int,
    desk_state: bytes = b"",
    keep: int = 2,
    peers: CheckpointPeers = SOLO,
) -> Path | None:
    """Saves weights, optimizer state and random state of the runner's version, and waits for it.

    Returns the checkpoint's folder (at rank 0). Raises CheckpointError; then earlier checkpoints are as they were.
    """
    writer = CheckpointWriter(root, runner, keep=keep, peers=peers)
    writer.begin(run_epoch=run_epoch, desk_state=desk_state)
    saved = writer.finished(SAVE_TIMEOUT_S)
    if saved is None:
        raise CheckpointError(f"the checkpoint under {root} is not written after {SAVE_TIMEOUT_S:.0f} s")
    if saved.error:
        raise CheckpointError(saved.error)
    return Path(saved.path) if saved.path else None


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the trainer's state came from, and what the desk had put beside it."""

    path: Path
    version: int
    run_epoch: int
    desk_state: bytes


def load_checkpoint(root: Path, runner: StepRunner, *, peers: CheckpointPeers = SOLO) -> Restored | None:
    """Puts the newest checkpoint under `root` that verifies into `runner`.

    Training then goes on bit for bit as if it had not been interrupted, if as many ranks train as before, with as many
    replicas; with another number sums are taken in another order. Checkpoints that do not verify are skipped with a
    warning. Returns None, and changes nothing, where no checkpoint is left. All ranks call this; each reads what it
    holds.

    Raises CheckpointError when the newest is of another model, or verifies but cannot be loaded.
    """
    manifest = _find_latest(root, peers)
    if manifest is None:
        return None
    _restore(manifest, runner, peers)
    return Restored(manifest.path, manifest.version, manifest.run_epoch, load_desk_state(manifest))


def _find_latest(root: Path, peers: CheckpointPeers) -> Manifest | None:
    """The checkpoint of the highest version that verifies; ranks divide the reading among them."""
    for name in peers.tell([path.name for path in complete_folders(root)]):
        manifest, problem = None, ""
        try:
            manifest = read_manifest(root / name, share=(peers.rank, peers.size))
        except CheckpointError as error:
            problem = str(error)
        problems = [problem for problem in peers.gather(problem) if problem]
        if not problems:
            return manifest
        log.warning("skipping a checkpoint that does not verify: %s", problems[0])
    return None


def _restore(manifest: Manifest, runner: StepRunner, peers: CheckpointPeers) -> None:
    _check_identity(manifest, runner.engines.actor.identity())
    if manifest.extra.get(WEIGHTS_ONLY):
        _restore_weights_only(manifest, runner)
        return
    read = read_state(manifest.path, runner.state(), runner.engines.actor, peers.rank, peers.size)
    runner.load_state(read.state)
    own = runner.world.num_replicas
    if (read.num_ranks, read.num_replicas) != (peers.size, own) and peers.rank == 0:
        copies = ["", ""] if read.num_replicas == own else [f" ({n} replicas)" for n in (read.num_replicas, own)]
        log.warning(
            "%s was written by %d ranks%s and %d%s go on from it: weights are the same, what follows differs in the "
            "last bits from what those ranks would have made",
            manifest.path, read.num_ranks, copies[0], peers.size, copies[1],
        )  # fmt: skip


def _restore_weights_only(manifest: Manifest, runner: StepRunner) -> None:
    """Begins a run with these weights: optimizer, critic, KL coefficient and random state are those of a new run."""
    state = runner.state()
    policy, critic = state.engines.policy, state.engines.critic
    assert policy is not None, "a step has a policy"
    try:
        weights = runner.engines.actor.load_saved(manifest.path)
    except UNREADABLE as error:
        raise CheckpointError(f"{manifest.path} verifies but cannot be loaded: {error}") from error
    engines = EngineState(policy=PartState(weights, policy.optimizer, policy.trained), critic=critic)
    runner.load_state(dataclasses.replace(state, version=manifest.version, engines=engines))


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
