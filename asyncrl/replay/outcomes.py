"""How the leases of each generator end, and what follows: who gets no leases for a while, and whose fault a failure is.

A generator that works and a prompt that cannot be answered look alike in a single failure. They differ in the company
it has:

- *A generator is at fault* when at least SICK_SHARE of its last WINDOW leases failed (MIN_OUTCOMES at least, and not
  of one prompt alone). It is *set aside*: no leases, and its weights are sent again. After a back-off, which doubles
  with each further time, it gets one lease as a trial. A trial that ends with a group brings it back; one that fails
  sets it aside again. The learner may have to wait for a trial; while others work, the back-off is TRIAL_COST times
  what the failed lease took at least, so that trials cost a twentieth of the time at most.
- *A prompt is at fault* as far as its failures directly follow successes of the generators that had it: such a failure
  is a *strike*. A generator that fails with everything, or has not finished anything yet, gives no strikes, and between
  two strikes of one generator there is always a success of its own.

Where every generator is set aside and MAX_FAILED_TRIALS trials of each failed, nothing will come any more: the learner
ends with exit code 8 and says why. With a single generator the rules are the same: its prompts are blamed for what
fails between its successes, and a generator that fails with everything ends the run.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from asyncrl.replay.lease_records import blame
from asyncrl.types import LeaseKey

WINDOW = 16
MIN_OUTCOMES = 6
SICK_SHARE = 0.75
FIRST_BACKOFF_S = 2.0
MAX_BACKOFF_S = 300.0
TRIAL_COST = 20.0
MAX_FAILED_TRIALS = 4
MAX_GENERATORS = 4096  # of which outcomes are remembered; the one that was first heard of is forgotten first


class Blame(enum.Enum):
    """What a failure says of its prompt."""

    NONE = "none"  # its generator had failed on other prompts, too
    ALONE = "alone"  # nothing else of its generator failed since its last success, or nothing else was tried
    STRIKE = "strike"  # it directly follows a success of its generator


@dataclass(slots=True)
class _EndedLease:
    """One lease that ended: `reason` is empty when that was with a group."""

    ordinal: int
    reason: str


@dataclass(slots=True)
class _Generator:
    window: deque[_EndedLease] = field(default_factory=lambda: deque(maxlen=WINDOW))
    num_succeeded: int = 0
    failed_since: set[int] = field(default_factory=set)  # ordinals, since its last success; at most WINDOW
    set_aside: bool = False
    trial_at: float = 0.0  # when it gets its next trial, if nobody else works; only while it is set aside
    late_trial_at: float = 0.0  # the same while others work
    trial: LeaseKey | None = None  # under way
    times_set_aside: int = 0  # in a row, trials that failed included
    detail: str = ""  # of its last failure


@dataclass(frozen=True, slots=True)
class SetAside:
    """A generator that gets no leases until a trial succeeds."""

    name: str
    num_failed: int
    num_ended: int
    reasons: dict[str, int]  # why its last leases failed
    detail: str  # what the last one said
    backoff_s: float


@dataclass(frozen=True, slots=True)
class Recovered:
    """A generator whose trial succeeded: it gets leases as before."""

    name: str


class Outcomes:
    """The outcomes of the leases of each generator, in this life of the learner. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._records: dict[str, _Generator] = {}
        self._aside: set[str] = set()  # names of those set aside
        self._news: list[SetAside | Recovered] = []

    # -- what is told --------------------------------------------------------------------------------------------

    def succeeded(self, name: str, key: LeaseKey) -> None:
        """A lease of `name` ended with a group."""
        record = self._of(name)
        record.num_succeeded += 1
        record.failed_since.clear()
        record.window.append(_EndedLease(key.ordinal, ""))
        if record.trial == key:
            record.trial = None
            record.set_aside = False
            self._aside.discard(name)
            record.window.clear()
            self._news.append(Recovered(name))
        elif not record.set_aside and len(record.window) >= MIN_OUTCOMES and not _is_sick(record):
            record.times_set_aside = 0

    def failed(self, name: str, key: LeaseKey, reason: str, detail: str, now: float, took_s: float = 0.0) -> Blame:
        """A lease of `name` ended after `took_s` without a group. Says what that means for its prompt."""
        record = self._of(name)
        others_failed = record.failed_since - {key.ordinal}
        failed_before = key.ordinal in record.failed_since
        if len(record.failed_since) < WINDOW:
            record.failed_since.add(key.ordinal)
        record.window.append(_EndedLease(key.ordinal, reason))
        record.detail = detail or record.detail
        if record.trial == key:
            record.trial = None
            self._set_aside(record, now, took_s)
        elif not record.set_aside and _is_sick(record):
            record.set_aside = True
            self._aside.add(name)
            backoff_s = self._set_aside(record, now, took_s)
            failures = [ended.reason for ended in record.window if ended.reason]
            news = SetAside(name, len(failures), len(record.window), dict(Counter(failures)), record.detail, backoff_s)
            self._news.append(news)
        if others_failed:
            return Blame.NONE
        return Blame.ALONE if failed_before or not record.num_succeeded else Blame.STRIKE

    def took_back(self, name: str, key: LeaseKey, now: float) -> None:
        """A lease of `name` ended for a reason that says nothing of it: it died, or somebody else was faster."""
        record = self._records.get(name)
        if record is not None and record.trial == key:
            record.trial = None
            record.trial_at = record.late_trial_at = now

    def granted(self, name: str, key: LeaseKey) -> None:
        """`name` got a lease; where it is set aside, that is its trial."""
        record = self._records.get(name)
        if record is not None and record.set_aside:
            record.trial = key

    def died(self, name: str) -> None:
        """`name` is gone for now. If it was set aside, it is so when it comes back."""
        if name not in self._aside:
            self.forget(name)

    def forget(self, name: str) -> None:
        """A new process took the place of `name`, or it is gone for good: what was is no measure of what comes."""
        self._records.pop(name, None)
        self._aside.discard(name)

    # -- what is asked -------------------------------------------------------------------------------------------

    def room(self, name: str, wanted: int, now: float) -> int:
        """How many of `wanted` leases `name` may get now: all, one for a trial, or none."""
        record = self._records.get(name)
        if record is None or not record.set_aside:
            return wanted
        return min(wanted, 1) if record.trial is None and now >= self._trial_at(record) else 0

    def is_set_aside(self, name: str) -> bool:
        """Whether `name` gets no leases but trials."""
        record = self._records.get(name)
        return record is not None and record.set_aside

    def next_trial(self, now: float) -> float:
        """When the next trial may begin that may not yet; infinity when there is none to come."""
        aside = (self._records[name] for name in self._aside)
        times = [self._trial_at(record) for record in aside if record.trial is None]
        return min((time for time in times if time > now), default=float("inf"))

    def hopeless(self, names: Iterable[str]) -> str:
        """Why no group will come from these generators, in words; empty while one of them may still bring some."""
        said = []
        for name in names:
            record = self._records.get(name)
            if record is None or not record.set_aside or record.times_set_aside <= MAX_FAILED_TRIALS:
                return ""
            reasons = Counter(ended.reason for ended in record.window if ended.reason)
            said.append(f"{name}: {_counted(reasons)}; the last one: {record.detail or 'no detail'}")
        return "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")

    def take_news(self) -> list[SetAside | Recovered]:
        """Who was set aside and who came back since the last call."""
        news, self._news = self._news, []
        return news

    # -- inside --------------------------------------------------------------------------------------------------

    def _of(self, name: str) -> _Generator:
        record = self._records.get(name)
        if record is None:
            if len(self._records) >= MAX_GENERATORS:
                self.forget(next(iter(self._records)))
            record = self._records[name] = _Generator()
        return record

    def _trial_at(self, record: _Generator) -> float:
        others_work = len(self._records) > len(self._aside)
        return record.late_trial_at if others_work else record.trial_at

    def _set_aside(self, record: _Generator, now: float, took_s: float) -> float:
        backoff_s = min(FIRST_BACKOFF_S * 2**record.times_set_aside, MAX_BACKOFF_S)
        record.times_set_aside += 1
        record.trial_at = now + backoff_s
        record.late_trial_at = now + max(backoff_s, TRIAL_COST * took_s)
        return self._trial_at(record) - now


def _is_sick(record: _Generator) -> bool:
    """Whether most of its last leases failed, and not of one prompt alone where the prompt may be the cause."""
    failures = [ended for ended in record.window if ended.reason]
    if len(record.window) < MIN_OUTCOMES or len(failures) < SICK_SHARE * len(record.window):
        return False
    return len({ended.ordinal for ended in failures}) > 1 or not all(blame(ended.reason) for ended in failures)


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
