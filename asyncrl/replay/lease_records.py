"""What the lease book and its callers say to each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from asyncrl.types import Frontier, LeaseKey

# Attempts of run epoch e are numbered from (e - 1) * 1000: a key of an earlier run epoch is never given out
# again, though a restarted learner does not know which attempts were under way when it died.
ATTEMPTS_PER_EPOCH = 1000
# Strikes (`replay.outcomes`) that give a prompt up; at two generators, as many failures of any kind do, once each of
# the two gave a strike.
MAX_STRIKES = 3
# Failures of one prompt that give it up where its generator fails on nothing else: at the end of a run nothing else
# may be left to try.
MAX_LONE_FAILURES = 8


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """A running lease. Times are monotonic seconds of the learner."""

    key: LeaseKey
    holder: str  # generator id
    issued_version: int  # no token of its group is older
    granted_at: float
    deadline_at: float
    pinned_version: int | None = None  # set on eval leases


class Verdict(StrEnum):
    """What becomes of a finished group."""

    ACCEPTED = "accepted"  # the first one of its ordinal: journal it
    DUPLICATE = "duplicate"  # the ordinal has its group: acknowledge and forget
    UNKNOWN = "unknown"  # never leased, given up, or of an evaluation that is over: refuse


class Acceptance(NamedTuple):
    """The verdict on a finished group.

    superseded is the running lease of the same prompt, which is needless now: its holder should abandon it.
    """

    verdict: Verdict
    superseded: LeaseRecord | None = None


class Reconciled(NamedTuple):
    """What differs between the book's leases of one generator and those it says it works on."""

    lost: list[LeaseRecord]  # the generator does not know them: they are leased again
    unexpected: list[LeaseKey]  # not in the book as this generator's: adopt them or have them abandoned


@dataclass(frozen=True, slots=True)
class SavedLeases:
    """What a checkpoint holds of the lease book: all that it was told to train. Accepted groups are in the journal."""

    next_ordinal: int
    next_eval_ordinal: int
    settled: Frontier  # ordinals trained, given up, filtered or left out
    given_up: list[int]
    num_filtered: int
    failures: dict[int, int]  # ordinal -> strikes: failures that are held against the prompt
    num_left_out: int = 0


# How a lease may end without a word on its generator or its prompt: the generator died, left or was replaced, or an
# evaluation came under a weight swap.
NOBODYS_FAULT = frozenset({"released", "not_pinned"})


def first_attempt(run_epoch: int) -> int:
    """The number of the first attempt in `run_epoch`."""
    return (run_epoch - 1) * ATTEMPTS_PER_EPOCH


def run_epoch_of_attempt(attempt: int) -> int:
    """The run epoch in which an attempt was granted."""
    return attempt // ATTEMPTS_PER_EPOCH + 1


def blame(reason: str) -> bool:
    """Whether a failure may be the prompt's own doing, so that leasing it again for ever would wedge the run."""
    return reason in {"reward_error", "reward_timeout", "engine", "deadline", "expired"}


def is_beyond_help(strikes: Counter[str], failures: int, alone: bool) -> bool:
    """Whether a prompt is given up: it has these strikes by generator, and so many failures that may be its own.

    alone says of its newest failure that the generator failed on nothing else since its last success.
    """
    return (
        strikes.total() >= MAX_STRIKES
        or (len(strikes) > 1 and failures >= MAX_STRIKES)
        or (alone and failures >= MAX_LONE_FAILURES)
    )
