"""The rollout link's messages, grouped by direction: generator DEALER to desk ROUTER, possibly between hosts.

Each message is one frame (`link.codec`). Fields are only ever added at the end with a default. Counters are cumulative,
so a lost message is repaired by the next of its kind. The trainer link has its own, `link.trainer_messages`.

Durations are seconds relative to receipt: clocks of two hosts are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from asyncrl.link.schema.field_rules import AtMost, Line, Within
from asyncrl.link.schema.message_base import Message, RunMessage, message
from asyncrl.link.weight_records import BitsInUse, ChannelPlace, Placement, WeightManifest
from asyncrl.link.wire_types import (
    MAX_LEASES,
    MAX_ROLLOUTS,
    MAX_SPANS,
    MAX_WORKERS,
    SPAN_BYTES,
    BeatInterval,
    Canary,
    Count,
    Digest,
    FailureReason,
    Finite,
    FloatOrNaN,
    Label,
    LeaseName,
    NackCode,
    Name,
    Number,
    Payload,
    Reason,
    RefusalCode,
    Seconds,
    Settings,
    Size,
    SyncPhase,
    Tag,
    Text,
    Ticket,
    Times,
    Timings,
    Tokens,
    WorkerDigests,
)
from asyncrl.types import FinishReason, LeaseKey, LeaseKind

PROTOCOL_VERSION = 6


# -- records inside messages ------------------------------------------------------------------------------------------


class ActiveLease(NamedTuple):
    """A lease that a generator has in hand. Once its result waits in the outbox, `issued_version` is None."""

    kind: LeaseKind
    ordinal: Number
    attempt: Number
    issued_version: Number | None = None

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@dataclass(frozen=True, slots=True)
class WireRollout:
    """One completion of T tokens, see types.Rollout. Arrays are raw little-endian bytes."""

    tokens: Tokens  # int32 [T]
    logprobs: Tokens  # float32 [T]
    spans: Annotated[bytes, AtMost(SPAN_BYTES * MAX_SPANS)]  # int64 [number of spans, 3]: start, stop, version
    finish: FinishReason
    reward: FloatOrNaN  # a group whose rewards are not finite is refused as a whole, by name
    parts: Annotated[dict[Label, FloatOrNaN], AtMost(256)]


# -- generator -> desk ------------------------------------------------------------------------------------------------


@message(1)
class Hello(Message):
    """First message of a connection. The desk answers Welcome or Refusal."""

    protocol: Annotated[int, Within(0, 65_535)]
    generator_id: Name
    incarnation: Number  # +1 at each start of the same generator; fences the one before
    max_run_epoch: Number  # highest run epoch this generator has seen; 0 = none
    model_fingerprint: Tag
    tokenizer_fingerprint: Tag
    task: Annotated[str, Line(0, 4096)]  # import path of the task whose rewards it computes
    num_workers: Annotated[int, Within(1, MAX_WORKERS)]  # weight receivers: one per tensor-parallel rank
    first_unacked_seq: Number
    held_version: Number | None = None  # the version it last proved in this incarnation, if any
    instance: Tag = ""  # random per process: two processes under one id and incarnation are told apart
    settings: Settings = field(default_factory=list)  # what decides prompts and rewards on its side
    placement: Placement = field(default_factory=Placement)  # decides how weights can reach it


@message(2)
class Beat(RunMessage):
    """Progress, from the loop that does the work, as often as the desk asks (`Ack.beat_s`), and when room came up.

    A process that beats without progress is wedged.
    """

    sequences_wanted: Count  # cumulative: sequences leased to it in this run epoch plus those it has room for
    active: Annotated[list[ActiveLease], AtMost(MAX_LEASES)]
    tokens_generated: Count  # cumulative
    rollouts_completed: Count  # cumulative
    rewards_failed: Count  # cumulative
    busy_s: Seconds  # cumulative; these two are sums of parts of time_s
    idle_s: Seconds  # cumulative
    outbox_bytes: Count
    held_version: Number | None = None
    generations_failed: Count = 0  # cumulative
    ready: bool = True  # False while its engine starts: it takes neither weights nor leases yet
    sequences_received: Count = 0  # cumulative: the part of sequences_wanted that was leased to it
    # Of the leases in `active` that have an issued_version, in their order.
    tickets: Annotated[list[Ticket], AtMost(MAX_LEASES)] = field(default_factory=list)
    time_s: Times = field(default_factory=dict)  # cumulative, by activity: all of its time
    engine_step_ms: Timings = field(default_factory=dict)  # what a step of its engine takes, by part
    cpu_s: Seconds = 0.0  # cumulative, of all its processes


@message(3)
class GroupResult(Message):
    """One finished lease: a group, sent until it is acknowledged as durable."""

    seq: Number
    run_epoch: Number  # of the lease
    kind: LeaseKind
    ordinal: Number
    attempt: Number
    prompt: Tokens  # int32 [P], little-endian
    rollouts: Annotated[list[WireRollout], AtMost(MAX_ROLLOUTS)]
    baseline_reward: Finite | None = None  # of the greedy completion, where the lease asked for one
    ticket: Ticket = b""  # of the lease; without a valid one nothing is taken

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(4)
class LeaseFailed(Message):
    """One lease that ended without a group; acknowledged like a result, and leased again as a new attempt."""

    seq: Number
    run_epoch: Number
    kind: LeaseKind
    ordinal: Number
    attempt: Number
    reason: FailureReason
    detail: Reason
    ticket: Ticket = b""  # of the lease; without a valid one nothing changes

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(5)
class SyncReply(RunMessage):
    """A generator's answer in one phase of a weight sync. `error` is empty when the phase succeeded."""

    version: Number
    attempt: Number
    phase: SyncPhase
    error: Reason
    digests: WorkerDigests = field(default_factory=list)  # staged: per worker, per bucket
    canary_logprobs: Canary = field(default_factory=list)  # swapped: float32 per canary sequence
    timings_ms: Timings = field(default_factory=dict)
    in_use: Annotated[list[BitsInUse], AtMost(MAX_WORKERS)] = field(default_factory=list)  # swapped: per worker


@message(6)
class Bye(Message):
    """The generator leaves for good: nothing of this incarnation will follow."""

    reason: Reason


# -- desk -> generator ------------------------------------------------------------------------------------------------


@message(20)
class Welcome(RunMessage):
    """The generator is admitted. Limits it must keep to."""

    run_name: Label
    version: Number
    credit_bytes: Count  # see Ack
    acked_seq: Number  # see Ack
    beat_s: BeatInterval  # see Ack
    max_frame_bytes: Count


@message(21)
class Refusal(Message):
    """The generator is not admitted and should exit. `expected` and `got` name the values that differ."""

    code: RefusalCode
    reason: Reason
    expected: Reason
    got: Reason


@message(22)
class LeaseGrant(RunMessage):
    """One lease; see types.Lease."""

    kind: LeaseKind
    ordinal: Number
    attempt: Number
    issued_version: Number
    deadline_s: Annotated[float, Within(-1e12, 1e12)]
    prompt: Tokens  # int32 [P]
    payload: Payload
    num_rollouts: Size
    max_new_tokens: Size
    temperature: Annotated[float, Within(0.0, 2.0)]  # what engines sample at; 0 = greedy
    pinned_version: Number | None = None
    seed: Digest | None = None
    greedy_baseline: bool = False
    ticket: Ticket = b""  # proves that the lease was granted to this process of a generator; given back as it is
    user_text: Text = ""

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(23)
class Ack(RunMessage):
    """Results that are on the learner's disk, or refused. Cumulative, so the next one repairs a lost one."""

    acked_seq: Number  # everything up to and including this seq is durable, or refused: a Nack of it may be lost
    beyond: Annotated[list[Number], AtMost(4096)]  # single seqs above it of which the same is true
    credit_bytes: Count  # bytes of results that may be under way without an acknowledgement; 0 = send none for now
    beat_s: BeatInterval = 1.0  # seconds from one beat to the next: longer in a large fleet, see limits.beat_s


@message(24)
class Nack(RunMessage):
    """A result that will never be accepted: the generator drops it and counts it.

    With seq 0 and code HELLO it asks a peer that the desk does not know to say hello again.
    """

    seq: Number
    code: NackCode
    reason: Reason


@message(25)
class SyncOffer(RunMessage):
    """Phase 1 of a weight sync: join the channel, if not a member yet, and stage the weights."""

    version: Number
    attempt: Number
    channel: ChannelPlace
    manifest: WeightManifest
    timeout_s: Seconds


@message(26)
class SyncSwap(RunMessage):
    """Phase 2: every bucket arrived and verified; load the staged weights and score the canary sequences."""

    version: Number
    attempt: Number
    canary: Canary  # int32 token ids of each canary sequence
    timeout_s: Seconds


@message(27)
class SyncCommit(RunMessage):
    """Phase 3: the learner compared digests and canary; tokens of this version may now leave the generator."""

    version: Number
    attempt: Number


@message(28)
class SyncAbort(RunMessage):
    """The sync failed for this generator: drop what was staged; if weights were swapped they are tainted."""

    version: Number
    attempt: Number
    reason: Reason
    tainted: bool


@message(29)
class Stop(RunMessage):
    """The run is over (`finished`) or the learner goes away on purpose: drain, flush and exit, or wait for it."""

    finished: bool
    reason: Reason


@message(30)
class Abandon(RunMessage):
    """Stop working on these leases: they expired or were leased again."""

    leases: Annotated[list[LeaseName], AtMost(65_536)]
