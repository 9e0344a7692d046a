"""Whether short completions are trained earlier, or more, than they were granted.

A prompt is granted before anybody knows how long its completions become. So lengths are compared by the version under
which prompts were granted: all that came in of a version, whenever it did, against what was trained of it, and against
what was trained at each step. Versions of which a prompt may still be out are left out: long completions come last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from asyncrl.report.run_records import StepRecord


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a completion by the version of the grant: of all that came in, and of what was trained of it."""

    came_in: Mapping[int, float]
    trained: Mapping[int, float]
    came_in_mean: float | None  # over all those versions
    trained_mean: float | None

    @classmethod
    def of(cls, lines: Iterable[StepRecord], steps: Sequence[StepRecord]) -> Lengths:
        """Of a run: what came in is told by every line, what was trained by the newest of each version."""
        came_in, oldest_in = _sums((line.version, line.came_in_by_grant_age) for line in lines)
        trained, oldest_trained = _sums((step.version, step.trained_by_grant_age) for step in steps)
        newest = steps[-1].version if steps else 0
        whole = newest - 1 - max(oldest_in, oldest_trained)  # whatever was granted by then has come in and is settled
        known = [version for version in sorted(came_in) if version <= whole]
        return cls(
            {version: _mean([came_in[version]]) for version in known},
            {version: _mean([trained[version]]) for version in known if version in trained},
            _mean([came_in[version] for version in known]) if known else None,
            _mean([trained[version] for version in known if version in trained]) if known else None,
        )

    @property
    def trained_share(self) -> float | None:
        """trained_mean / came_in_mean: below 1 where long completions were filtered or lost more than short ones."""
        return self.trained_mean / self.came_in_mean if self.came_in_mean and self.trained_mean is not None else None


def _sums(records: Iterable[tuple[int, Mapping[str, Mapping[str, int]]]]) -> tuple[dict[int, Counter[str]], int]:
    """Rollouts and tokens by the version of the grant; and the largest age."""
    sums: dict[int, Counter[str]] = {}
    largest = 0
    for version, by_age in records:
        for age, counts in by_age.items():
            largest = max(largest, int(age))
            sums.setdefault(version - 1 - int(age), Counter()).update(counts)
    return sums, largest


def _mean(counts: Sequence[Counter[str]]) -> float:
    rollouts = sum(count["rollouts"] for count in counts)
    return sum(count["tokens"] for count in counts) / rollouts if rollouts else 0.0
