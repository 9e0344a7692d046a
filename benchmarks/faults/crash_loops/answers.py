"""How long a learner that was started again takes to answer its generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.crash_loops.audit import Who
from benchmarks.faults.crash_loops.killer import LEARNER
from benchmarks.faults.crash_loops.ledger import GeneratorAccount


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
        if what == "start":
            lives.setdefault(name, []).append(Life(float(time), float("inf")))
        elif lives.get(name):
            lives[name][-1] = Life(lives[name][-1].began, float(time))
    return lives


def answer_times(ledgers: Path, accounts: Mapping[Who, GeneratorAccount]) -> list[float]:
    """Seconds from the start of each learner to its welcome, for each generator that was there all the time.

    A generator counts when it had been welcomed by an earlier learner. Learners that were killed before they could
    answer count for nothing where the answer had not come, up to a second after the start; later ones as the time they
    lived without answering.
    """
    lives = lives_of(ledgers)
    seconds = []
    for learner in lives.get(LEARNER, [])[1:]:
        for (name, _), account in accounts.items():
            there = next((life for life in lives[name] if life.began <= account.began_at < life.ended), None)
            known = account.welcomed and account.welcomed[0][0] < learner.began
            if there is None or not known or there.ended < learner.began:
                continue
            answers = [when - learner.began for when, _ in account.welcomed if learner.began <= when < learner.ended]
            both_until = min(learner.ended, there.ended) - learner.began
            if answers:
                seconds.append(answers[0])
            elif both_until > 1.0:
                seconds.append(both_until)
    return seconds
