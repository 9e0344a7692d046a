"""Leases of evaluations: completions of held-out prompts, every token from one policy version."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncrl.replay.lease_records import Acceptance, LeaseRecord, Verdict, first_attempt
from asyncrl.replay.running_leases import RunningLeases
from asyncrl.types import LeaseKey, LeaseKind

MAX_FAILURES = 3  # that a generator at fault does not explain
MAX_TRIES = 32


@dataclass(slots=True)
class EvalProgress:
    """How far one evaluation is. Its prompts have the ordinals from first_ordinal on, num_prompts of them.

    Each ordinal is in exactly one of waiting, running, finished and given_up.
    """

    version: int
    first_ordinal: int
    num_prompts: int
    deadline_at: float  # monotonic seconds
    waiting: deque[int] = field(default_factory=deque)
    running: RunningLeases = field(default_factory=RunningLeases)
    finished: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)
    tries: Counter[int] = field(default_factory=Counter)
    failures: Counter[int] = field(default_factory=Counter)

    @property
    def done(self) -> bool:
        """Whether every prompt has its result or was given up."""
        return not self.waiting and not self.running

    def prompt_index(self, ordinal: int) -> int:
        """Position of an ordinal's prompt in the list of held-out prompts."""
        return ordinal - self.first_ordinal

    def give_up_waiting(self) -> None:
        """Gives up every prompt that is neither answered nor running."""
        self.given_up.update(self.waiting)
        self.waiting.clear()


class EvalLeases:
    """The leases of at most one evaluation at a time. `LeaseBook` owns them and passes everything through."""

    def __init__(self, lease_timeout_s: float, run_epoch: int, next_ordinal: int) -> None:
        self._lease_timeout_s = lease_timeout_s
        self._first_attempt = first_attempt(run_epoch)
        self.next_ordinal = next_ordinal
        self.current: EvalProgress | None = None  # the latest one of this run epoch, done or not

    def start(self, version: int, num_prompts: int, timeout_s: float, now: float) -> EvalProgress:
        """Starts the evaluation of `version`; the one before must be done."""
        unfinished = self._unfinished()
        assert unfinished is None, f"evaluation of version {unfinished.version} is still running"
        first = self.next_ordinal
        self.next_ordinal += num_prompts
        waiting = deque(range(first, first + num_prompts))
        self.current = EvalProgress(version, first, num_prompts, now + timeout_s, waiting)
        return self.current

    def grant(self, holder: str, held_version: int, room: int, now: float) -> list[LeaseRecord]:
        """Up to `room` leases for a generator that holds exactly the version that is evaluated."""
        evaluation = self.current
        if evaluation is None or held_version != evaluation.version:
            return []
        granted: list[LeaseRecord] = []
        while evaluation.waiting and len(granted) < room:
            ordinal = evaluation.waiting.popleft()
            attempt = self._first_attempt + evaluation.tries[ordinal]
            evaluation.tries[ordinal] += 1
            deadline_at = min(now + self._lease_timeout_s, evaluation.deadline_at)
            key = LeaseKey(LeaseKind.EVAL, ordinal, attempt)
            record = LeaseRecord(key, holder, held_version, now, deadline_at, pinned_version=evaluation.version)
            evaluation.running.add(record)
            granted.append(record)
        return granted

    def holders(self, held_versions: Mapping[str, int | None]) -> set[str]:
        """Generators whose next weight swap waits: they work on the evaluation, or it needs their version."""
        evaluation = self._unfinished()
        if evaluation is None:
            return set()
        holders = evaluation.running.holders()
        if evaluation.waiting:
            holders |= {name for name, version in held_versions.items() if version == evaluation.version}
        return holders

    def accept(self, key: LeaseKey) -> Acceptance:
        """A valid result came in for `key`. The first of its ordinal wins, even if its lease has expired."""
        evaluation = self.current
        if evaluation is None:
            return Acceptance(Verdict.UNKNOWN)
        if key.ordinal in evaluation.finished:
            return Acceptance(Verdict.DUPLICATE)
        was_granted = 0 <= key.attempt - self._first_attempt < evaluation.tries[key.ordinal]
        if not was_granted or key.ordinal in evaluation.given_up:
            return Acceptance(Verdict.UNKNOWN)
        running = evaluation.running.get(key.ordinal)
        if running is not None:
            evaluation.running.remove(running)
        else:
            evaluation.waiting.remove(key.ordinal)
        evaluation.finished.add(key.ordinal)
        return Acceptance(Verdict.ACCEPTED, running if running is not None and running.key != key else None)

    def running(self) -> list[LeaseRecord]:
        """Running leases, oldest grant first."""
        return list(self.current.running) if self.current is not None else []

    def running_of(self, holder: str) -> list[LeaseRecord]:
        """Running leases of one generator."""
        return self.current.running.of(holder) if self.current is not None else []

    def last_change(self, holder: str) -> int:
        """Another number after each change of what a generator holds; 0 while it holds nothing."""
        return self.current.running.last_change(holder) if self.current is not None else 0

    @property
    def any_waiting(self) -> bool:
        """Whether a prompt waits to be leased."""
        return self.current is not None and bool(self.current.waiting)

    def get(self, key: LeaseKey) -> LeaseRecord | None:
        """The running lease of this name."""
        record = self.current.running.get(key.ordinal) if self.current is not None else None
        return record if record is not None and record.key == key else None

    def fail(self, record: LeaseRecord, now: float, *, held_against_prompt: bool) -> None:
        """Puts a running lease back, or gives up its prompt: after MAX_FAILURES of its own, or MAX_TRIES in all."""
        evaluation, ordinal = self.current, record.key.ordinal
        assert evaluation is not None and evaluation.running.get(ordinal) == record, f"{record.key} is not running"
        evaluation.running.remove(record)
        evaluation.failures[ordinal] += held_against_prompt
        if evaluation.failures[ordinal] >= MAX_FAILURES or evaluation.tries[ordinal] >= MAX_TRIES:
            evaluation.given_up.add(ordinal)
        else:
            evaluation.waiting.append(ordinal)
        if evaluation.deadline_at <= now:
            evaluation.give_up_waiting()

    def past_deadline(self, now: float) -> list[LeaseRecord]:
        """Leases past their deadline, which the caller fails. Past that of the evaluation, gives up what is left."""
        evaluation = self._unfinished()
        if evaluation is None:
            return []
        if evaluation.deadline_at <= now:
            evaluation.give_up_waiting()
        return evaluation.running.past_deadline(now)

    def abandon(self) -> None:
        """Gives up what is still waiting: nobody holds the version any more."""
        if self.current is not None:
            self.current.give_up_waiting()

    def next_deadline(self) -> float:
        """When `expire` has something to do; infinity when never."""
        evaluation = self._unfinished()
        if evaluation is None:
            return float("inf")
        return min(evaluation.deadline_at, evaluation.running.next_deadline())

    def _unfinished(self) -> EvalProgress | None:
        return self.current if self.current is not None and not self.current.done else None
