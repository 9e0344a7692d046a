"""The publisher of every sender but rank 0: snapshots of what this rank holds, sent when rank 0 says so.

The training loop calls `publish` with the slot that rank 0 named; everything else runs in the thread, by the orders
that come over the relay. Which slot is for what is decided by rank 0 alone (`publisher`), which also knows when all
senders are through with one: it names a slot again only then.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from asyncrl.errors import AsyncRLError, RankLost
from asyncrl.link.trainer_messages import (
    Broadcast,
    CloseChannel,
    JoinChannel,
    PrepareShard,
    SendShard,
    ShardReady,
    ShardSent,
)
from asyncrl.weights.bytes.delta import encode_delta
from asyncrl.weights.bytes.memory import own_stream
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.publisher import ANSWER_TIMEOUT_S, JOIN_TIMEOUT_S
from asyncrl.weights.relay import RelayConnection, join_relay
from asyncrl.weights.sender import ChannelSender, Sent, parts_of
from asyncrl.weights.slots import Slot

if TYPE_CHECKING:
    from asyncrl.link.schema.message_base import Message

log = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0
MESSAGE_TIMEOUT_S = 30.0  # for the rest of a message whose first byte has come


class ShardPublisher(threading.Thread):
    """One other sender's part in the weight plane.

    Args:
        invitation: of rank 0's relay.
        buffer: takes snapshots of what this rank holds; more like it are made when they are needed.
    """

    def __init__(self, invitation: str, buffer: SnapshotBuffer) -> None:
        super().__init__(name="publisher", daemon=True)
        self._rank = buffer.sender
        self._invitation = invitation
        self._slots = [Slot(0, buffer)]
        self._filled = threading.Condition()  # a slot holds a version
        self._channels: dict[int, ChannelSender] = {}  # by channel epoch
        self._refused: dict[int, str] = {}  # channels that could not be joined, with the reason
        self._sent: deque[Sent] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self.crash: BaseException | None = None

    def publish(self, version: int, slot: int) -> None:
        """Snapshots the parameters as `version` into the slot that rank 0 named; the caller waits for the copy."""
        while len(self._slots) <= slot:
            self._slots.append(Slot(len(self._slots), self._slots[0].buffer.twin()))
        chosen = self._slots[slot]
        chosen.version = None
        chosen.buffer.snapshot()
        with self._filled:
            chosen.version = version
            self._filled.notify_all()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; broadcasts under way are aborted."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self.join(timeout_s)

    def run(self) -> None:
        """The thread. What ends it before `stop` is left in `crash`, which the training loop looks at."""
        try:
            with own_stream(self._slots[0].buffer.flat.device):
                self._work()
        except BaseException as error:  # whatever it is, the training loop must end with it
            self.crash = error
            log.exception("publisher thread died")

    def _work(self) -> None:
        relay = join_relay(self._invitation, self._rank, JOIN_TIMEOUT_S)
        poll = select.poll()
        for source in (relay.fileno(), self._wake):
            poll.register(source, select.POLLIN)
        while not self._stopping.is_set():
            ready = {source for source, _ in poll.poll(int(IDLE_WAIT_S * 1e3))}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while self._sent:
                self._tell(relay, self._sent.popleft())
            if relay.fileno() in ready:
                message = relay.receive(MESSAGE_TIMEOUT_S)
                if message is None:
                    break  # rank 0's publisher has ended, and so has the training
                self._handle(relay, message)
        for channel in self._channels.values():
            channel.close()
        relay.close()

    def _handle(self, relay: RelayConnection, message: Message) -> None:
        match message:
            case PrepareShard():
                relay.send(self._prepare(message))
            case JoinChannel():
                self._join_channel(message)
            case SendShard():
                order = Broadcast(message.version, message.attempt, message.channel_epoch, message.timeout_s)
                if failure := self._send(message, order):
                    self._tell(relay, Sent(message.channel_epoch, order, failure, rank=self._rank))
            case CloseChannel():
                self._refused.pop(message.channel_epoch, None)
                if (channel := self._channels.pop(message.channel_epoch, None)) is not None:
                    channel.close()
            case _:
                log.warning("publisher of rank %d got an unexpected %s", self._rank, type(message).__name__)

    def _prepare(self, order: PrepareShard) -> ShardReady:
        """Measures what is to be sent. Raises RankLost when the training loop takes no snapshot in time."""
        with self._filled:
            if not self._filled.wait_for(lambda: self._holds(order.slot, order.version), ANSWER_TIMEOUT_S):
                raise RankLost(
                    f"rank {self._rank} took no snapshot of version {order.version} into slot {order.slot} within "
                    f"{ANSWER_TIMEOUT_S:g} s"
                )
        for number in order.unread:
            if number < len(self._slots):
                self._slots[number].forget_delta()
        slot = self._slots[order.slot]
        digests = slot.buffer.digests()
        started = time.monotonic()
        if order.base_slot is not None:
            base = self._slots[order.base_slot]
            assert base.version is not None
            slot.delta = encode_delta(
                slot.buffer.layout, base.buffer.flat, slot.buffer.flat, base.version, sender=self._rank
            )
        encode_ms = (time.monotonic() - started) * 1e3
        return ShardReady(order.version, digests, None if slot.delta is None else slot.delta.info, encode_ms)

    def _holds(self, slot: int, version: int) -> bool:
        return slot < len(self._slots) and self._slots[slot].version == version

    def _join_channel(self, order: JoinChannel) -> None:
        epoch = order.place.channel_epoch
        try:
            channel = WeightChannel(order.place.spec(order.timeout_s), self._slots[0].buffer.flat.device)
        except AsyncRLError as error:
            self._refused[epoch] = str(error)
            return
        sender = self._channels[epoch] = ChannelSender(channel, epoch, self._report, self._rank)
        sender.start()

    def _send(self, order: SendShard, broadcast: Broadcast) -> str:
        """Hands the broadcast to its channel's thread. Returns why that is impossible, if it is."""
        channel = self._channels.get(order.channel_epoch)
        if channel is None:
            return self._refused.get(order.channel_epoch, f"channel {order.channel_epoch} is not open")
        slot = self._slots[order.slot]
        if not self._holds(order.slot, order.version):
            return f"slot {order.slot} holds version {slot.version}, not {order.version}"
        if order.delta is None:
            channel.send(broadcast, parts_of(slot.buffer))
        elif slot.delta is None:
            return f"there is no delta to version {order.version}"
        else:
            channel.send(broadcast, parts_of(slot.buffer, order.delta, slot.delta.payload))
        return ""

    def _report(self, sent: Sent) -> None:
        """Takes a report; runs in the thread of its sender."""
        self._sent.append(sent)
        os.eventfd_write(self._wake, 1)

    def _tell(self, relay: RelayConnection, sent: Sent) -> None:
        order = sent.order
        if order is not None:
            epoch = sent.channel_epoch
            relay.send(ShardSent(order.version, order.attempt, epoch, sent.error, sent.transfer_ms, sent.num_bytes))
