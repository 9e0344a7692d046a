"""Takes snapshots of the policy and has them broadcast, in threads beside the training loop.

Flat staging buffers, each as large as the policy in its wire dtype, made when they are first needed:

    fresh     takes the next snapshot
    offered   the newest that the desk knows of; channels send from it
    base      what was sent before it, so that it can go out as the difference: only where a sample of both says that
              this would pay. A run whose weights all change at every step (float32 on the wire) has none.
    older     still on the wire in a channel that is slow or stalled

The training loop pays for one memory copy, and for the canary's forward pass, whose result comes with each version:
digests, deltas and the network are left to the threads. When steps are faster than syncs, a fresh snapshot that was
never offered is overwritten by the next: the newest policy wins. With MAX_BUFFERS in use the next offer waits until a
channel has ended by its deadline.

Where several ranks hold the policy, each has buffers for what it holds and sends it itself (`shard_publisher`). Rank 0
decides for all of them which buffer is for what, and tells them by the `relay`; it puts their digests together and
takes their reports. Nothing here is a collective: no sender can hold up a step. A rank that falls silent ends the
publisher, and with it the trainer: the desk starts all ranks again.

Order matters in one place: a buffer changes its role only in `_rotate`, under the lock, only after the desk said that
a newer snapshot is wanted, and never while a channel sends from it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque

import numpy as np

from asyncrl.errors import AsyncRLError, RankLost
from asyncrl.link.schema.message_base import Message
from asyncrl.link.trainer_link import TrainerLink
from asyncrl.link.trainer_messages import (
    Broadcast,
    BroadcastDone,
    ChannelReady,
    CloseChannel,
    JoinChannel,
    OpenChannel,
    PrepareShard,
    SendShard,
    ShardReady,
    ShardSent,
    SnapshotReady,
    SnapshotWanted,
)
from asyncrl.link.weight_records import ChannelPlace, ChannelSpec
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE
from asyncrl.weights.bytes.delta import delta_pays, encode_delta, join_deltas
from asyncrl.weights.bytes.memory import own_stream
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import WeightStore
from asyncrl.weights.relay import Relay
from asyncrl.weights.sender import ChannelSender, Sending, Sent, parts_of
from asyncrl.weights.slots import Slot

log = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0
MAX_BUFFERS = 5  # fresh, offered, base, and two that stalled channels hold on to
JOIN_TIMEOUT_S = 60.0  # for the other senders to come
ANSWER_TIMEOUT_S = 60.0  # for what another sender is asked: it reads its buffers once or twice for that
REPORT_SLACK_S = 5.0  # after a broadcast's deadline, by which every sender has given it up


class Publisher(threading.Thread):
    """Rank 0's part in the weight plane. The training loop calls `publish`, everything else runs in the thread.

    Args:
        desk_address: where the desk listens for the trainer.
        buffer: takes snapshots of the policy; more like it are made when they are needed.
        canary: token sequences that every receiver scores after a swap, int32 each.
        host: address of this machine at which receivers meet the publisher.
        port: one port at which all channels meet, kept as long as the publisher lives; 0 = any, one for each channel.
        idle_wait_s: the first offer is repeated at this interval until the desk has answered one.
        relay: to the other senders, where there are some; it is closed with the publisher.
    """

    def __init__(
        self,
        desk_address: str,
        buffer: SnapshotBuffer,
        canary: list[np.ndarray],
        *,
        host: str,
        port: int = 0,
        idle_wait_s: float = IDLE_WAIT_S,
        relay: Relay | None = None,
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        self._desk_address = desk_address
        self._relay = relay
        self._num_senders = 1 if relay is None else relay.senders
        assert buffer.layout.num_senders <= self._num_senders, "every sender is told what to do"
        self._fresh, self._offered = Slot(0, buffer), Slot(1, buffer.twin())
        self._base: Slot | None = None  # what `_offered` was compared with, or will be if it is not sent
        self._slots = [self._fresh, self._offered]
        self._wanted = True  # the desk takes a newer snapshot
        self._last_offer: SnapshotReady | None = None
        self._heard = False  # the desk has answered an offer: from then on it asks for what it did not get
        self._canary = [tokens.astype(TOKEN_DTYPE) for tokens in canary]
        self._host = host
        self._port = port
        self._store: WeightStore | None = None  # of all channels, where the port is given
        self._idle_wait_s = idle_wait_s
        self._senders: dict[int, ChannelSender] = {}  # by channel epoch
        self._kept: dict[int, Slot] = {}  # what a channel sends or will send, by channel epoch
        self._sending: dict[int, Sending] = {}  # by channel epoch
        self._ready: dict[int, ShardReady] = {}  # by rank: what the other senders hold of the version to be offered
        self._sent: deque[Sent] = deque()  # reports of the senders' threads
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self.crash: BaseException | None = None

    def begin(self) -> int:
        """The slot that the next snapshot goes to: the other senders must be told. Its content is given up."""
        with self._lock:
            self._fresh.version = None
            return self._fresh.number

    def publish(self, version: int, canary_logprobs: list[np.ndarray]) -> None:
        """Snapshots the parameters as `version`; the caller waits for the copy.

        `canary_logprobs` are those of the canary under the very parameters, float32, one row for each sequence.
        """
        assert len(canary_logprobs) == len(self._canary), "a row for each sequence of the canary"
        started = time.monotonic()
        with self._lock:
            self._fresh.buffer.snapshot()
            self._fresh.version = version
            self._fresh.canary_logprobs = canary_logprobs
            self._fresh.snapshot_ms = (time.monotonic() - started) * 1e3
        self._wake_up()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; broadcasts under way are aborted."""
        self._stopping.set()
        self._wake_up()
        self.join(timeout_s)

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """The thread. What ends it before `stop` is left in `crash`, which the training loop looks at."""
        try:
            with own_stream(self._fresh.buffer.flat.device):
                self._work()
        except BaseException as error:  # whatever it is, the training loop must end with it
            self.crash = error
            log.exception("publisher thread died")
        finally:
            if self._relay is not None:
                self._relay.close()

    def _work(self) -> None:
        link = TrainerLink(self._desk_address, wake_fd=self._wake)  # here: a socket belongs to one thread
        if self._relay is not None:
            self._relay.accept(JOIN_TIMEOUT_S, self._wake_up)
        while not self._stopping.is_set():
            self._offer_fresh(link)
            if (message := link.receive(self._idle_wait_s)) is not None:
                self._heard = True
                self._handle(link, message)
            elif not self._heard:
                self._offer_again(link)
            self._take_reports(link)
        for channel_epoch in list(self._senders):
            self._close(channel_epoch)
        if self._store is not None:
            self._store.close()
        link.close()

    def _offer_fresh(self, link: TrainerLink) -> None:
        if not self._rotate():
            return
        # Outside the lock: digests take as long as reading the buffer, and the training loop may want to snapshot.
        slot = self._offered
        assert slot.version is not None
        self._tell_to_prepare(slot)
        digests = slot.buffer.digests()
        self._encode()
        others = self._hear_of_shards(slot.version)
        manifest = slot.buffer.manifest(slot.version, [digests, *(shard.digests for shard in others)])
        slot.encode_ms = max([slot.encode_ms, *(shard.encode_ms for shard in others)])
        deltas = [None if slot.delta is None else slot.delta.info, *(shard.delta for shard in others)]
        deltas = deltas[: manifest.layout.num_senders]  # the last ranks may hold nothing of what is trained
        present = [delta for delta in deltas if delta is not None]
        slot.delta_info = join_deltas(present) if len(present) == len(deltas) else None
        canary = [tokens.tobytes() for tokens in self._canary]
        rows = [row.astype(LOGPROB_DTYPE).tobytes() for row in slot.canary_logprobs]
        self._last_offer = SnapshotReady(slot.version, manifest, canary, rows, slot.snapshot_ms, slot.delta_info)
        link.send(self._last_offer)

    def _tell_to_prepare(self, slot: Slot) -> None:
        """The other senders measure and encode at the same time as this one."""
        if self._relay is not None:
            assert slot.version is not None
            base = None if self._base is None else self._base.number
            unread = [each.number for each in self._slots if not each.readers]
            order = PrepareShard(slot.version, slot.number, base, unread)
            self._ready.clear()
            self._relay.tell(lambda rank: order)  # also those that hold nothing: all go in step

    def _hear_of_shards(self, version: int) -> list[ShardReady]:
        """What the other senders hold of `version`, by rank. Raises RankLost, which names who is late."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while missing := sorted(set(range(1, self._num_senders)) - self._ready.keys()):
            if time.monotonic() > deadline:
                raise RankLost(
                    f"publisher of rank {', '.join(map(str, missing))} did not prepare version {version} within "
                    f"{ANSWER_TIMEOUT_S:g} s"
                )
            self._hear(deadline - time.monotonic())
        return [self._ready[rank] for rank in range(1, self._num_senders)]

    def _hear(self, timeout_s: float = 0.0) -> bool:
        """Takes a message of another sender. False when there is none. Raises RankLost when one of them is gone."""
        if self._relay is None or (heard := self._relay.take(timeout_s)) is None:
            return False
        rank, message = heard
        match message:
            case ShardReady():
                self._ready[rank] = message
            case ShardSent():
                sending = self._sending.get(message.channel_epoch)
                if sending is not None and (message.version, message.attempt) == (
                    sending.order.version,
                    sending.order.attempt,
                ):
                    self._sent.append(
                        Sent(
                            message.channel_epoch,
                            sending.order,
                            message.error,
                            message.transfer_ms,
                            message.num_bytes,
                            rank,
                        )
                    )
            case _:
                log.warning("publisher got an unexpected %s of rank %d", type(message).__name__, rank)
        return True

    def _offer_again(self, link: TrainerLink) -> None:
        if self._last_offer is not None:
            link.send(self._last_offer)

    def _rotate(self) -> bool:
        """Makes the fresh snapshot the offered one, if it is wanted and a buffer is left for the next."""
        if not self._wanted or not self._has_fresh():
            return False
        sent = self._offered if self._offered.sent else self._base
        with self._lock:
            pays = sent is not None and delta_pays(sent.buffer.layout, sent.buffer.flat, self._fresh.buffer.flat)
        base = sent if pays else None
        following = self._free_slot(base)
        if following is None:
            return False
        with self._lock:
            if not self._has_fresh():
                return False  # `begin` has given it up meanwhile
            self._base = base
            self._offered = self._fresh
            self._fresh = following
            self._fresh.version = None
            self._fresh.sent = False
        self._wanted = False
        for slot in self._slots:
            if not slot.readers:
                slot.forget_delta()
        return True

    def _has_fresh(self) -> bool:
        return self._fresh.version is not None

    def _free_slot(self, base: Slot | None) -> Slot | None:
        """A buffer that nothing needs once the fresh snapshot is offered; a new buffer if there is none."""
        for slot in self._slots:
            if slot is not self._fresh and slot is not base and not slot.readers:
                return slot
        if len(self._slots) >= MAX_BUFFERS:
            return None
        # Not under the lock: filling it with zeros takes as long as a snapshot, which may have to go on.
        slot = Slot(len(self._slots), self._fresh.buffer.twin())
        self._slots.append(slot)
        return slot

    def _encode(self) -> None:
        """Encodes the difference from base to offered, where there is a base and it takes at most half of all bytes."""
        old, new = self._base, self._offered
        new.encode_ms = 0.0
        new.forget_delta()
        if old is None:
            return
        assert old.version is not None
        started = time.monotonic()
        new.delta = encode_delta(new.buffer.layout, old.buffer.flat, new.buffer.flat, old.version)
        new.encode_ms = (time.monotonic() - started) * 1e3

    def _handle(self, link: TrainerLink, message: Message) -> None:
        match message:
            case SnapshotWanted():
                self._want_newer(link, message)
            case OpenChannel():
                link.send(self._open(message))
            case Broadcast():
                if failure := self._send(message):
                    if message.channel_epoch not in self._sending:
                        self._release(message.channel_epoch)
                    self._tell(link, Sent(message.channel_epoch, message, failure), 0.0)
            case CloseChannel():
                self._close(message.channel_epoch)
            case _:
                log.warning("publisher got an unexpected %s", type(message).__name__)

    def _want_newer(self, link: TrainerLink, wanted: SnapshotWanted) -> None:
        if wanted.version == self._offered.version:
            self._wanted = True
        elif self._last_offer is not None and wanted.version < self._last_offer.version:
            self._offer_again(link)
        if wanted.open_channels is not None:
            for channel_epoch in self._senders.keys() - set(wanted.open_channels):
                self._close(channel_epoch)

    def _open(self, request: OpenChannel) -> ChannelReady:
        spec = ChannelSpec(
            store_host=self._host,
            store_port=0,
            prefix=request.prefix,
            rank=0,
            world_size=request.world_size,
            backend=request.backend,
            timeout_s=request.timeout_s,
            num_senders=self._offered.buffer.layout.num_senders,
        )
        # Over ipc a closed store is what tells a channel's members of its end: each needs its own.
        shared = self._port if request.backend != "ipc" else 0
        try:
            if shared and self._store is None:
                self._store = WeightStore(self._host, shared)
            store = self._store if shared else None
            channel = WeightChannel.host(spec, self._offered.buffer.flat.device, shared_store=store)
        except (AsyncRLError, OSError) as error:
            return ChannelReady(request.channel_epoch, self._host, 0, str(error), request.backend)
        self._keep(request.channel_epoch)
        sender = self._senders[request.channel_epoch] = ChannelSender(channel, request.channel_epoch, self._report)
        sender.start()
        if self._relay is not None:
            self._relay.tell(lambda rank: _invitation(request, channel.spec, rank))
        version = self._offered.version
        return ChannelReady(request.channel_epoch, self._host, channel.store_port, "", request.backend, version)

    def _send(self, request: Broadcast) -> str:
        """Hands the broadcast to its channel's thread. Returns why that is impossible, if it is."""
        sender = self._senders.get(request.channel_epoch)
        if sender is None:
            return f"channel {request.channel_epoch} is not open"
        if request.channel_epoch in self._sending:
            return f"channel {request.channel_epoch} still sends version {self._kept[request.channel_epoch].version}"
        if request.channel_epoch not in self._kept:
            self._keep(request.channel_epoch)
        slot = self._kept[request.channel_epoch]
        if slot.version != request.version:
            return f"version {request.version} was replaced by {slot.version}"
        delta = None if request.base_version is None else slot.delta_info
        if delta is None and request.base_version is None:
            parts = parts_of(slot.buffer)
        elif delta is None or slot.delta is None or delta.base_version != request.base_version:
            return f"there is no delta from version {request.base_version} to {request.version}"
        else:
            parts = parts_of(slot.buffer, delta, slot.delta.payload)
        ranks = set(range(slot.buffer.layout.num_senders))
        overdue_at = time.monotonic() + request.timeout_s + REPORT_SLACK_S
        self._sending[request.channel_epoch] = Sending(request, ranks, overdue_at)
        sender.send(request, parts)
        if self._relay is not None:
            epoch, timeout_s = request.channel_epoch, request.timeout_s
            order = SendShard(request.version, request.attempt, epoch, slot.number, timeout_s, delta)
            self._relay.tell(lambda rank: order if rank in ranks else None)
        return ""

    def _report(self, sent: Sent) -> None:
        """Takes a report; runs in the thread of its sender."""
        self._sent.append(sent)
        self._wake_up()

    def _take_reports(self, link: TrainerLink) -> None:
        """Of this sender and the others. Raises RankLost when one of them is gone, or silent for too long."""
        while self._hear():
            pass
        while self._sent:
            self._take_report(link, self._sent.popleft())
        now = time.monotonic()
        for sending in self._sending.values():
            if now > sending.overdue_at and sending.waiting - {0}:
                names = ", ".join(map(str, sorted(sending.waiting)))
                raise RankLost(
                    f"sender {names} did not say how its part of version {sending.order.version} ended, "
                    f"{REPORT_SLACK_S:g} s after the deadline"
                )

    def _take_report(self, link: TrainerLink, sent: Sent) -> None:
        """A broadcast ended at a sender, or a channel was closed here."""
        sending = self._sending.get(sent.channel_epoch)
        if sent.order is None:
            if sending is None:
                self._release(sent.channel_epoch)
            return
        if sending is None or sent.order is not sending.order:
            return
        sending.waiting.discard(sent.rank)
        sending.reports.append(sent)
        slot = self._kept[sent.channel_epoch]
        result = sending.result()
        if result is not None and not sending.told:
            sending.told = True
            slot.sent |= not result.error
            self._tell(link, result, slot.encode_ms)
        if not sending.waiting:  # nobody reads its memory any more
            del self._sending[sent.channel_epoch]
            self._release(sent.channel_epoch)
            by_rank = {report.rank: report.num_bytes for report in sending.reports}
            log.debug("version %d: bytes sent by each rank: %s", sent.order.version, dict(sorted(by_rank.items())))

    def _tell(self, link: TrainerLink, sent: Sent, encode_ms: float) -> None:
        order = sent.order
        assert order is not None
        done = BroadcastDone(
            order.version,
            order.attempt,
            order.channel_epoch,
            sent.error,
            sent.transfer_ms,
            sent.num_bytes,
            self._offered.buffer.layout.total_bytes,
            encode_ms,
        )
        link.send(done)

    def _release(self, channel_epoch: int) -> None:
        if (slot := self._kept.pop(channel_epoch, None)) is not None:
            slot.readers -= 1

    def _close(self, channel_epoch: int) -> None:
        if (sender := self._senders.pop(channel_epoch, None)) is not None:
            sender.close()
            if self._relay is not None:
                self._relay.tell(lambda rank: CloseChannel(channel_epoch))

    def _keep(self, channel_epoch: int) -> None:
        """What is offered now stays until the channel's broadcast has ended."""
        self._kept[channel_epoch] = self._offered
        self._offered.readers += 1


def _invitation(request: OpenChannel, spec: ChannelSpec, rank: int) -> JoinChannel | None:
    """To a channel that rank 0 holds; None for a rank that has nothing to send."""
    if rank >= spec.senders:
        return None
    place = ChannelPlace(
        request.channel_epoch,
        spec.store_host,
        spec.store_port,
        spec.prefix,
        rank,
        spec.world_size,
        spec.backend,
        spec.num_senders,
    )
    return JoinChannel(place, request.timeout_s)
