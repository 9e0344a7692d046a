"""The records of one run, read back from metrics.jsonl: sorted by kind, each version once.

After a crash some versions were trained again, from the journal: of those the newest line counts for what was trained,
while what was generated, acknowledged or dropped is summed over all lines, because each is an increment that happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE, read_records
from asyncrl.metrics.types import youngest_age

Record = dict[str, Any]


class RunRecords:
    """The records of one run, sorted by kind."""

    def __init__(self, run_dir: str | Path) -> None:
        """Raises UserError when run_dir has no metrics file."""
        self.run_dir = Path(run_dir)
        path = self.run_dir / METRICS_FILE
        try:
            records, self.unreadable_lines = read_records(path)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; give the run.dir of a run that has started") from None
        self.step_lines = [record for record in records if record.get("kind") == "step"]
        self.syncs = [record for record in records if record.get("kind") == "sync"]
        self.evals = sorted(_newest(record for record in records if record.get("kind") == "eval"), key=_version)
        self.steps = sorted(_newest(self.step_lines), key=_version)
        self.wall_s = max((record.get("wall_s") or 0.0 for record in records), default=0.0)


def _newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each version."""
    return list({record["version"]: record for record in records}.values())


def _version(record: Record) -> int:
    return record["version"]


def values(records: Sequence[Record], name: str) -> list[Any]:
    """The figure `name` of the records that have it."""
    return [record[name] for record in records if record.get(name) is not None]


def total(records: Sequence[Record], name: str) -> Any:
    """Its sum; 0 where nobody measured it."""
    return sum(values(records, name))


def mean(records: Sequence[Record], name: str) -> float | None:
    """Its mean; None where nobody measured it."""
    measured = values(records, name)
    return fmean(measured) if measured else None


def middle(records: Sequence[Record], name: str) -> float | None:
    """Its median; None where nobody measured it."""
    measured = values(records, name)
    return median(measured) if measured else None


def by_age(steps: Sequence[Record]) -> dict[str, list[Record]]:
    """Bucket of policy ages, young first → its figures in each step that has such tokens, with the step's wall_s."""
    found: dict[str, list[Record]] = {}
    for step in steps:
        for bucket, figures in (step.get("age_health") or {}).items():
            found.setdefault(bucket, []).append({**figures, "wall_s": step.get("wall_s")})
    return {bucket: found[bucket] for bucket in sorted(found, key=youngest_age)}


def alarm_steps(steps: Sequence[Record]) -> dict[str, int]:
    """Alarm → number of steps after which it was on."""
    return dict(Counter(name for step in steps for name in step.get("alarms") or []))
