"""What crosses a process boundary, grouped by direction.

Two links use these messages: the *rollout link* (generator DEALER to desk ROUTER, possibly between hosts) and the
*trainer link* (trainer ranks to desk on the same host). Each message is one frame (`link.codec`). Fields are only
ever added at the end with a default. Counters are cumulative, so a lost message is repaired by the next of its kind.

Durations are seconds relative to receipt: clocks of two hosts are never compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar, dataclass_transform

from asyncrl.link.weight_records import ChannelPlace, DeltaInfo, WeightManifest
from asyncrl.link.wire_types import FailureReason, FloatOrNaN, NackCode, Payload, RefusalCode, SyncPhase
from asyncrl.types import FinishReason, LeaseKey, LeaseKind

PROTOCOL_VERSION = 3

_REGISTRY: dict[int, type[Message]] = {}


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. `wire_code` goes into the frame header."""

    wire_code: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class RunMessage(Message):
    """Base of the messages that belong to one run epoch: to one life of the learner. See GeneratorSession.receive."""

    run_epoch: int


M = TypeVar("M", bound=Message)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message(code: int) -> Callable[[type[M]], type[M]]:
    """Class decorator: makes a frozen dataclass and registers it under `code`."""

    def register(cls: type[M]) -> type[M]:
        cls = dataclass(frozen=True, slots=True)(cls)
        cls.wire_code = code
        assert code not in _REGISTRY, f"message code {code} taken by {_REGISTRY[code].__name__}"
        _REGISTRY[code] = cls
        return cls

    return register


def message_types() -> dict[int, type[Message]]:
    """All message classes by code."""
    return dict(_REGISTRY)


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


# -- trainer ranks -> desk --------------------------------------------------------------------------------------------


@message(40)
class TrainerHello(Message):
    """A trainer rank is up, holding `version` from its checkpoint (0 = the initial model)."""

    rank: int
    world_size: int
    version: int
    pid: int


@message(41)
class BatchRequest(Message):
    """A rank wants its shard of the batch that makes `version` + 1. Repeated until answered."""

    rank: int
    version: int


@message(42)
class StepDone(Message):
    """Version `version` exists. The metrics are sums and means of this step, as rank 0 sees them."""

    version: int
    metrics: dict[str, float]
    step_s: float
    idle_s: float  # waiting for the batch


@message(43)
class SnapshotReady(Message):
    """The publisher holds a snapshot of `version`, ready to broadcast."""

    version: int
    manifest: WeightManifest
    canary: list[bytes]  # int32 token ids
    canary_logprobs: list[bytes]  # float32, the learner's own
    snapshot_ms: float
    delta: DeltaInfo | None = None  # what can be sent instead of everything


@message(44)
class ChannelReady(Message):
    """The publisher hosts the store of a new channel at this address; members may join."""

    channel_epoch: int
    host: str
    port: int
    error: str
    backend: str = "gloo"
    version: int | None = None  # offered last, and kept for this channel


@message(45)
class BroadcastDone(Message):
    """The broadcast of `version` in the channel ended; `error` is empty when every bucket went out."""

    version: int
    attempt: int
    channel_epoch: int
    error: str
    transfer_ms: float
    num_bytes: int  # sent
    dense_bytes: int = 0  # of all buckets
    encode_ms: float = 0.0  # spent on making the delta of this version, sent or not


@message(46)
class CheckpointDone(Message):
    """A checkpoint of `version` is durable at `path`, or failed with `error`."""

    version: int
    path: str
    error: str
    seconds: float


# -- desk -> trainer ranks --------------------------------------------------------------------------------------------


@message(60)
class TrainerWelcome(Message):
    """The trainer may start. Versions up to `replay_to` are trained again from the journal before new ones."""

    run_epoch: int
    replay_to: int


@message(61)
class Batch(Message):
    """One rank's shard of the groups that make `version` + 1, each the frame body of its GroupResult."""

    version: int
    rank: int
    groups: list[bytes]
    desk_state: bytes  # what the desk needs to resume after this step; goes into the checkpoint unread
    checkpoint: bool  # save after this step
    publish: bool  # False while versions are trained again from the journal


@message(62)
class OpenChannel(Message):
    """Host the store of channel `channel_epoch` for `world_size` ranks and answer ChannelReady.

    The snapshot offered last is kept for this channel until its next broadcast has ended.
    """

    channel_epoch: int
    prefix: str
    world_size: int
    timeout_s: float


@message(63)
class Broadcast(Message):
    """Send the snapshot of `version` in channel `channel_epoch`, as soon as all of its ranks have joined.

    With a `base_version` only the difference to it is sent: every member has staged and verified the base.
    """

    version: int
    attempt: int
    channel_epoch: int
    timeout_s: float
    base_version: int | None = None


@message(64)
class TrainerStop(Message):
    """Finish the step in hand, checkpoint if `checkpoint`, export if `export`, and exit 0."""

    checkpoint: bool
    export: bool
    reason: str


@message(65)
class SnapshotWanted(Message):
    """The publisher may offer a newer snapshot in place of `version`, the newest that the desk knows of.

    Repeated until a newer one comes. A publisher that has offered a newer one offers it again: the desk did not get it.
    """

    version: int
    open_channels: list[int] | None = None  # epochs in use, all others are closed; None = not said


@message(66)
class CloseChannel(Message):
    """Nobody uses this channel any more: leave it, and break off what is sent in it."""

    channel_epoch: int
