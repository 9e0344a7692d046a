"""What the sync planner knows (receivers, members, cells) and what it asks for (outputs)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from asyncrl.link.schema.message_base import Message
from asyncrl.link.weight_records import Placement

MEAN_SHARE = 0.25  # of the canary's tolerance, for the mean over its tokens


@dataclass(slots=True)
class Receiver:
    """A generator as the planner knows it. `held_version` is what it proved, None before that."""

    name: str
    incarnation: int
    num_workers: int
    held_version: int | None = None
    held_attempt: int = 0  # in which it proved `held_version`
    held_digests: tuple[int, ...] | None = None  # of `held_version`: another trainer's may have other bytes
    committed_at: float = 0.0
    staged_version: int | None = None  # verified in its staging buffer: what a delta may start from
    busy: bool = False  # must not be swapped now: it runs a pinned evaluation
    faults: int = 0  # rounds in a row that failed by its doing: no answer, wrong digests, a taint
    errors: int = 0  # rounds in a row that it answered with an error, its own or a victim's
    taints: int = 0
    excluded_until: float = 0.0
    left_to_canary: tuple[str, ...] = ()  # what of its engine cannot be compared with the staged bits
    placement: Placement = field(default_factory=Placement)
    backend: str = "gloo"  # of its channels
    on_gpu: bool = False  # it or the learner computes on one: the limit of its canary

    @property
    def failed(self) -> bool:
        """Its last round went wrong."""
        return self.faults > 0 or self.errors > 0


class Phase(StrEnum):
    """Where a member stands in its round. The values of STAGING and SWAPPING are the phases of its replies."""

    STAGING = "stage"
    STAGED = "staged"
    SWAPPING = "swap"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(slots=True)
class Member:
    """A receiver's part in one round."""

    receiver: Receiver
    rank: int  # of its first worker
    phase: Phase
    deadline: float
    asked_at: float = 0.0  # for its answer in this phase
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The generator's name."""
        return self.receiver.name

    @property
    def ranks(self) -> str:
        """The ranks of its workers in the channel, in words."""
        last = self.rank + self.receiver.num_workers - 1
        return f"rank {self.rank}" if last == self.rank else f"ranks {self.rank} to {last}"


@dataclass(frozen=True, slots=True)
class OpenedChannel:
    """A weight channel whose store listens at `host` and `port`, and the generators that may use it."""

    epoch: int
    host: str
    port: int
    backend: str
    incarnations: dict[str, int]  # by name


@dataclass(slots=True)
class Cell:
    """Generators that take new versions together, over one weight channel."""

    names: list[str]
    channel: OpenedChannel | None = None  # kept from round to round while nothing changes and nothing fails


@dataclass(frozen=True, slots=True)
class SyncRules:
    """What all rounds have in common."""

    run_epoch: int
    run_name: str
    timeout_s: float
    tolerance: float  # largest log-prob difference on the canary, in nats
    gpu_tolerance: float  # the same where one of both ends computes on a GPU

    def tolerances(self, on_gpu: bool) -> tuple[float, float]:
        """Largest difference and largest mean of them. Of differences that are rounding, few come near the largest."""
        largest = self.gpu_tolerance if on_gpu else self.tolerance
        return largest, largest * MEAN_SHARE


@dataclass(frozen=True, slots=True)
class ToPublisher:
    """The desk is to send this to the trainer's publisher."""

    message: Message


@dataclass(frozen=True, slots=True)
class ToGenerator:
    """The desk is to send this to the generator `name`."""

    name: str
    message: Message


@dataclass(frozen=True, slots=True)
class Committed:
    """`name` proved `version`. The differences are those of the canary's log-probs, absolute, in nats."""

    name: str
    incarnation: int
    version: int
    attempt: int
    total_ms: float
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
    remedy: str = ""
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Weights cannot reach `name` as things are placed: it is sent away, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundEnded:
    """Every member of the round committed or failed, and the publisher is through with it."""

    version: int
    total_ms: float
    transfer_ms: float
    num_bytes: int
    committed: tuple[Committed, ...]
    failed: tuple[str, ...]  # names
    snapshot_ms: float = 0.0
    base_version: int | None = None  # of the delta that was sent; None = everything was
    dense_bytes: int = 0
    encode_ms: float = 0.0
    retries: int = 0  # rounds in a row that had failed before for the most unlucky of its members
    catch_up: bool = False  # of newcomers or of who failed, beside the cells


Output = ToPublisher | ToGenerator | Committed | SyncFailed | Unreachable | RoundEnded
