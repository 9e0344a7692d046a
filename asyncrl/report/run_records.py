"""The lines of one run's metrics.jsonl as typed records, sorted by kind.

After a crash some versions were trained again, from the journal: of those the newest line counts for what was trained,
while what was generated, acknowledged or dropped is summed over all lines, because each is an increment that happened.

The records here hold what the report shows, no more. They differ from the classes of `metrics.types`, whose names they
share, in one point: a line may come from an older version of the program, or hold null for a NaN, so that every figure
but the version may be missing. A missing figure is None, a missing mapping or list is empty, and a figure that this
version does not know is ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE, iterate_records
from asyncrl.metrics.types import EvalMetrics, StepMetrics, SyncMetrics, youngest_age

T = TypeVar("T")
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A line of kind `step`: the fields and derived figures of StepMetrics that the report shows."""

    version: int
    wall_s: float | None = None
    interval_s: float | None = None
    reward_mean: float | None = None
    policy_age_mean: float | None = None
    policy_age_max: int | None = None
    tokens_generated: int | None = None
    tokens_trained: int | None = None
    tokens_filtered: int | None = None
    rollouts_acked: int | None = None
    rollouts_trained: int | None = None
    rollouts_dropped: int | None = None
    groups_filtered: int | None = None
    dropped_by_length_decile: Sequence[int] | None = None
    rollouts_failed: Mapping[str, int] = field(default_factory=dict)
    learner_idle_s: float | None = None
    generator_busy_s: float | None = None
    generator_idle_s: float | None = None
    clip_fraction: float | None = None
    masked_share: float | None = None
    ratio_max: float | None = None
    ess_share: float | None = None
    gap_engine: float | None = None
    gap_drift: float | None = None
    age_health: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    alarms: Sequence[str] = ()
    tokens_generated_per_s: float | None = None
    tokens_trained_per_s: float | None = None
    learner_idle_share: float | None = None
    generator_idle_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRecord:
    """A line of kind `sync`: the fields of SyncMetrics that the report shows."""

    version: int
    total_ms: float | None = None
    generators_committed: int | None = None
    retries: int | None = None
    snapshot_ms: float | None = None
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
    wall_s: float | None = None
    reward_mean: float | None = None
    reward_parts: Mapping[str, float | None] = field(default_factory=dict)


AnyRecord = TypeVar("AnyRecord", StepRecord, SyncRecord, EvalRecord)


@dataclass(frozen=True, slots=True)
class AgeRecord:
    """The figures of one step over the tokens of one bucket of ages, named as in the metric `age_health`."""

    wall_s: float | None
    figures: Mapping[str, float | None]


class RunRecords:
    """The records of one run.

    step_lines  every line of kind step, in the order of the file
    steps       the newest line of each version, in the order of versions
    syncs       every line of kind sync, in the order of the file
    evals       the newest evaluation of each version, in the order of versions
    wall_s      seconds the run has taken, over all starts of the learner
    """

    def __init__(self, run_dir: str | Path) -> None:
        """Reads the metrics file. A line that is no record with a version counts in `unreadable_lines`.

        Raises UserError when run_dir has no metrics file.
        """
        self.run_dir = Path(run_dir)
        path = self.run_dir / METRICS_FILE
        self.unreadable_lines = 0
        self.step_lines: list[StepRecord] = []
        self.syncs: list[SyncRecord] = []
        self.wall_s = 0.0
        evals: list[EvalRecord] = []
        try:
            for line in iterate_records(path):
                if line is None or not isinstance(line.get("version"), int):
                    self.unreadable_lines += 1
                    continue
                self.wall_s = max(self.wall_s, line.get("wall_s") or 0.0)
                match line.get("kind"):
                    case StepMetrics.kind:
                        self.step_lines.append(_record(StepRecord, line))
                    case SyncMetrics.kind:
                        self.syncs.append(_record(SyncRecord, line))
                    case EvalMetrics.kind:
                        evals.append(_record(EvalRecord, line))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; give the run.dir of a run that has started") from None
        self.steps = _newest(self.step_lines)
        self.evals = _newest(evals)

    def by_age(self) -> dict[str, list[AgeRecord]]:
        """Bucket of ages, young first → its figures in each step that has such tokens."""
        found: dict[str, list[AgeRecord]] = {}
        for step in self.steps:
            for bucket, figures in step.age_health.items():
                found.setdefault(bucket, []).append(AgeRecord(step.wall_s, figures))
        return {bucket: found[bucket] for bucket in sorted(found, key=youngest_age)}

    def alarm_steps(self) -> dict[str, int]:
        """Alarm → number of steps after which it was on."""
        return dict(Counter(name for step in self.steps for name in step.alarms))


def _record(kind: type[AnyRecord], line: Mapping[str, Any]) -> AnyRecord:
    known = {entry.name for entry in fields(kind)}
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


def mean(figures: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    known = measured(figures)
    return fmean(known) if known else None


def middle(figures: Iterable[float | None]) -> float | None:
    """The median of what was measured; None where nothing was."""
    known = measured(figures)
    return median(known) if known else None


TimedRecord = TypeVar("TimedRecord", StepRecord, EvalRecord, AgeRecord)


def points(
    records: Iterable[TimedRecord], figure: Callable[[TimedRecord], float | None]
) -> tuple[list[float], list[float]]:
    """Wall times in seconds, and the figure at each: of the records that have both."""
    known = [(record.wall_s, value) for record in records if (value := figure(record)) is not None]
    timed = [(wall_s, value) for wall_s, value in known if wall_s is not None]
    return [wall_s for wall_s, _ in timed], [value for _, value in timed]
