"""Ordinals that wait to be leased again, each not before a time of its own."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from asyncrl.host.deadlines import Deadlines


class WaitingPrompts:
    """Hands out the lowest ordinal whose time has come. Every call costs O(log n), amortized."""

    def __init__(self, due: Iterable[int] = ()) -> None:
        self._due: list[int] = sorted(due)  # a heap; an ordinal in it that is not in `_is_due` was taken out
        self._is_due = set(self._due)
        self._later: Deadlines[int] = Deadlines()

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._is_due or ordinal in self._later

    def __len__(self) -> int:
        return len(self._is_due) + len(self._later)

    def add(self, ordinal: int, not_before: float, now: float) -> None:
        """`ordinal` waits from now on."""
        assert ordinal not in self, f"{ordinal} waits already"
        if not_before <= now:
            self._add_due(ordinal)
        else:
            self._later.set(ordinal, not_before)

    def discard(self, ordinal: int) -> None:
        """`ordinal` waits no more; it need not have waited."""
        self._is_due.discard(ordinal)
        self._later.remove(ordinal)

    def first(self, now: float) -> int | None:
        """The lowest ordinal whose time has come; None when there is none. It goes on waiting."""
        for ordinal in self._later.take_due(now):
            self._add_due(ordinal)
        while self._due:
            if self._due[0] in self._is_due:
                return self._due[0]
            heapq.heappop(self._due)
        return None

    def some_due(self, count: int) -> list[int]:
        """Up to `count` ordinals whose time has come, ascending; the lowest of all is among them."""
        return sorted(ordinal for ordinal in self._due[:count] if ordinal in self._is_due)

    def next_time(self, now: float) -> float:
        """When the next ordinal may be leased that may not be yet; infinity when there is none."""
        for ordinal in self._later.take_due(now):
            self._add_due(ordinal)
        return self._later.earliest()

    def _add_due(self, ordinal: int) -> None:
        self._is_due.add(ordinal)
        heapq.heappush(self._due, ordinal)
        if len(self._due) > 2 * len(self._is_due) + 64:
            self._due = sorted(self._is_due)
