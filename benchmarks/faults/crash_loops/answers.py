"""How long a learner that was started again takes to answer its generators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.crash_loops.audit import Who
from benchmarks.faults.crash_loops.killer import LEARNER
from benchmarks.faults.crash_loops.ledger import GeneratorAccount

BAR_S = 1.0  # 95 of 100 answers are to come within it


@dataclass(frozen=True, slots=True)
class Life:
    """One process: from its start to its end; infinity when nobody ended it."""

    began: float
    ended: float


def lives_of(ledgers: Path) -> dict[str, list[Life]]:
    """The lives of all processes by name, from the killer's ledger."""
    lives: dict[str, list[Life]] = {}
    for line in (ledgers / "kills").read_text().splitlines():
        what, name, time = line.split()
        if lives.get(name) and lives[name][-1].ended == float("inf"):
            # At a start as well: a generator that leaves by itself is started again, and nobody notes its end.
            lives[name][-1] = Life(lives[name][-1].began, float(time))
        if what == "start":
            lives.setdefault(name, []).append(Life(float(time), float("inf")))
    return lives


def answer_times(ledgers: Path, accounts: Mapping[Who, GeneratorAccount]) -> list[float]:
    """Seconds from the start of each new learner's process to its welcome, for each generator that was there.

    That is the time of its imports, of reading what is on disk, of the bind, and of the generator's way back to it. A
    generator counts when an earlier learner had welcomed it. Both must have lived on for BAR_S, so that who is killed
    early, and could show no slow answer, does not make the others look good. No answer counts as the time of waiting.
    """
    lives = lives_of(ledgers)
    seconds = []
    for learner in lives.get(LEARNER, [])[1:]:
        for (name, _), account in accounts.items():
            there = next((life for life in lives[name] if life.began <= account.began_at < life.ended), None)
            known = account.welcomed and account.welcomed[0][0] < learner.began
            if there is None or not known:
                continue
            both_until = min(learner.ended, there.ended)
            if both_until < learner.began + BAR_S:
                continue
            answered = [when for when, _ in account.welcomed if learner.began <= when < both_until]
            seconds.append(min(answered, default=both_until) - learner.began)
    return seconds


def answer_figures(ledgers: Path, accounts: Mapping[Who, GeneratorAccount]) -> dict[str, float | int | None]:
    """The figures of `answer_times` for the table."""
    seconds = sorted(answer_times(ledgers, accounts))
    at = {"median": 0.5, "p95": 0.95, "max": 1.0}
    return {"answers": len(seconds)} | {
        f"answer_{name}_s": round(seconds[math.ceil(share * len(seconds)) - 1], 3) if seconds else None
        for name, share in at.items()
    }
