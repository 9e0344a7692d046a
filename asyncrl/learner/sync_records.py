"""What the sync planner knows (receivers, members, rounds) and what it asks for (outputs)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.transport.messages import Message


@dataclass(slots=True)
class Receiver:
    """A generator as the planner knows it. `held_version` is what it proved, None before that."""

    name: str
    incarnation: int
    num_workers: int
    held_version: int | None = None
    staged_version: int | None = None  # what its staging buffer holds, verified; deltas start from it
    busy: bool = False  # must not be swapped now: it runs a pinned evaluation
    silences: int = 0  # rounds in a row in which it did not answer or was tainted
    errors: int = 0  # rounds in a row that it answered with an error, its own or a victim's
    taints: int = 0
    excluded_until: float = 0.0


class Phase(StrEnum):
    STAGING = "stage"
    STAGED = "staged"
    SWAPPING = "swap"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(slots=True)
class Member:
    """A receiver's part in one round."""

    name: str
    incarnation: int
    rank: int
    phase: Phase
    deadline: float
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Round:
    """One attempt to bring one snapshot to some members."""

    version: int
    attempt: int
    group_epoch: int
    world_size: int
    members: dict[str, Member]
    started: float
    opening_deadline: float | None  # None once the group is open
    broadcast_deadline: float
    broadcast_done: bool = False
    broken: bool = False  # something failed in the collective; its group is not used again
    base_version: int | None = None  # sent as the difference to this version; None = all of it
    transfer_ms: float = 0.0
    num_bytes: int = 0
    dense_bytes: int = 0
    encode_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class ToPublisher:
    message: Message


@dataclass(frozen=True, slots=True)
class ToGenerator:
    name: str
    message: Message


@dataclass(frozen=True, slots=True)
class Committed:
    """`name` proved `version`. Times in milliseconds; the canary's log-prob differences are absolute, in nats."""

    name: str
    version: int
    attempt: int
    total_ms: float
    transfer_ms: float
    num_bytes: int
    canary_max_diff: float
    canary_mean_diff: float
    timings_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class SyncFailed:
    """`name` did not get `version` in this attempt; `fatal` when it was tainted too often to go on."""

    name: str
    version: int
    phase: str
    reason: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """Every member of the round committed or failed, and the publisher is free."""

    version: int
    total_ms: float
    transfer_ms: float
    num_bytes: int
    num_committed: int
    num_failed: int
    base_version: int | None = None  # of the delta that was sent; None = all of the weights
    dense_bytes: int = 0
    encode_ms: float = 0.0


Output = ToPublisher | ToGenerator | Committed | SyncFailed | RoundEnded
