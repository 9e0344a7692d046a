"""The rollout link's messages, grouped by direction: generator DEALER to desk ROUTER, possibly between hosts.

Each message is one frame (`link.codec`). Fields are only ever added at the end with a default. Counters are cumulative,
so a lost message is repaired by the next of its kind. The trainer link has its own, `link.trainer_messages`.

Durations are seconds relative to receipt: clocks of two hosts are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from asyncrl.link.schema.message_base import Message, RunMessage, message
from asyncrl.link.weight_records import ChannelPlace, WeightManifest
from asyncrl.link.wire_types import FailureReason, FloatOrNaN, NackCode, Payload, RefusalCode, SyncPhase
from asyncrl.types import FinishReason, LeaseKey, LeaseKind, Setting

PROTOCOL_VERSION = 4


# -- records inside messages ------------------------------------------------------------------------------------------


class ActiveLease(NamedTuple):
    """A lease that a generator has in hand. Once its result waits in the outbox, `issued_version` is None."""

    kind: LeaseKind
    ordinal: int
    attempt: int
    issued_version: int | None = None

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@dataclass(frozen=True, slots=True)
class WireRollout:
    """One completion of T tokens, see types.Rollout. Arrays are raw little-endian bytes."""

    tokens: bytes  # int32 [T]
    logprobs: bytes  # float32 [T]
    spans: bytes  # int64 [number of spans, 3]: start, stop, version
    finish: FinishReason
    reward: FloatOrNaN  # a group whose rewards are not finite is refused as a whole, by name
    parts: dict[str, float]


# -- generator -> desk ------------------------------------------------------------------------------------------------


@message(1)
class Hello(Message):
    """First message of a connection. The desk answers Welcome or Refusal."""

    protocol: int
    generator_id: str
    incarnation: int  # +1 at each start of the same generator; fences the one before
    max_run_epoch: int  # highest run epoch this generator has seen; 0 = none
    model_fingerprint: str
    tokenizer_fingerprint: str
    task: str  # import path of the task whose rewards it computes
    num_workers: int  # weight receivers: one per tensor-parallel rank
    first_unacked_seq: int
    held_version: int | None = None  # the version it last proved in this incarnation, if any
    instance: str = ""  # random per process: two processes under one id and incarnation are told apart
    settings: list[Setting] = field(default_factory=list)  # what decides prompts and rewards on its side


@message(2)
class Beat(RunMessage):
    """Progress, once a second, from the loop that does the work. A process that beats without progress is wedged."""

    sequences_wanted: int  # cumulative: sequences leased to it in this run epoch plus those it has room for
    active: list[ActiveLease]
    tokens_generated: int  # cumulative
    rollouts_completed: int  # cumulative
    rewards_failed: int  # cumulative
    busy_s: float  # cumulative seconds with at least one sequence in the engine
    idle_s: float  # cumulative seconds without
    outbox_bytes: int
    held_version: int | None = None
    generations_failed: int = 0  # cumulative
    ready: bool = True  # False while its engine starts: it takes neither weights nor leases yet
    sequences_received: int = 0  # cumulative: the part of sequences_wanted that was leased to it


@message(3)
class GroupResult(Message):
    """One finished lease: a group, sent until it is acknowledged as durable."""

    seq: int
    run_epoch: int  # of the lease
    kind: LeaseKind
    ordinal: int
    attempt: int
    prompt: bytes  # int32 [P], little-endian
    rollouts: list[WireRollout]
    baseline_reward: float | None = None  # of the greedy completion, where the lease asked for one

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(4)
class LeaseFailed(Message):
    """One lease that ended without a group; acknowledged like a result, and leased again as a new attempt."""

    seq: int
    run_epoch: int
    kind: LeaseKind
    ordinal: int
    attempt: int
    reason: FailureReason
    detail: str

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(5)
class SyncReply(RunMessage):
    """A generator's answer in one phase of a weight sync. `error` is empty when the phase succeeded."""

    version: int
    attempt: int
    phase: SyncPhase
    error: str
    digests: list[list[int]] = field(default_factory=list)  # staged: per worker, per bucket
    canary_logprobs: list[bytes] = field(default_factory=list)  # swapped: float32 per canary sequence
    timings_ms: dict[str, float] = field(default_factory=dict)


@message(6)
class Bye(Message):
    """The generator leaves for good: nothing of this incarnation will follow."""

    reason: str


# -- desk -> generator ------------------------------------------------------------------------------------------------


@message(20)
class Welcome(RunMessage):
    """The generator is admitted. Limits it must keep to."""

    run_name: str
    version: int
    credit_bytes: int  # see Ack
    acked_seq: int  # highest seq below which all is durable
    beat_s: float  # limits.BEAT_S of the learner; read by nobody, kept for the fields behind it
    max_frame_bytes: int


@message(21)
class Refusal(Message):
    """The generator is not admitted and should exit. `expected` and `got` name the values that differ."""

    code: RefusalCode
    reason: str
    expected: str
    got: str


@message(22)
class LeaseGrant(RunMessage):
    """One lease; see types.Lease."""

    kind: LeaseKind
    ordinal: int
    attempt: int
    issued_version: int
    deadline_s: float
    prompt: bytes  # int32 [P]
    payload: Payload
    num_rollouts: int
    max_new_tokens: int
    temperature: float
    pinned_version: int | None = None
    seed: int | None = None
    greedy_baseline: bool = False

    @property
    def key(self) -> LeaseKey:
        """The name of the lease."""
        return LeaseKey(self.kind, self.ordinal, self.attempt)


@message(23)
class Ack(RunMessage):
    """Results that are on the learner's disk. Cumulative, so the next one repairs a lost one."""

    acked_seq: int  # everything up to and including this seq is durable
    beyond: list[int]  # single seqs above it that are durable too
    credit_bytes: int  # bytes of results that may be under way without an acknowledgement; 0 = send none for now


@message(24)
class Nack(RunMessage):
    """A result that will never be accepted: the generator drops it and counts it.

    With seq 0 and code HELLO it asks a peer that the desk does not know to say hello again.
    """

    seq: int
    code: NackCode
    reason: str


@message(25)
class SyncOffer(RunMessage):
    """Phase 1 of a weight sync: join the channel, if not a member yet, and stage the weights."""

    version: int
    attempt: int
    channel: ChannelPlace
    manifest: WeightManifest
    timeout_s: float


@message(26)
class SyncSwap(RunMessage):
    """Phase 2: every bucket arrived and verified; load the staged weights and score the canary sequences."""

    version: int
    attempt: int
    canary: list[bytes]  # int32 token ids of each canary sequence
    timeout_s: float


@message(27)
class SyncCommit(RunMessage):
    """Phase 3: the learner compared digests and canary; tokens of this version may now leave the generator."""

    version: int
    attempt: int


@message(28)
class SyncAbort(RunMessage):
    """The sync failed for this generator: drop what was staged; if weights were swapped they are tainted."""

    version: int
    attempt: int
    reason: str
    tainted: bool


@message(29)
class Stop(RunMessage):
    """The run is over (`finished`) or the learner goes away on purpose: drain, flush and exit, or wait for it."""

    finished: bool
    reason: str


@message(30)
class Abandon(RunMessage):
    """Stop working on these leases: they expired or were leased again."""

    leases: list[LeaseKey]
