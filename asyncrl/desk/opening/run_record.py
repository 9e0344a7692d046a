"""What a run folder says about the run in it: `settings.json`, beside `config.yaml`, which people read.

    settings     everything that decides the run, as it was at the last start (`tasks.fingerprint`)
    forked_from  the folder whose weights are version 0 of the run; empty where that is model.path
    finished     the version at which the run ended in good order; -1 while it has not

Releases before this file wrote `config.yaml` alone: then the keys are compared, and the digests of files are not known.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from asyncrl.config import Config
from asyncrl.config.keys import keys
from asyncrl.storage.disk import fsync_folder
from asyncrl.tasks.fingerprint import value_text
from asyncrl.types import Setting

log = logging.getLogger(__name__)

RECORD_FILE = "settings.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record of one run folder. knows_files: whether digests of files are among the settings."""

    settings: tuple[Setting, ...]
    forked_from: str = ""
    finished: int = -1
    knows_files: bool = True


def read_record(run_dir: Path) -> RunRecord | None:
    """The record of a run folder, made of `config.yaml` where the file is missing or damaged; None without either."""
    path = run_dir / RECORD_FILE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        settings = tuple(Setting(str(name), str(value)) for name, value in said["settings"])
        return RunRecord(settings, str(said["forked_from"]), int(said["finished"]))
    except FileNotFoundError:
        return _of_config_file(run_dir)
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.error("%s cannot be read (%s): the run is compared with %s alone", path, error, CONFIG_FILE)
        return _of_config_file(run_dir)


def _of_config_file(run_dir: Path) -> RunRecord | None:
    path = run_dir / CONFIG_FILE
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        log.error("%s cannot be read (%s): this start cannot be compared with the one before", path, error)
        return None
    settings = []
    for key in keys():
        section = said.get(key.section) if isinstance(said, Mapping) else None
        name = key.name.partition(".")[2]
        if isinstance(section, Mapping) and name in section:
            settings.append(Setting(key.name, value_text(section[name])))
    return RunRecord(tuple(settings), knows_files=False)


def write_record(run_dir: Path, config: Config, record: RunRecord) -> Path:
    """Writes record and configuration, each in one piece; returns the configuration's file. Raises OSError."""
    said = {
        "settings": [list(setting) for setting in record.settings],
        "forked_from": record.forked_from,
        "finished": record.finished,
    }
    _write(run_dir / RECORD_FILE, json.dumps(said, indent=1))
    return _write(run_dir / CONFIG_FILE, config_text(config))


def config_text(config: Config) -> str:
    """What `config.yaml` says."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def write_finished(run_dir: Path, config: Config, version: int) -> None:
    """Notes that the run ended in good order at `version`. Raises OSError."""
    if (record := read_record(run_dir)) is not None:
        write_record(run_dir, config, replace(record, finished=version))


def _write(path: Path, text: str) -> Path:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    fsync_folder(path.parent)
    return path
