"""Where the time goes: every second of a daemon belongs to one activity.

    ledger = Ledger(LearnerActivity.START)
    ledger.switch(LearnerActivity.OTHER)
    with ledger.during(LearnerActivity.COMPUTE):
        ...
    ledger.seconds()  # {"start": 6.5, "compute": 0.75, ...}; their sum is the time since the ledger began

What a ledger measures is the host's time by the monotonic clock. That goes on while a process is stopped (SIGSTOP),
which counts for what it was doing, and stands still while the machine sleeps. No torch here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Self


class Activity(StrEnum):
    """A name, and the sentence that says what belongs to it."""

    sentence: str

    def __new__(cls, name: str, sentence: str) -> Self:
        """A member that equals its name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.sentence = sentence
        return member


class LearnerActivity(Activity):
    """What the training thread of rank 0 does, one thing at a time.

    The host's time: nothing waits for a GPU in order to be measured. What a GPU still computes when an activity ends
    counts where the host waits for it next, at the end of the step as a rule.
    """

    START = (
        "start",
        (
            "The process starts, loads model and checkpoint and meets the other ranks; then the wait for the first "
            "generator that can work."
        ),
    )
    DATA = "data", "Waits for a batch: it is learner_idle_s."
    COMPUTE = (
        "compute",
        (
            "Makes a step: packs the batch, forward passes (those of reference policy and critic too), backward "
            "passes, optimizer. Where ranks share a model they also wait for each other within its passes."
        ),
    )
    RANKS = "ranks", "Waits for the other ranks outside a model's passes: to share out a batch, to add up or compare."
    SNAPSHOT = "snapshot", "Stands still for a version to go out: the canary's forward pass and the copy."
    CHECKPOINT = (
        "checkpoint",
        "Stands still for a checkpoint: the copy of the state, and at the end of the run all of the writing.",
    )
    MESSAGES = "messages", "Decodes batches and reports steps."
    RESTART = (
        "restart",
        (
            "Lost with a trainer that died: since the last new step, until the process of the next one began. What "
            "that one does to get back there counts as what it is."
        ),
    )
    OTHER = "other", "The rest, the export among it."


class GeneratorActivity(Activity):
    """What a generator does. Of those that hold at one time, the first in this order counts."""

    START = "start", "Connects to the learner and starts its engine."
    SWAP = "swap", "Swaps in new weights, from the order to the end; for pause_ms of it the engine stands still."
    DECODE = "decode", "The engine has sequences to train on, running or queued."
    EVAL = "eval", "The engine has sequences, all of them of evaluations."
    REWARDS = "rewards", "The engine has no sequence; what it sampled waits for its rewards."
    WEIGHTS = (
        "weights",
        (
            "The engine holds no version that is proven and has no sequence: waits for its first weights, for a "
            "commit, or for better ones after a taint."
        ),
    )
    ROOM = "room", "Nothing in hand, and results may not leave: the outbox is full, or the learner takes none for now."
    OTHER = "other", "Nothing in hand, and none wanted: it is stopping. Activities that this version does not know."
    LEASES = "leases", "Nothing in hand: waits for leases, or for a learner that is away."


class _Open:
    """One `during` that has not ended; told apart by identity."""

    __slots__ = ("activity",)

    def __init__(self, activity: str) -> None:
        self.activity = activity


class Ledger:
    """Adds up the time of each activity. There is one at any moment, so that the sum is the time that has passed.

    `switch` names what is done as long as no `during` is open; of those that are open, the one that began last counts.
    """

    def __init__(self, activity: str, *, age_s: float = 0.0, clock: Callable[[], float] | None = None) -> None:
        """Begins with `activity`, age_s seconds ago. clock: a monotonic time in seconds."""
        self._clock = clock or time.monotonic
        self._began_ns = self._since_ns = self._now_ns() - round(age_s * 1e9)
        self._beneath = str(activity)
        self._open: list[_Open] = []
        self._spent_ns: dict[str, int] = {}  # whole numbers: a sum of floats would drift
        self._thread = threading.get_ident()

    @property
    def activity(self) -> str:
        """What time is counted for now."""
        return self._open[-1].activity if self._open else self._beneath

    def switch(self, activity: str) -> None:
        """From now on this is done, where no `during` is open."""
        self._count()
        self._beneath = str(activity)

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Counts for `activity` what is done inside. In a thread other than the ledger's own it does nothing."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._count()
        opened = _Open(str(activity))
        self._open.append(opened)
        try:
            yield
        finally:
            self._count()
            self._open.remove(opened)

    def seconds(self) -> dict[str, float]:
        """Seconds of each activity up to now; those that never took place are absent."""
        self._count()
        return {activity: spent / 1e9 for activity, spent in self._spent_ns.items()}

    @property
    def elapsed_s(self) -> float:
        """Seconds since the ledger began, by its clock alone: what the sum of `seconds` must be."""
        return (self._now_ns() - self._began_ns) / 1e9

    def _count(self) -> None:
        now = self._now_ns()
        if now != self._since_ns:
            self._spent_ns[self.activity] = self._spent_ns.get(self.activity, 0) + now - self._since_ns
            self._since_ns = now

    def _now_ns(self) -> int:
        return round(self._clock() * 1e9)


def known_seconds(seconds: Mapping[str, float], activities: type[Activity]) -> dict[str, float]:
    """The same under known names: what another version calls by one that is not known here goes to `other`."""
    known = {str(activity) for activity in activities}
    found: dict[str, float] = {}
    for activity, spent in seconds.items():
        name = activity if activity in known else "other"
        found[name] = found.get(name, 0.0) + spent
    return found


def since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """What totals grew by, by activity; those that did not grow are absent.

    Totals never fall: a report in which one does is wrong, and takes nothing away.
    """
    grown = {activity: spent - before.get(activity, 0.0) for activity, spent in now.items()}
    return {activity: spent for activity, spent in grown.items() if spent > 0.0}


def add(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds the seconds of `more` to `total`."""
    for activity, spent in more.items():
        total[activity] = total.get(activity, 0.0) + spent


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The part of the whole that each activity takes, the largest first; empty where no time passed."""
    whole = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda entry: (-entry[1], entry[0]))
    return {activity: spent / whole for activity, spent in ordered} if whole > 0.0 else {}


def in_words(seconds: Mapping[str, float]) -> str:
    """`compute 62%   data 31%   snapshot 5%`: what takes half a per cent or more, the largest first."""
    return "   ".join(f"{activity} {share:.0%}" for activity, share in shares(seconds).items() if share >= 0.005) or "-"
