"""`asyncrl-learner CONFIG --export STEP`: the model of a checkpoint as a folder of its own, at any time.

A checkpoint is a Hugging Face model already, with the trainer's state beside it, and is deleted when it has become old.
An export is the model alone, in model.dtype, and stays. Weights that are in that dtype are linked where the file system
can, so that they take no further disk. What several ranks wrote is put together here, one tensor at a time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from asyncrl.cli.export_shards import adapters_of_shards, contents_in, contents_of_shards, is_in
from asyncrl.config import Config
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.storage.checkpoint_files import (
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    DESK_STATE,
    Manifest,
    find_latest,
    read_manifest,
    write_folder_atomically,
)
from asyncrl.storage.model_files import WEIGHTS_INDEX, write_json, write_model_files
from asyncrl.storage.tensor_files import SUFFIX, write_tensors

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
        if adapters:
            _write_adapters(manifest, names, target)
        else:
            _write_model(config, manifest, names, target)

    write_folder_atomically(folder, write_files)
    return folder


def _write_adapters(manifest: Manifest, names: list[str], target: Path) -> None:
    for name in names:
        _link_or_copy(manifest.path / name, target / Path(name).name)
    if not (target / ADAPTER_WEIGHTS).exists():
        write_tensors(target / ADAPTER_WEIGHTS, adapters_of_shards(manifest))


def _write_model(config: Config, manifest: Manifest, names: list[str], target: Path) -> None:
    dtype = {"float32": "F32", "bfloat16": "BF16"}[config.model.dtype]
    weights = [name for name in names if name.endswith(SUFFIX)]
    for name in names:
        if name not in weights and name != WEIGHTS_INDEX:
            _link_or_copy(manifest.path / name, target / name)
    if not weights:
        write_model_files(contents_of_shards(config, manifest, dtype), target)
    elif is_in(dtype, [manifest.path / name for name in weights]):
        for name in (*weights, *{WEIGHTS_INDEX}.intersection(names)):
            _link_or_copy(manifest.path / name, target / name)
    else:
        write_model_files(contents_in(dtype, [manifest.path / name for name in weights]), target)
    settings = json.loads((target / MODEL_CONFIG).read_text(encoding="utf-8"))
    if settings.get("dtype") != config.model.dtype:
        write_json(target / MODEL_CONFIG, settings | {"dtype": config.model.dtype})


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
