"""The files of run.dir/rollouts: step_N.jsonl and eval_N.jsonl, each written in one move, all of them within a size."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from asyncrl.report.rollouts.records import RolloutRecord
from asyncrl.types import LeaseKind

ROLLOUTS_FOLDER = "rollouts"  # in run.dir
LARGEST_SHARE = 4  # one file takes at most this part of the whole size

_NAMES = {LeaseKind.TRAIN: "step", LeaseKind.EVAL: "eval"}
_KINDS = {name: kind for kind, name in _NAMES.items()}
_FILE = re.compile(r"(step|eval)_(\d{1,18})\.jsonl")
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """One file: the rollouts of the step that made `version`, or of its evaluation."""

    kind: LeaseKind
    version: int
    path: Path


def file_of(folder: Path, kind: LeaseKind, version: int) -> RolloutFile:
    """The file of a step or an evaluation, whether it is there or not."""
    return RolloutFile(kind, version, folder / f"{_NAMES[kind]}_{version}.jsonl")


def files_in(folder: Path) -> list[RolloutFile]:
    """The files that are there, by version; none where there is no such folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [match for name in names if (match := _FILE.fullmatch(name))]
    files = [RolloutFile(_KINDS[match[1]], int(match[2]), folder / match[0]) for match in found]
    return sorted(files, key=lambda file: (file.version, file.kind))


def write_file(file: RolloutFile, lines: Iterable[bytes], max_bytes: int) -> int:
    """Writes the lines of a file, in one move: what was there is replaced as a whole. Returns how many did not fit.

    The first that would exceed `max_bytes`, and all that follow, are left out. Raises OSError; what was there stays.
    """
    partial = file.path.with_name(file.path.name + _PARTIAL)
    num_bytes, left_out = 0, 0
    try:
        with partial.open("wb") as out:
            for line in lines:
                if left_out or num_bytes + len(line) > max_bytes:
                    left_out += 1
                    continue
                num_bytes += out.write(line)
        os.replace(partial, file.path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return left_out


def remove_partial(folder: Path) -> None:
    """Removes what a process that was killed had begun to write. Raises OSError."""
    for path in folder.glob(f"*.jsonl{_PARTIAL}"):
        path.unlink(missing_ok=True)


def trim(folder: Path, max_bytes: int, newest: RolloutFile) -> list[RolloutFile]:
    """Deletes files until the rest is within `max_bytes`; returns those that went. Raises OSError.

    The oldest go first, the first step and the first evaluation after all others, and `newest` never.
    """
    files = files_in(folder)
    first = {file.kind: file.path for file in reversed(files)}
    sizes = {file.path: file.path.stat().st_size for file in files}
    total, gone = sum(sizes.values()), []
    for file in sorted(files, key=lambda file: file.path in first.values()):
        if total <= max_bytes:
            break
        if file.path != newest.path:
            file.path.unlink()
            total -= sizes[file.path]
            gone.append(file)
    return gone


def read_file(file: RolloutFile) -> tuple[list[RolloutRecord], list[str]]:
    """The records of a file, and what is wrong with each line that is none. Raises OSError."""
    records: list[RolloutRecord] = []
    problems: list[str] = []
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(RolloutRecord.from_line(line))
            except ValueError as error:
                problems.append(f"{file.path}, line {number}: {error}")
    return records, problems
