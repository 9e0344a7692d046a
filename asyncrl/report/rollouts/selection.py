"""Which rollouts a reader asked for: of a run's files one, and of its rollouts the best, the worst, some at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asyncrl.errors import UserError
from asyncrl.report.rollouts.files import ROLLOUTS_FOLDER, RolloutFile, file_of, files_in, read_file
from asyncrl.report.rollouts.records import RolloutRecord
from asyncrl.report.run_records import run_folder
from asyncrl.types import LeaseKind

MAX_NAMED = 20  # numbers in a message

_WHAT = {LeaseKind.TRAIN: "step", LeaseKind.EVAL: "evaluation"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to show. Counts add up; without any, and without a prompt, it is one of each."""

    kind: LeaseKind = LeaseKind.TRAIN
    version: int | None = None  # None: the newest
    prompt: int | None = None  # of this ordinal only
    best: int | None = None
    worst: int | None = None
    sample: int | None = None


def rollouts_folder(run: str) -> Path:
    """run.dir/rollouts of a run, which is given as `run_folder` takes it. Raises UserError."""
    found = run_folder(run)
    if not found.is_dir():
        raise UserError(f"{found}: there is no such folder; give the run.dir of a run, or its name in runs/")
    return found / ROLLOUTS_FOLDER


def find_file(folder: Path, wanted: Wanted) -> RolloutFile:
    """The file that is wanted. Raises UserError, which names what there is."""
    files = files_in(folder)
    if not files:
        raise UserError(
            f"{folder} holds no rollouts; a run writes those of its first and last step and of every "
            "log.rollouts_every-th one, and of its evaluations (log.rollouts_per_eval)"
        )
    of_kind = [file for file in files if file.kind is wanted.kind]
    if of_kind and wanted.version in (None, *(file.version for file in of_kind)):
        return of_kind[-1] if wanted.version is None else file_of(folder, wanted.kind, wanted.version)
    what = _WHAT[wanted.kind]
    which = f"of no {what}" if wanted.version is None else f"not of {what} {wanted.version}"
    kept = "; ".join(
        f"{_WHAT[kind]}s {_named([file.version for file in files if file.kind is kind])}"
        for kind in LeaseKind
        if any(file.kind is kind for file in files)
    )
    raise UserError(f"{folder} holds rollouts {which}, but of {kept}")


def read_wanted(file: RolloutFile, wanted: Wanted) -> tuple[list[RolloutRecord], list[str]]:
    """The rollouts that are wanted, in the order to show them, and what is wrong with lines that are none.

    Raises UserError when there is nothing to show.
    """
    try:
        records, problems = read_file(file)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error}") from error
    if not records:
        raise UserError("\n".join(problems[:3]) or f"{file.path} is empty")
    if wanted.prompt is not None:
        ordinals = sorted({record.ordinal for record in records})
        records = [record for record in records if record.ordinal == wanted.prompt]
        if not records:
            raise UserError(f"{file.path} has no rollout of prompt {wanted.prompt}; it has prompts {_named(ordinals)}")
    return select(records, wanted), problems


def select(records: Sequence[RolloutRecord], wanted: Wanted) -> list[RolloutRecord]:
    """The best, then the worst, then some of the others, each once. The same arguments give the same ones."""
    counts = (wanted.best, wanted.worst, wanted.sample)
    if all(count is None for count in counts):
        if wanted.prompt is not None:
            return list(records)
        counts = (1, 1, 1)
    best, worst, sample = (count or 0 for count in counts)
    by_reward = sorted(records, key=lambda record: -record.reward)  # ties stay in the order of the file
    chosen = by_reward[:best]
    rest = by_reward[best:]
    if worst:
        chosen += rest[-worst:][::-1]
        rest = rest[:-worst]
    order: list[int] = np.random.default_rng(abs(records[0].version)).permutation(len(rest)).tolist()
    return chosen + [rest[index] for index in order[:sample]]


def _named(numbers: Sequence[int]) -> str:
    """Numbers in words; of many the first and the last ones."""
    if len(numbers) <= MAX_NAMED:
        return ", ".join(map(str, numbers))
    half = MAX_NAMED // 2
    first, last = ", ".join(map(str, numbers[:half])), ", ".join(map(str, numbers[-half:]))
    return f"{first}, ..., {last} ({len(numbers)} of them)"
