"""What the trainer puts into a checkpoint and takes out again, and the export for everybody else.

Weights are safetensors; optimizer and random state are written by torch.save and only ever read with
weights_only=True. Folders, digests and retention are `checkpoint_files`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoint_files import (
    Manifest,
    find_latest,
    load_desk_state,
    write_checkpoint,
    write_folder_atomically,
)
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.trainable import describe_update, merged_state
from asyncrl.trainer.step import PolicyTrainer

WEIGHTS = "weights.safetensors"
CRITIC_WEIGHTS = "critic.safetensors"
TRAINER_STATE = "trainer.pt"

# Beside weights and config.json, what AutoTokenizer and `vllm serve` look for.
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def save_checkpoint(
    root: Path,
    trainer: PolicyTrainer,
    *,
    run_epoch: int,
    desk_state: bytes = b"",
    keep: int = 2,
) -> Path:
    """Saves weights, optimizer state and random state of the trainer's version; see `write_checkpoint`.

    Returns the checkpoint's folder.

    Raises CheckpointError; then earlier checkpoints are as they were.
    """
    weights = _own_tensors(trainer.policy)
    critic_weights = _critic_tensors(trainer)

    def write_files(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)
        if critic_weights:
            save_file(critic_weights, folder / CRITIC_WEIGHTS)
        torch.save(trainer.state_dict(), folder / TRAINER_STATE)

    manifest = write_checkpoint(
        root,
        trainer.version,
        write_files,
        run_epoch=run_epoch,
        desk_state=desk_state,
        extra={**_identity(trainer.policy), "torch": torch.__version__},
        keep=keep,
        # Weights and two moments of the same size.
        expected_bytes=3 * sum(tensor.nbytes for tensor in (*weights.values(), *critic_weights.values())),
    )
    return manifest.path


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the trainer's state came from, and what the desk had put beside it."""

    path: Path
    version: int
    run_epoch: int
    desk_state: bytes


def load_checkpoint(root: Path, trainer: PolicyTrainer) -> Restored | None:
    """Puts the newest checkpoint under `root` that verifies into `trainer`; None, and no change, if there is
    none.

    Training then goes on bit for bit as if it had not been interrupted. Checkpoints that do not verify are
    skipped with a warning. Raises CheckpointError when the newest is of another model, or verifies but cannot
    be loaded.
    """
    manifest = find_latest(root)
    if manifest is None:
        return None
    _restore(manifest, trainer)
    return Restored(manifest.path, manifest.version, manifest.run_epoch, load_desk_state(manifest))


def _restore(manifest: Manifest, trainer: PolicyTrainer) -> None:
    path = manifest.path
    _check_identity(manifest, trainer.policy)
    own_critic = _critic_tensors(trainer)
    if bool(own_critic) != (path / CRITIC_WEIGHTS).exists():
        raise CheckpointError(
            f"{path} was saved {'without' if own_critic else 'with'} a critic and algorithm.advantage asks for the"
            " opposite; resume with the method the run was started with, or use another run.dir"
        )
    try:
        weights = load_file(path / WEIGHTS)
        critic_weights = load_file(path / CRITIC_WEIGHTS) if own_critic else {}
        state: dict[str, Any] = torch.load(path / TRAINER_STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{path} verifies but cannot be loaded: {type(error).__name__}: {error}") from error
    _copy_weights(path, weights, _own_tensors(trainer.policy))
    _copy_weights(path, critic_weights, own_critic)
    trainer.load_state_dict(state)


def _identity(policy: Policy) -> dict[str, str]:
    """What a policy must share with a checkpoint for its weights to mean the same."""
    frozen = repr(sorted(policy.frozen_digests.items())).encode()
    return {
        "architecture": policy.architecture,
        "update": describe_update(policy.update),
        "frozen": sha256(frozen).hexdigest()[:16] if policy.frozen_digests else "",
    }


def _check_identity(manifest: Manifest, policy: Policy) -> None:
    own = _identity(policy)
    # Checkpoints of the time before there was a choice are of full updates.
    saved = {"update": "full", "frozen": ""} | manifest.extra
    for name, what, remedy in (
        ("architecture", "model", "the model.path"),
        ("update", "update", "the section update"),
        ("frozen", "frozen weights", "the weights in model.path and the section update"),
    ):
        if saved.get(name) != own[name]:
            raise CheckpointError(
                f"{manifest.path} is of {what} {saved.get(name)}, the trainer holds {own[name]}; use {remedy} the run "
                "was started with, or another run.dir"
            )


def export_model(policy: Policy, source: Path | None, folder: Path) -> None:
    """Writes the policy in Hugging Face format, tokenizer files included, for AutoModelForCausalLM and `vllm
    serve`. Adapters are merged into their weights.

    Tokenizer files come from `source`, a model folder; None = where the policy was loaded from. An existing
    folder is replaced as a whole. Weights stay float32. Raises CheckpointError.
    """

    def write_files(target: Path) -> None:
        policy.model.save_pretrained(target, state_dict=merged_state(policy.model))
        tokenizer_folder = source if source is not None and source.is_dir() else policy.source
        if tokenizer_folder is None:
            return
        for pattern in TOKENIZER_PATTERNS:
            for path in tokenizer_folder.glob(pattern):
                shutil.copyfile(path, target / path.name)

    write_folder_atomically(folder, write_files)


def _own_tensors(policy: Policy) -> dict[str, Tensor]:
    """What training changes, by name, a shared tensor once, under its first name: of a full update parameters and
    persistent buffers, else the parameters that are trained.
    """
    if policy.update.what != "full":
        return policy.trained_tensors()
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.data
    return tensors


def _critic_tensors(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """The critic's parameters by name; empty without a critic."""
    return {} if trainer.critic is None else {name: value.data for name, value in trainer.critic.named_parameters()}


def _copy_weights(path: Path, weights: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    if weights.keys() != targets.keys():
        differing = sorted(weights.keys() ^ targets.keys())
        raise CheckpointError(f"{path / WEIGHTS}: {len(differing)} names differ from the model's, {differing[0]} first")
    for name, target in targets.items():
        if weights[name].shape != target.shape:
            raise CheckpointError(
                f"{path / WEIGHTS}: {name} is {tuple(weights[name].shape)}, the model's {tuple(target.shape)}"
            )
    for name, target in targets.items():
        target.copy_(weights[name])
