"""Ordinals that wait to be leased again, each not before a time of its own."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from asyncrl.host.deadlines import Deadlines


class WaitingPrompts:
    """Hands out the lowest ordinal whose time has come. No call looks at all of them; to add one moves some memory."""

    def __init__(self, due: Iterable[int] = ()) -> None:
        # Sorted; an ordinal in it that is not in `_is_due` was taken out, and so were all before `_first`.
        self._due: list[int] = sorted(due)
        self._first = 0
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
        while self._first < len(self._due):
            if (ordinal := self._due[self._first]) in self._is_due:
                return ordinal
            self._first += 1
        return None

    def some_due(self, count: int) -> list[int]:
        """The lowest ordinals whose time has come, ascending: `count` of them, or fewer where some were taken out."""
        return [ordinal for ordinal in self._due[self._first : self._first + count] if ordinal in self._is_due]

    def next_time(self, now: float) -> float:
        """When the next ordinal may be leased that may not be yet; infinity when there is none."""
        for ordinal in self._later.take_due(now):
            self._add_due(ordinal)
        return self._later.earliest()

    def _add_due(self, ordinal: int) -> None:
        self._is_due.add(ordinal)
        at = bisect.bisect_left(self._due, ordinal, self._first)
        if self._due[at : at + 1] != [ordinal]:  # it may be left from before it was taken out
            self._due.insert(at, ordinal)
        if len(self._due) > 2 * len(self._is_due) + 64:
            self._due, self._first = sorted(self._is_due), 0
