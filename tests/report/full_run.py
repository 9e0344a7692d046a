"""A made-up run of 200 steps that has all a report can show, as the browser's tests open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asyncrl.report.rollouts.choice import Why
from asyncrl.report.rollouts.files import ROLLOUTS_FOLDER, file_of
from asyncrl.report.writing import report
from asyncrl.types import LeaseKind
from tests.report.rollouts.making import make_record
from tests.report.runs import evaluation, step, sync, write_run

STEPS = 200
GENERATORS = [f"gpu-{number}" for number in range(8)]
OPEN_TWO_TABLES = "for (const id of ['rounds', 'reward']) document.getElementById(`${id}-table`).open = true"
LONG = "a generator whose name is as long as somebody's habit of naming hosts by rack, row and room: b17.r3.example"


def full_run(folder: Path, steps: int = STEPS) -> Path:
    """Writes the run and its report; returns the page."""
    write_run(folder, [record for version in range(steps + 1) for record in _of_version(version, steps)])
    (folder / ROLLOUTS_FOLDER).mkdir()
    for version in (1, steps // 2, steps):
        _rollouts(folder, LeaseKind.TRAIN, version)
        _rollouts(folder, LeaseKind.EVAL, version)
    return report(folder)


def _of_version(version: int, steps: int) -> list[Any]:
    records: list[Any] = []
    if version:
        late = version > 0.8 * steps
        by_age = {str(age): {"rollouts": 16 - 4 * age, "tokens": 40 * (16 - 4 * age) * (1 + age)} for age in range(3)}
        given = {
            "alarms": ["ess_share", "reward_std"] if late else ["lost_share"] if version == steps // 2 else [],
            "ess_share": 0.2 if late else 0.9 - 0.1 * (version % 3),
            "reward_parts": {"correct": version / 400, "format": 0.5 + version / 500},
            "completion_tokens_mean": 40.0 + version % 7,
            "truncated_share": 0.01 * (version % 5),
            "zero_variance_share": 0.2,
            "entropy": 1.0 - version / 300,
            "grad_norm": 0.1 + (version % 11) / 10,
            "kl_behaviour": 0.01,
            "clip_fraction": 0.05,
            "masked_share": 0.0,
            "ratio_max": 1.5 + version % 4,
            "rollouts_failed": {"reward_error": 1} if version % 20 == 0 else {},
            "came_in_by_grant_age": by_age,
            "trained_by_grant_age": by_age,
            "buffer_groups": version % 6,
            "generators_alive": len(GENERATORS),
            "step_s": 1.4,
        }
        records.append(step(version, **given))
    failed = 1 if version % 50 == 25 else 0
    records.append(sync(version, members=[*GENERATORS, LONG], generators_committed=8, generators_failed=failed))
    if version % 20 == 0:
        result = evaluation(version, 0.25 + version / 400)
        result.samples, result.temperature = 4, 1.0
        result.reward_parts = {"correct": 0.25 + version / 400, "format": 0.9}
        result.reward_best_mean = 0.4 + version / 400
        result.reward_parts_best = {"correct": 0.4 + version / 400, "format": 1.0}
        records.append(result)
    return records


def _rollouts(folder: Path, kind: LeaseKind, version: int) -> None:
    texts = [f"word{place} " for place in range(400)]
    with file_of(folder / ROLLOUTS_FOLDER, kind, version).path.open("ab") as file:
        for place in range(8):
            record = make_record(
                place,
                kind=kind,
                version=version,
                num_tokens=400,
                reward=place / 8,
                why=Why.EVALUATED if kind is LeaseKind.EVAL else Why.BEST,
                advantage=(place - 4) / 2,
                prompt="What is the sum of " + " and ".join(map(str, range(60))) + "?",
                completion="".join(texts),
                token_texts=texts,
            )
            file.write(record.to_line())
