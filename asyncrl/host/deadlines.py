"""Deadlines of many things at once, in monotonic seconds: the next one is known at once, however many there are."""

from __future__ import annotations

import heapq
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Any)  # keys are compared where two times are equal

_SLACK = 64  # entries that a heap may hold beyond twice its keys before it is built again


class Deadlines(Generic[K]):
    """One time for each key. Setting, removing and taking cost O(log n), whoever else has a deadline.

    Entries that were replaced or removed stay in the heap until their time comes or they outnumber the others.
    """

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: K) -> bool:
        return key in self._at

    def set(self, key: K, at: float) -> None:
        """The deadline of `key` is `at` from now on."""
        if self._at.get(key) == at:
            return
        self._at[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [(time, key) for key, time in self._at.items()]
            heapq.heapify(self._heap)

    def remove(self, key: K) -> None:
        """`key` has no deadline any more; removing it again changes nothing."""
        self._at.pop(key, None)

    def earliest(self) -> float:
        """The first deadline of all; infinity when there is none."""
        heap = self._heap
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else float("inf")

    def take_due(self, now: float) -> list[K]:
        """Removes and returns the keys whose time has come, the earliest first."""
        due: list[K] = []
        while self.earliest() <= now:
            _, key = heapq.heappop(self._heap)
            del self._at[key]
            due.append(key)
        return due
