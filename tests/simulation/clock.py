"""Virtual time: an event loop that never sleeps. When nothing is due it jumps to the next moment at which something is.

Everything runs in one thread and in the order in which it became due, so the same seed gives the same run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

START_S = 1000.0  # so that times before the start stay positive
TURN_S = 1e-6  # a turn of the loop takes time: what rounding makes due a moment too early is due in the next turn


class Deadlock(AssertionError):
    """Nothing is due, now or ever, and the run has not ended."""


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without sockets, whose clock moves only while everything waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START_S
        self._selector = self

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[object]:
        """Takes the place of the selector's: called with the seconds until the next timer."""
        if timeout is None:
            raise Deadlock(f"nothing is due any more at {self.now - START_S:.3f} s")
        self.now += TURN_S
        if timeout > 0:
            self.now = max(self.now + timeout, self._scheduled[0].when())
        return []

    def _process_events(self, event_list: list[object]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Other threads would wake the loop by this; there are none."""


@contextlib.contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """A loop of its own, and `time.monotonic` reads its clock. Tasks that are left are cancelled at the end."""
    loop, real = VirtualLoop(), time.monotonic
    time.monotonic = loop.time
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        try:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            time.monotonic = real
