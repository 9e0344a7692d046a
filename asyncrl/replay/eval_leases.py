"""Leases of evaluations: greedy completions of held-out prompts, every token from one policy version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from asyncrl.replay.lease_records import Acceptance, LeaseRecord, Verdict, first_attempt
from asyncrl.types import LeaseKey, LeaseKind

MAX_TRIES = 3


@dataclass(slots=True)
class Evaluation:
    """One evaluation: ordinals first_ordinal ... first_ordinal + num_prompts - 1, one per held-out prompt.

    Each ordinal is in exactly one of waiting, running, finished and given_up.
    """

    version: int
    first_ordinal: int
    num_prompts: int
    deadline_at: float
    waiting: list[int] = field(default_factory=list)
    running: dict[int, LeaseRecord] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    tries: Counter[int] = field(default_factory=Counter)

    @property
    def done(self) -> bool:
        """Every prompt has its result or was given up."""
        return not self.waiting and not self.running

    def prompt_index(self, ordinal: int) -> int:
        """Position of an ordinal's prompt in the list of held-out prompts."""
        return ordinal - self.first_ordinal


class EvalLeases:
    """At most one evaluation at a time. See `LeaseBook`, which owns this and passes everything through."""

    def __init__(self, lease_timeout_s: float, run_epoch: int, next_ordinal: int, counters: Counter[str]) -> None:
        self._lease_timeout_s = lease_timeout_s
        self._first_attempt = first_attempt(run_epoch)
        self._counters = counters
        self.next_ordinal = next_ordinal
        self.current: Evaluation | None = None

    @property
    def in_progress(self) -> bool:
        return self.current is not None and not self.current.done

    def start(self, version: int, num_prompts: int, timeout_s: float, now: float) -> Evaluation:
        assert not self.in_progress, f"evaluation of version {self.current.version} is still running"
        first = self.next_ordinal
        self.next_ordinal += num_prompts
        waiting = list(range(first, first + num_prompts))
        self.current = Evaluation(version, first, num_prompts, now + timeout_s, waiting)
        return self.current

    def grant(self, holder: str, held_version: int, room: int, now: float) -> list[LeaseRecord]:
        evaluation = self.current
        if evaluation is None or held_version != evaluation.version:
            return []
        granted = []
        while evaluation.waiting and len(granted) < room:
            ordinal = evaluation.waiting.pop(0)
            attempt = self._first_attempt + evaluation.tries[ordinal]
            evaluation.tries[ordinal] += 1
            deadline_at = min(now + self._lease_timeout_s, evaluation.deadline_at)
            key = LeaseKey(LeaseKind.EVAL, ordinal, attempt)
            record = LeaseRecord(key, holder, held_version, now, deadline_at, pinned_version=evaluation.version)
            evaluation.running[ordinal] = record
            granted.append(record)
        self._counters["eval_granted"] += len(granted)
        return granted

    def holders(self, held_versions: Mapping[str, int | None]) -> set[str]:
        """Generators whose next weight swap waits: they work on the evaluation, or it needs their version."""
        if not self.in_progress:
            return set()
        holders = {record.holder for record in self.current.running.values()}
        if self.current.waiting:
            holders |= {name for name, version in held_versions.items() if version == self.current.version}
        return holders

    def accept(self, key: LeaseKey) -> Acceptance:
        evaluation = self.current
        if evaluation is not None and key.ordinal in evaluation.finished:
            return Acceptance(Verdict.DUPLICATE)
        granted = evaluation is not None and (
            0 <= key.attempt - self._first_attempt < evaluation.tries[key.ordinal]
            and key.ordinal not in evaluation.given_up
        )
        if not granted:
            return Acceptance(Verdict.UNKNOWN)
        running = evaluation.running.pop(key.ordinal, None)
        if key.ordinal in evaluation.waiting:
            evaluation.waiting.remove(key.ordinal)
        evaluation.finished.add(key.ordinal)
        return Acceptance(Verdict.ACCEPTED, running if running is not None and running.key != key else None)

    def running(self) -> Iterable[LeaseRecord]:
        return list(self.current.running.values()) if self.current is not None else []

    def fail(self, key: LeaseKey, reason: str) -> bool:
        """Puts a running lease back, or gives up its prompt after `MAX_TRIES`. False if it is not running."""
        evaluation = self.current
        record = evaluation.running.get(key.ordinal) if evaluation is not None else None
        if record is None or record.key != key:
            return False
        del evaluation.running[key.ordinal]
        self._counters[f"eval_failed_{reason}"] += 1
        if evaluation.tries[key.ordinal] >= MAX_TRIES:
            evaluation.given_up.add(key.ordinal)
        else:
            evaluation.waiting.append(key.ordinal)
        return True

    def expire(self, now: float) -> list[LeaseRecord]:
        """Fails leases past their deadline; past that of the evaluation, gives up all that is left of it."""
        expired = [record for record in self.running() if record.deadline_at <= now]
        for record in expired:
            self.fail(record.key, "expired")
        if self.in_progress and self.current.deadline_at <= now:
            self.current.given_up.update(self.current.waiting)
            self.current.waiting.clear()
        return expired

    def abandon(self) -> None:
        """Gives up what is still waiting: nobody holds the version any more."""
        if self.current is not None:
            self.current.given_up.update(self.current.waiting)
            self.current.waiting.clear()

    def next_deadline(self) -> float:
        if not self.in_progress:
            return float("inf")
        return min([self.current.deadline_at, *(record.deadline_at for record in self.current.running.values())])
