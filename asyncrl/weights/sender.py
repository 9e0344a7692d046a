"""The sending end of one weight channel, in a thread of its own: a channel that stalls holds up no other one.

Where several ranks send, every one of them takes part in the broadcasts of the others, too: what comes then goes to
memory that nobody reads.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from asyncrl.errors import AsyncRLError
from asyncrl.link.trainer_messages import Broadcast
from asyncrl.link.weight_records import DeltaInfo
from asyncrl.weights.bytes.delta import delta_sizes
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.base import AHEAD
from asyncrl.weights.channels.channel import WeightChannel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """How a broadcast ended: `error` is empty when every byte went out. Without an order: the channel was closed."""

    channel_epoch: int
    order: Broadcast | None = None
    error: str = ""
    transfer_ms: float = 0.0
    num_bytes: int = 0  # sent by this rank
    rank: int = 0


@dataclass(slots=True)
class Sending:
    """A broadcast under way: who is not through with it, and what was reported so far."""

    order: Broadcast
    waiting: set[int]  # ranks
    overdue_at: float
    told: bool = False  # the desk knows how it ended
    reports: list[Sent] = field(default_factory=list)

    def result(self) -> Sent | None:
        """What the desk is told: at the first error or when all are through; None before."""
        failed = next((report for report in self.reports if report.error), None)
        if failed is None and self.waiting:
            return None
        error = "" if failed is None else failed.error
        if failed is not None and failed.rank:
            error = f"sender {failed.rank}: {error}"
        transfer_ms = max(report.transfer_ms for report in self.reports)
        return Sent(
            self.order.channel_epoch, self.order, error, transfer_ms, sum(report.num_bytes for report in self.reports)
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """What travels in one broadcast, in order: memory, and the rank that each part comes from."""

    memory: list[torch.Tensor] = field(default_factory=list)  # uint8 each
    senders: list[int] = field(default_factory=list)

    def num_bytes(self, rank: int) -> int:
        """Bytes that `rank` sends."""
        pairs = zip(self.memory, self.senders, strict=True)
        return sum(part.nbytes for part, sender in pairs if sender == rank)


def parts_of(buffer: SnapshotBuffer, delta: DeltaInfo | None = None, payload: torch.Tensor | None = None) -> Parts:
    """The broadcast of a snapshot as this sender takes part in it: whole, or as the `delta` of all senders.

    `payload` is this sender's own part of the delta.
    """
    layout = buffer.layout
    if delta is None:
        sizes = [(bucket.num_bytes, bucket.sender) for bucket in layout.buckets]
        own: Iterator[torch.Tensor] = buffer.buckets()
    else:
        assert payload is not None
        sizes = delta_sizes(delta, layout.bucket_bytes)
        own = iter(payload.split(layout.bucket_bytes))
    parts = Parts()
    scratch: list[torch.Tensor] = []  # what comes from other senders: as many as may be under way at once
    for index, (num_bytes, sender) in enumerate(sizes):
        if sender == buffer.sender:
            memory = next(own)
        else:
            scratch = scratch or [buffer.flat.new_empty(layout.bucket_bytes) for _ in range(AHEAD)]
            memory = scratch[index % AHEAD][:num_bytes]
        parts.memory.append(memory)
        parts.senders.append(sender)
    return parts


class ChannelSender(threading.Thread):
    """Broadcasts in one channel, one after the other. `report` is called in this thread after each, and at its end.

    A channel that failed is closed by then, so that nothing reads the memory that was sent any more.
    """

    def __init__(
        self, channel: WeightChannel, channel_epoch: int, report: Callable[[Sent], None], rank: int = 0
    ) -> None:
        super().__init__(name=f"weight channel {channel_epoch}", daemon=True)
        self.channel = channel
        self.channel_epoch = channel_epoch
        self.rank = rank
        self._report = report
        self._orders: queue.SimpleQueue[tuple[Broadcast, Parts] | None] = queue.SimpleQueue()

    def send(self, order: Broadcast, parts: Parts) -> None:
        """Broadcast `parts` as soon as all members have joined. Returns at once."""
        self._orders.put((order, parts))

    def close(self) -> None:
        """Leave the channel; what is under way is broken off. Returns at once."""
        self._orders.put(None)
        # In a thread: on a communicator in trouble the abort itself takes until its deadline.
        threading.Thread(target=self._abort, name=f"abort {self.name}", daemon=True).start()

    def run(self) -> None:
        """The thread: carries out what `send` put in line, until `close`."""
        try:
            while (item := self._orders.get()) is not None:
                self._carry_out(*item)
        finally:  # an error of our own ends this thread with its traceback; the memory must not stay taken for ever
            self._close_channel()
            self._report(Sent(self.channel_epoch, rank=self.rank))

    def _carry_out(self, order: Broadcast, parts: Parts) -> None:
        """Sends and reports. Raises only what is an error of our own, and after the report: the desk waits for it."""
        started = time.monotonic()
        deadline = started + order.timeout_s
        num_bytes = 0
        error = ""
        unexpected: Exception | None = None
        origins = iter(parts.senders)

        def sent(part_bytes: int) -> None:
            nonlocal num_bytes
            if next(origins) == self.rank:
                num_bytes += part_bytes

        try:
            self.channel.join(order.timeout_s)
            self.channel.broadcast(parts.memory, max(0.0, deadline - time.monotonic()), sent, parts.senders)
        except Exception as failure:  # noqa: BLE001 - reported first, for the desk waits for it; unexpected ones are raised below
            unexpected = None if isinstance(failure, AsyncRLError) else failure
            total = parts.num_bytes(self.rank)
            what = str(failure) if unexpected is None else repr(failure)
            error = f"{what} ({num_bytes} of {total} bytes were sent)"
        transfer_ms = (time.monotonic() - started) * 1e3
        if error:
            self._close_channel()  # a collective that failed once cannot be trusted again
        self._report(Sent(self.channel_epoch, order, error, transfer_ms, num_bytes, self.rank))
        if unexpected is not None:
            raise unexpected

    def _abort(self) -> None:
        try:
            self.channel.abort()
        except AsyncRLError as error:
            log.warning("%s", error)

    def _close_channel(self) -> None:
        try:
            self.channel.close()
        except AsyncRLError as error:
            # It may still read the memory it sends: receivers find what is wrong by the digests.
            log.warning("%s", error)
