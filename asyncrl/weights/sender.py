"""The sending end of one weight channel, in a thread of its own: a channel that stalls holds up no other one."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from asyncrl.errors import AsyncRLError
from asyncrl.link.trainer_messages import Broadcast
from asyncrl.weights.channels.channel import WeightChannel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """How a broadcast ended: `error` is empty when every byte went out. Without an order: the channel was closed."""

    channel_epoch: int
    order: Broadcast | None = None
    error: str = ""
    transfer_ms: float = 0.0
    num_bytes: int = 0


class ChannelSender(threading.Thread):
    """Broadcasts in one channel, one after the other. `report` is called in this thread after each, and at its end.

    A channel that failed is closed by then, so that nothing reads the memory that was sent any more.
    """

    def __init__(self, channel: WeightChannel, channel_epoch: int, report: Callable[[Sent], None]) -> None:
        super().__init__(name=f"weight channel {channel_epoch}", daemon=True)
        self.channel = channel
        self.channel_epoch = channel_epoch
        self._report = report
        self._orders: queue.SimpleQueue[tuple[Broadcast, Sequence[torch.Tensor]] | None] = queue.SimpleQueue()

    def send(self, order: Broadcast, parts: Sequence[torch.Tensor]) -> None:
        """Broadcast `parts` (uint8 each) as soon as all members have joined. Returns at once."""
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
            self._report(Sent(self.channel_epoch))

    def _carry_out(self, order: Broadcast, parts: Sequence[torch.Tensor]) -> None:
        """Sends and reports. Raises only what is an error of our own, and after the report: the desk waits for it."""
        started = time.monotonic()
        deadline = started + order.timeout_s
        num_bytes = 0
        error = ""
        unexpected: Exception | None = None

        def sent(part_bytes: int) -> None:
            nonlocal num_bytes
            num_bytes += part_bytes

        try:
            self.channel.join(order.timeout_s)
            self.channel.broadcast(parts, max(0.0, deadline - time.monotonic()), sent)
        except Exception as failure:  # noqa: BLE001 - reported first, for the desk waits for it; unexpected ones are raised below
            unexpected = None if isinstance(failure, AsyncRLError) else failure
            total = sum(part.nbytes for part in parts)
            what = str(failure) if unexpected is None else repr(failure)
            error = f"{what} ({num_bytes} of {total} bytes were sent)"
        transfer_ms = (time.monotonic() - started) * 1e3
        if error:
            self._close_channel()  # a collective that failed once cannot be trusted again
        self._report(Sent(self.channel_epoch, order, error, transfer_ms, num_bytes))
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
