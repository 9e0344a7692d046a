"""Where the stored data lies, and how it is read and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"

JOURNAL = DATA / "journal"
OLD_RUN = DATA / "old_run"
DRY_RUN = DATA / "dry_run"


def read_json(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def write_json(name: str, value: Any) -> None:
    (DATA / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name, allow_pickle=False) as arrays:
        return dict(arrays)


def write_arrays(name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(DATA / name, **arrays)


def copy_of(folder: Path, parent: Path) -> Path:
    """A copy that may be locked, repaired and written to."""
    return shutil.copytree(folder, parent / folder.name)
