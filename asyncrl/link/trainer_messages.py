"""The trainer link's messages, grouped by direction: trainer ranks and the publisher to the desk, on one host.

And those of the publisher of rank 0 to the publishers of other ranks, where several ranks hold the policy together.

Frames and rules are those of `link.messages`. Both ends are processes of one learner: fields may change at any time.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from asyncrl.link.schema.field_rules import AtMost
from asyncrl.link.schema.message_base import Message, message
from asyncrl.link.weight_records import ChannelPlace, DeltaInfo, Placement, WeightManifest
from asyncrl.link.wire_types import (
    Canary,
    Count,
    Digest,
    Figures,
    Label,
    Milliseconds,
    Number,
    Port,
    Rank,
    Reason,
    Seconds,
    Size,
    Tag,
    Ticket,
    Times,
)

Epochs = Annotated[list[Number], AtMost(65_536)]
Held = Annotated[bytes, AtMost(2**31 - 1)]  # what passes through unread

# -- trainer ranks -> desk --------------------------------------------------------------------------------------------


@message(40)
class TrainerHello(Message):
    """A trainer rank is up, holding `version` from its checkpoint (0 = the initial model)."""

    rank: Rank
    world_size: Rank
    version: Number
    pid: Size
    placement: Placement = field(default_factory=Placement)  # of what sends weights


@message(41)
class BatchRequest(Message):
    """A rank wants its shard of the batch that makes `version` + 1. Repeated until answered."""

    rank: Rank
    version: Number


@message(42)
class StepDone(Message):
    """Version `version` exists. The metrics are sums and means of this step, as rank 0 sees them."""

    version: Number
    metrics: Figures
    step_s: Seconds
    time_s: Times  # by activity, since the process of this trainer began


@message(47)
class StepRollouts(Message):
    """Rollouts of the step that made `version`, which comes to be known right after: they are to be written.

    The desk passes them on unread (`report.rollouts.records.KeptRollout`); `ordinals` are those of their prompts.
    """

    version: Number
    ordinals: Annotated[list[Number], AtMost(4096)]
    rollouts: Annotated[list[Held], AtMost(4096)]


@message(43)
class SnapshotReady(Message):
    """The publisher holds a snapshot of `version`, ready to broadcast."""

    version: Number
    manifest: WeightManifest
    canary: Canary  # int32 token ids
    canary_logprobs: Canary  # float32, the learner's own
    snapshot_ms: Milliseconds
    delta: DeltaInfo | None = None  # what can be sent instead of everything


@message(44)
class ChannelReady(Message):
    """The publisher hosts the store of a new channel at this address; members may join."""

    channel_epoch: Number
    host: Label
    port: Port
    error: Reason
    backend: Tag = "gloo"
    version: Number | None = None  # offered last, and kept for this channel


@message(45)
class BroadcastDone(Message):
    """The broadcast of `version` in the channel ended; `error` is empty when every bucket went out."""

    version: Number
    attempt: Number
    channel_epoch: Number
    error: Reason
    transfer_ms: Milliseconds
    num_bytes: Count  # sent
    dense_bytes: Count = 0  # of all buckets
    encode_ms: Milliseconds = 0.0  # spent on making the delta of this version, sent or not


@message(46)
class CheckpointDone(Message):
    """A checkpoint of `version` is durable at `path`, or failed with `error`."""

    version: Number
    path: Annotated[str, AtMost(4096)]
    error: Reason
    seconds: Seconds


# -- desk -> trainer ranks --------------------------------------------------------------------------------------------


@message(60)
class TrainerWelcome(Message):
    """The trainer may start. Versions up to `replay_to` are trained again from the journal before new ones."""

    run_epoch: Number
    replay_to: Number


@message(61)
class Batch(Message):
    """One rank's shard of the groups that make `version` + 1, each the frame body of its GroupResult."""

    version: Number
    rank: Rank
    groups: Annotated[list[Held], AtMost(2**20)]
    desk_state: Held  # what the desk needs to resume after this step; goes into the checkpoint unread
    checkpoint: bool  # save after this step
    publish: bool  # False while versions are trained again from the journal


@message(62)
class OpenChannel(Message):
    """Host the store of channel `channel_epoch` for `world_size` ranks and answer ChannelReady.

    The snapshot offered last is kept for this channel until its next broadcast has ended.
    """

    channel_epoch: Number
    prefix: Label
    world_size: Rank
    timeout_s: Seconds
    backend: Tag = "gloo"


@message(63)
class Broadcast(Message):
    """Send the snapshot of `version` in channel `channel_epoch`, as soon as all of its ranks have joined.

    With a `base_version` only the difference to it is sent: every member has staged and verified the base.
    """

    version: Number
    attempt: Number
    channel_epoch: Number
    timeout_s: Seconds
    base_version: Number | None = None


@message(64)
class TrainerStop(Message):
    """Finish the step in hand, checkpoint if `checkpoint`, export if `export`, and exit 0."""

    checkpoint: bool
    export: bool
    reason: Reason


@message(65)
class SnapshotWanted(Message):
    """The publisher may offer a newer snapshot in place of `version`, the newest that the desk knows of.

    Repeated until a newer one comes. A publisher that has offered a newer one offers it again: the desk did not get it.
    """

    version: Number
    open_channels: Epochs | None = None  # epochs in use, all others are closed; None = not said


@message(66)
class CloseChannel(Message):
    """Nobody uses this channel any more: leave it, and break off what is sent in it."""

    channel_epoch: Number


# -- publishers of other ranks -> publisher of rank 0 -----------------------------------------------------------------


@message(80)
class SenderHello(Message):
    """The publisher of `rank` is up; `token` shows that it was invited."""

    rank: Rank
    token: Ticket


@message(81)
class ShardReady(Message):
    """What this rank holds of `version`: the digests of its buckets in order, and the difference to the base."""

    version: Number
    digests: Annotated[list[Digest], AtMost(2**20)]
    delta: DeltaInfo | None  # None: there is no base, or the difference would not pay
    encode_ms: Milliseconds


@message(82)
class ShardSent(Message):
    """The rank is through with a broadcast; `error` is empty when all members have every bucket."""

    version: Number
    attempt: Number
    channel_epoch: Number
    error: Reason
    transfer_ms: Milliseconds
    num_bytes: Count  # sent by this rank


# -- publisher of rank 0 -> publishers of other ranks -----------------------------------------------------------------


@message(90)
class PrepareShard(Message):
    """Answer ShardReady for `version`, which is or will be in slot `slot`."""

    version: Number
    slot: Size
    base_slot: Size | None  # to which the difference is made
    unread: Annotated[list[Size], AtMost(64)]  # slots whose differences nobody asks for any more


@message(91)
class JoinChannel(Message):
    """Join this channel as a sender when the first broadcast in it is ordered. CloseChannel ends it."""

    place: ChannelPlace
    timeout_s: Seconds


@message(92)
class SendShard(Message):
    """Take part in the broadcast of `version` from `slot`, and answer ShardSent; with a `delta` as the difference."""

    version: Number
    attempt: Number
    channel_epoch: Number
    slot: Size
    timeout_s: Seconds
    delta: DeltaInfo | None  # of all senders
