"""The lines of one run's metrics.jsonl as typed records, sorted by kind.

After a crash some versions were trained again, from the journal: of those the newest line counts for what was trained,
while what was generated, acknowledged or dropped is summed over all lines, because each is an increment that happened.

The records here hold what the report shows, no more. They differ from the classes of `metrics.types`, whose names they
share, in one point: a line may come from an older version of the program, or hold null for a NaN, so that every figure
but the version may be missing. A missing figure is None, a missing mapping or list is empty, and a figure that this
version does not know is ignored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE
from asyncrl.metrics.sinks import parse_record
from asyncrl.metrics.types import EvalMetrics, StepMetrics, SyncMetrics, youngest_age

RUNS = "runs"  # where run.dir is unless a configuration says otherwise

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A line of kind `step`: the fields and derived figures of StepMetrics that the report shows."""

    version: int
    wall_s: float | None = None
    interval_s: float | None = None
    step_s: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    zero_variance_share: float | None = None
    completion_tokens_mean: float | None = None
    truncated_share: float | None = None
    policy_age_mean: float | None = None
    policy_age_max: int | None = None
    tokens_generated: int | None = None
    tokens_trained: int | None = None
    tokens_filtered: int | None = None
    rollouts_acked: int | None = None
    rollouts_trained: int | None = None
    rollouts_dropped: int | None = None
    groups_filtered: int | None = None
    prompts_left_out: int | None = None
    dropped_by_length_decile: Sequence[int] | None = None
    came_in_by_grant_age: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trained_by_grant_age: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    rollouts_failed: Mapping[str, int] = field(default_factory=dict)
    buffer_groups: int | None = None
    generators_alive: int | None = None
    learner_time_s: Mapping[str, float | None] = field(default_factory=dict)
    generator_time_s: Mapping[str, float | None] = field(default_factory=dict)
    overlapped_s: Mapping[str, float | None] = field(default_factory=dict)
    learner_idle_s: float | None = None
    generator_busy_s: float | None = None
    generator_idle_s: float | None = None
    kl_reference: float | None = None
    kl_behaviour: float | None = None
    clip_fraction: float | None = None
    masked_share: float | None = None
    ratio_max: float | None = None
    ess_share: float | None = None
    gap_engine: float | None = None
    gap_drift: float | None = None
    entropy: float | None = None
    grad_norm: float | None = None
    explained_variance: float | None = None
    age_health: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    alarms: Sequence[str] = ()
    tokens_generated_per_s: float | None = None
    tokens_trained_per_s: float | None = None
    learner_idle_share: float | None = None
    generator_idle_share: float | None = None
    lost_share: float | None = None
    grant_age_mean: float | None = None
    grant_age_token_mean: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRecord:
    """A line of kind `sync`: the fields of SyncMetrics that the report shows."""

    version: int
    wall_s: float | None = None
    total_ms: float | None = None
    generators_committed: int | None = None
    generators_failed: int | None = None
    members: Sequence[str] = ()
    retries: int | None = None
    catch_up: bool | None = None
    snapshot_ms: float | None = None
    transfer_ms: float | None = None
    transfer_gb_per_s: float | None = None
    verify_ms: float | None = None
    pause_ms: float | None = None
    canary_ms: float | None = None
    canary_max_abs_diff: float | None = None
    canary_mean_abs_diff: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """A line of kind `eval`: the fields of EvalMetrics that the report shows."""

    version: int
    samples: int = 1
    temperature: float | None = None
    wall_s: float | None = None
    reward_mean: float | None = None
    reward_best_mean: float | None = None
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)
    reward_parts_best: Mapping[str, float | None] = field(default_factory=dict)
    completion_tokens_mean: float | None = None


AnyRecord = TypeVar("AnyRecord", StepRecord, SyncRecord, EvalRecord)


def run_folder(run: str) -> Path:
    """The folder of a run that is given by it, or by its name in `runs`."""
    by_name = Path(RUNS, run)
    return by_name if not Path(run).is_dir() and by_name.is_dir() else Path(run)


class RunRecords:
    """The records of one run.

    step_lines  every line of kind step, in the order of the file
    steps       the newest line of each version, in the order of versions
    syncs       every line of kind sync, in the order of the file
    evals       the newest evaluation of each version, in the order of versions
    wall_s      seconds the run has taken, over all starts of the learner
    non_finite  figure → lines in which it was NaN or infinite
    """

    def __init__(self, run_dir: str | Path, *, follow: bool = False) -> None:
        """Reads the metrics file. A line that is no record with a version counts in `unreadable_lines`.

        follow: the run may go on; a last line without its end is left for the next `read_on`.

        Raises UserError when run_dir has no metrics file.
        """
        self.run_dir = Path(run_dir)
        self._follow = follow
        self._begin()
        self.read_on()

    def _begin(self) -> None:
        self._place = 0  # in the file, behind the last line that was read
        self.unreadable_lines = 0
        self.step_lines: list[StepRecord] = []
        self.syncs: list[SyncRecord] = []
        self.wall_s = 0.0
        self.non_finite: Counter[str] = Counter()
        self._eval_lines: list[EvalRecord] = []
        self.steps: list[StepRecord] = []
        self.evals: list[EvalRecord] = []

    def read_on(self) -> bool:
        """Reads what the file got since the last time; says whether that is anything.

        A file that has become shorter is another one, and is read from its beginning.

        Raises UserError when there is no such file.
        """
        path = self.run_dir / METRICS_FILE
        try:
            with path.open("rb") as file:
                is_another = os.fstat(file.fileno()).st_size < self._place
                if is_another:
                    self._begin()
                began = file.seek(self._place)
                for line in file:
                    if self._follow and not line.endswith(b"\n"):
                        break
                    self._place += len(line)
                    if line.strip():
                        self._take(parse_record(line))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: there is no such file; give the run.dir of a run that has started") from None
        if self._place == began and not is_another:
            return False
        self.steps = _newest(self.step_lines)
        self.evals = _newest(self._eval_lines)
        return True

    def _take(self, line: Mapping[str, Any] | None) -> None:
        if line is None or not isinstance(line.get("version"), int):
            self.unreadable_lines += 1
            return
        self.wall_s = max(self.wall_s, line.get("wall_s") or 0.0)
        self.non_finite.update(line.get("non_finite") or ())
        match line.get("kind"):
            case StepMetrics.kind:
                self.step_lines.append(_record(StepRecord, line))
            case SyncMetrics.kind:
                self.syncs.append(_record(SyncRecord, line))
            case EvalMetrics.kind:
                self._eval_lines.append(_record(EvalRecord, line))

    @property
    def steps_in_force(self) -> list[StepRecord]:
        """`steps` without those that a restart took back and that are not trained again yet: times never fall."""
        if not self.step_lines:
            return []
        return [step for step in self.steps if step.version <= self.step_lines[-1].version]

    def returns(self) -> list[StepRecord]:
        """The first step after each restart that went back to a checkpoint, in the order of the file."""
        return [step for before, step in pairwise(self.step_lines) if step.version <= before.version]

    def by_age(self) -> dict[str, list[Mapping[str, float | None]]]:
        """Bucket of ages, young first → its figures, named as in the metric `age_health`, of each step that has any."""
        found: dict[str, list[Mapping[str, float | None]]] = {}
        for step in self.steps:
            for bucket, figures in step.age_health.items():
                found.setdefault(bucket, []).append(figures)
        return {bucket: found[bucket] for bucket in sorted(found, key=youngest_age)}

    def alarm_steps(self) -> dict[str, int]:
        """Alarm → number of steps after which it was on."""
        return dict(Counter(name for step in self.steps for name in step.alarms))


_FIGURES: Mapping[type, frozenset[str]] = {
    kind: frozenset(entry.name for entry in fields(kind)) for kind in (StepRecord, SyncRecord, EvalRecord)
}


def _record(kind: type[AnyRecord], line: Mapping[str, Any]) -> AnyRecord:
    known = _FIGURES[kind]
    return kind(**{name: value for name, value in line.items() if name in known and value is not None})


def _newest(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """The last record of each version, in the order of versions."""
    return sorted({record.version: record for record in records}.values(), key=lambda record: record.version)


def measured(figures: Iterable[T | None]) -> list[T]:
    """The figures without those that were not measured."""
    return [figure for figure in figures if figure is not None]


def total(figures: Iterable[Number | None]) -> Number:
    """The sum of what was measured; 0 where nothing was."""
    return sum(measured(figures))


def totals(parts: Iterable[Mapping[str, Number | None]]) -> dict[str, Number]:
    """The sum of what was measured of each part, in the order in which the parts came up."""
    found: dict[str, Number] = {}
    for part in parts:
        for name, figure in part.items():
            if figure is not None:
                found[name] = found[name] + figure if name in found else figure
    return found


def mean(figures: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    known = measured(figures)
    return fmean(known) if known else None


def middle(figures: Iterable[float | None]) -> float | None:
    """The median of what was measured; None where nothing was."""
    known = measured(figures)
    return median(known) if known else None
