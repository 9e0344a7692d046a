"""`asyncrl-learner CONFIG --export STEP`: the model of a checkpoint as a folder of its own, at any time.

A checkpoint is a Hugging Face model already, with the trainer's state beside it, and is deleted when it has become old.
An export is the model alone and stays. Weights are linked where the file system can, so that they take no further disk.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from asyncrl.config import Config
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.storage.checkpoint_files import (
    ADAPTER_FOLDER,
    DESK_STATE,
    Manifest,
    find_latest,
    read_manifest,
    write_folder_atomically,
)

log = logging.getLogger(__name__)

LATEST = "latest"
MODEL_CONFIG = "config.json"


def export_checkpoint(config: Config, step: str, *, adapters: bool) -> Path:
    """Writes the model of checkpoint `step` (a number, or `latest`) to run.dir/exports; returns the folder.

    adapters: the adapters alone, in PEFT's format, of a run with update.what=lora.

    Raises ConfigError when there is no such checkpoint or it has no such part, CheckpointError when it is damaged or
    the folder cannot be written.
    """
    manifest = _checkpoint(Path(config.run.dir) / "checkpoints", step)
    prefix = f"{ADAPTER_FOLDER}/" if adapters else ""
    names = [name for name in manifest.files if _belongs(name, adapters=adapters)]
    if adapters and not names:
        raise ConfigError(f"{manifest.path} has no adapters: update.what=lora trains them; leave --adapters out")
    if MODEL_CONFIG not in manifest.files:
        raise ConfigError(
            f"{manifest.path} is of a release that wrote no model into checkpoints; start the learner again and stop "
            "it with SIGTERM, then export the checkpoint that it saves"
        )
    folder = Path(config.run.dir) / "exports" / f"{manifest.path.name}{'_adapter' if adapters else ''}"

    def write_files(target: Path) -> None:
        for name in names:
            _link_or_copy(manifest.path / name, target / name.removeprefix(prefix))

    write_folder_atomically(folder, write_files)
    return folder


def _checkpoint(root: Path, step: str) -> Manifest:
    if step == LATEST:
        manifest = find_latest(root)
        if manifest is None:
            raise ConfigError(f"{root} holds no checkpoint yet; the first is saved after checkpoint.every steps")
        return manifest
    path = root / f"step_{step}"
    if not step.isdecimal() or not path.is_dir():
        there = sorted((found.name for found in root.glob("step_*") if found.is_dir()), key=_number)
        raise ConfigError(
            f"--export {step}: there is no {path}; give a number or `{LATEST}`; there are: {', '.join(there) or 'none'}"
        )
    return read_manifest(path)


def _number(name: str) -> tuple[int, str]:
    digits = name.removeprefix("step_").split(".")[0]
    return (int(digits) if digits.isdecimal() else -1, name)


def _belongs(name: str, *, adapters: bool) -> bool:
    """Whether a file of a checkpoint is part of the export: adapters lie in their folder, the model in none."""
    if adapters:
        return name.startswith(f"{ADAPTER_FOLDER}/")
    return "/" not in name and name != DESK_STATE


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are linked, for nobody writes into such a file. Others are copied: editing them changes no checkpoint."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:
            log.debug("%s cannot be linked and is copied", source)  # another file system, or one without links
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} was deleted meanwhile; export a newer checkpoint") from error
