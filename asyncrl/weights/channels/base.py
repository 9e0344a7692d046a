"""What a weight channel needs of the transport that moves its bytes. There is one class for each backend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from asyncrl.link.weight_records import ChannelSpec

# Parts in a transport's hands at once: while Python takes note of one, the next ones move. No more than that takes: a
# process group that failed is let go of only when each of them has failed.
AHEAD = 3


class Transport(Protocol):
    """One member's end of one weight channel, for one life: form, broadcast any number of times, close.

    `WeightChannel` is the only caller. It runs every method in a daemon thread of its own and abandons that thread when
    the deadline is over by a little, so a method may hang without harm. It should not: a method that keeps its deadline
    can say who was missing. What an abandoned call still does must reach nothing but this object and the buffer it was
    given, which the caller throws away.

    After a failure nothing but `abort` and `close` is called. Failures are raised as ChannelError, RuntimeError or
    OSError; the channel adds what it was doing.
    """

    waiting_for: str  # what a call under way waits for: told in the error when the call is abandoned

    def __init__(self, spec: ChannelSpec, device: torch.device, aborted: threading.Event) -> None:
        """Must not block. `aborted` is set by the channel: calls under way should end soon.

        Raises:
            ChannelError: this backend cannot work on `device`.
        """
        ...

    def form(self, timeout_s: float) -> None:
        """Connect to all other members."""
        ...

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None],
        senders: Sequence[int],
    ) -> None:
        """Send or receive `parts` in this order; return when all bytes are in place.

        `senders` has the rank that each part comes from; all members give the same. A rank that sends some parts gives
        memory for the others, too, and what is in it afterwards is of no use to it: it may be one memory for many, if
        no two of them are within AHEAD parts of each other.
        `on_part` is told the bytes of each part when that part is done.
        At its sender a part may change again once this has returned.
        """
        ...

    def abort(self) -> None:
        """Break off what is under way, also in another thread."""
        ...

    def close(self) -> None:
        """Let go of connections and memory, after `abort` or without."""
        ...
