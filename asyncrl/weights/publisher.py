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

Order matters in one place: a buffer changes its role only in `_rotate`, under the lock, only after the desk said that
a newer snapshot is wanted, and never while a channel sends from it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from asyncrl.errors import AsyncRLError
from asyncrl.link.schema.message_base import Message
from asyncrl.link.trainer_link import TrainerLink
from asyncrl.link.trainer_messages import (
    Broadcast,
    BroadcastDone,
    ChannelReady,
    CloseChannel,
    OpenChannel,
    SnapshotReady,
    SnapshotWanted,
)
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE
from asyncrl.weights.bytes.delta import Delta, delta_pays, encode_delta
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import WeightStore
from asyncrl.weights.sender import ChannelSender, Sent

log = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0
MAX_BUFFERS = 5  # fresh, offered, base, and two that stalled channels hold on to


@dataclass(slots=True)
class _Slot:
    """One staging buffer and what it holds."""

    buffer: SnapshotBuffer
    version: int | None = None
    canary_logprobs: list[np.ndarray] = field(default_factory=list)
    snapshot_ms: float = 0.0
    delta: Delta | None = None  # to this version from the one sent before
    encode_ms: float = 0.0
    sent: bool = False  # whole or as a delta, to at least one channel
    readers: int = 0  # channels that send from it, or will


class Publisher(threading.Thread):
    """Rank 0's part in the weight plane. The training loop calls `publish`, everything else runs in the thread.

    Args:
        desk_address: where the desk listens for the trainer.
        buffer: takes snapshots of the policy; more like it are made when they are needed.
        canary: token sequences that every receiver scores after a swap, int32 each.
        host: address of this machine at which receivers meet the publisher.
        port: one port at which all channels meet, kept as long as the publisher lives; 0 = any, one for each channel.
        idle_wait_s: the first offer is repeated at this interval until the desk has answered one.
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
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        self._desk_address = desk_address
        self._fresh, self._offered = _Slot(buffer), _Slot(buffer.twin())
        self._base: _Slot | None = None  # what `_offered` was compared with, or will be if it is not sent
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
        self._kept: dict[int, _Slot] = {}  # what a channel sends or will send, by channel epoch
        self._sent: deque[Sent] = deque()  # reports of the senders' threads
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self.crash: BaseException | None = None

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
        os.eventfd_write(self._wake, 1)

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; broadcasts under way are aborted."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self.join(timeout_s)

    def run(self) -> None:
        """The thread. What ends it before `stop` is left in `crash`, which the training loop looks at."""
        try:
            link = TrainerLink(self._desk_address, wake_fd=self._wake)  # here: a socket belongs to one thread
            while not self._stopping.is_set():
                self._offer_fresh(link)
                if (message := link.receive(self._idle_wait_s)) is not None:
                    self._heard = True
                    self._handle(link, message)
                elif not self._heard:
                    self._offer_again(link)
                while self._sent:
                    self._take_report(link, self._sent.popleft())
            for channel_epoch in list(self._senders):
                self._close(channel_epoch)
            if self._store is not None:
                self._store.close()
            link.close()
        except BaseException as error:  # whatever it is, the training loop must end with it
            self.crash = error
            log.exception("publisher thread died")

    def _offer_fresh(self, link: TrainerLink) -> None:
        if not self._rotate():
            return
        # Outside the lock: digests take as long as reading the buffer, and the training loop may want to snapshot.
        slot = self._offered
        assert slot.version is not None
        manifest = slot.buffer.manifest(slot.version)
        self._encode()
        canary = [tokens.tobytes() for tokens in self._canary]
        delta = None if slot.delta is None else slot.delta.info
        rows = [row.astype(LOGPROB_DTYPE).tobytes() for row in slot.canary_logprobs]
        self._last_offer = SnapshotReady(slot.version, manifest, canary, rows, slot.snapshot_ms, delta)
        link.send(self._last_offer)

    def _offer_again(self, link: TrainerLink) -> None:
        if self._last_offer is not None:
            link.send(self._last_offer)

    def _rotate(self) -> bool:
        """Makes the fresh snapshot the offered one, if it is wanted and a buffer is left for the next."""
        if not self._wanted or self._fresh.version is None:
            return False
        sent = self._offered if self._offered.sent else self._base
        with self._lock:
            pays = sent is not None and delta_pays(sent.buffer.layout, sent.buffer.flat, self._fresh.buffer.flat)
        base = sent if pays else None
        following = self._free_slot(base)
        if following is None:
            return False
        with self._lock:
            self._base = base
            self._offered = self._fresh
            self._fresh = following
            self._fresh.version = None
            self._fresh.sent = False
        self._wanted = False
        for slot in self._slots:
            if not slot.readers:
                slot.delta = None  # up to half a model, and nobody asks for it any more
        return True

    def _free_slot(self, base: _Slot | None) -> _Slot | None:
        """A buffer that nothing needs once the fresh snapshot is offered; a new buffer if there is none."""
        for slot in self._slots:
            if slot is not self._fresh and slot is not base and not slot.readers:
                return slot
        if len(self._slots) >= MAX_BUFFERS:
            return None
        # Not under the lock: filling it with zeros takes as long as a snapshot, which may have to go on.
        slot = _Slot(self._fresh.buffer.twin())
        self._slots.append(slot)
        return slot

    def _encode(self) -> None:
        """Encodes the difference from base to offered, where there is a base and it takes at most half of all bytes."""
        old, new = self._base, self._offered
        new.delta, new.encode_ms = None, 0.0
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
                    self._take_report(link, Sent(message.channel_epoch, message, failure, 0.0, 0))
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
        version = self._offered.version
        return ChannelReady(request.channel_epoch, self._host, channel.store_port, "", request.backend, version)

    def _send(self, request: Broadcast) -> str:
        """Hands the broadcast to its channel's thread. Returns why that is impossible, if it is."""
        sender = self._senders.get(request.channel_epoch)
        if sender is None:
            return f"channel {request.channel_epoch} is not open"
        if request.channel_epoch not in self._kept:
            self._keep(request.channel_epoch)
        slot = self._kept[request.channel_epoch]
        if slot.version != request.version:
            return f"version {request.version} was replaced by {slot.version}"
        if request.base_version is None:
            parts = list(slot.buffer.buckets())
        elif slot.delta is None or slot.delta.info.base_version != request.base_version:
            return f"there is no delta from version {request.base_version} to {request.version}"
        else:
            parts = list(slot.delta.payload.split(slot.buffer.layout.bucket_bytes))
        sender.send(request, parts)
        return ""

    def _report(self, sent: Sent) -> None:
        """Takes a report; runs in the thread of its sender."""
        self._sent.append(sent)
        os.eventfd_write(self._wake, 1)

    def _take_report(self, link: TrainerLink, sent: Sent) -> None:
        """A broadcast ended, or a channel was closed: its memory is free."""
        slot = self._kept.pop(sent.channel_epoch, None)
        if slot is not None:
            slot.readers -= 1
        order = sent.order
        if order is None:
            return
        if slot is not None and not sent.error:
            slot.sent = True
        done = BroadcastDone(
            order.version,
            order.attempt,
            order.channel_epoch,
            sent.error,
            sent.transfer_ms,
            sent.num_bytes,
            self._offered.buffer.layout.total_bytes,
            slot.encode_ms if slot else 0.0,
        )
        link.send(done)

    def _close(self, channel_epoch: int) -> None:
        if (sender := self._senders.pop(channel_epoch, None)) is not None:
            sender.close()

    def _keep(self, channel_epoch: int) -> None:
        """What is offered now stays until the channel's broadcast has ended."""
        self._kept[channel_epoch] = self._offered
        self._offered.readers += 1
