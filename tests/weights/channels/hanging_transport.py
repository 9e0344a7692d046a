"""A transport that hangs for ever where a test wants it to; everywhere else it is gloo."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from asyncrl.weights.channels.collectives import GlooTransport

GARBAGE = 0xEE


class Hangs:
    """Where to hang: pairs of a method and a rank. `release` lets all that hang go on.

    `options` are those of a `WeightChannel` that knows the backend "hanging".
    """

    def __init__(self, close_timeout_s: float) -> None:
        self.options: dict[str, Any] = {
            "transports": {"hanging": hanging_transport(self)},
            "close_timeout_s": close_timeout_s,
        }
        self.places: set[tuple[str, int]] = set()
        self.threads: list[threading.Thread] = []
        self._released = threading.Event()

    def here(self, method: str, rank: int) -> bool:
        """Hangs, if it is to; True afterwards."""
        if (method, rank) not in self.places:
            return False
        self.threads.append(threading.current_thread())
        self._released.wait()
        return True

    def release(self, timeout_s: float = 20.0) -> None:
        """What was abandoned runs to its end."""
        self._released.set()
        for thread in self.threads:
            thread.join(timeout_s)
            assert not thread.is_alive()


def hanging_transport(hangs: Hangs) -> type[GlooTransport]:
    class HangingTransport(GlooTransport):
        def _hang(self, method: str) -> bool:
            self.waiting_for = f"a {method} that never ends"
            return hangs.here(method, self._spec.rank)

        def form(self, timeout_s: float) -> None:
            self._hang("form")
            super().form(timeout_s)

        def broadcast(self, parts, timeout_s, on_part, senders) -> None:
            if self._hang("broadcast"):
                for part in parts:
                    part.fill_(GARBAGE)  # as late as can be
            super().broadcast(parts, timeout_s, on_part, senders)

        def abort(self) -> None:
            self._hang("abort")
            super().abort()

        def close(self) -> None:
            self._hang("close")
            super().close()

    return HangingTransport


@contextmanager
def hanging(close_timeout_s: float = 0.5) -> Iterator[Hangs]:
    """Places to hang in; at the end all that still hangs is let go."""
    hangs = Hangs(close_timeout_s)
    try:
        yield hangs
    finally:
        hangs.release()
