"""The leases that run, found by ordinal, by holder and by deadline without a look at all others."""

from __future__ import annotations

from collections.abc import Iterator

from asyncrl.host.deadlines import Deadlines
from asyncrl.replay.lease_records import LeaseRecord


class RunningLeases:
    """Running leases of one kind, at most one for each ordinal; iterates over them, the oldest grant first."""

    def __init__(self) -> None:
        self._by_ordinal: dict[int, LeaseRecord] = {}
        self._by_holder: dict[str, dict[int, LeaseRecord]] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        self._num_changes = 0
        self._changed: dict[str, int] = {}  # by holder, while it holds a lease

    def __len__(self) -> int:
        return len(self._by_ordinal)

    def __iter__(self) -> Iterator[LeaseRecord]:
        return iter(list(self._by_ordinal.values()))

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._by_ordinal

    def get(self, ordinal: int) -> LeaseRecord | None:
        """The running lease of an ordinal."""
        return self._by_ordinal.get(ordinal)

    def of(self, holder: str) -> list[LeaseRecord]:
        """The leases that a generator holds, the oldest grant first."""
        return list(self._by_holder.get(holder, {}).values())

    def num_of(self, holder: str) -> int:
        """How many leases a generator holds."""
        return len(self._by_holder.get(holder, ()))

    def last_change(self, holder: str) -> int:
        """Another number after each change of what a generator holds; 0 while it holds nothing."""
        return self._changed.get(holder, 0)

    def _note(self, holder: str) -> None:
        self._num_changes += 1
        self._changed[holder] = self._num_changes

    def holders(self) -> set[str]:
        """Generators that hold a lease."""
        return set(self._by_holder)

    def add(self, record: LeaseRecord) -> None:
        """A lease begins to run."""
        ordinal = record.key.ordinal
        assert ordinal not in self._by_ordinal, f"{record.key} runs already"
        self._by_ordinal[ordinal] = record
        self._by_holder.setdefault(record.holder, {})[ordinal] = record
        self._deadlines.set(ordinal, record.deadline_at)
        self._note(record.holder)

    def remove(self, record: LeaseRecord) -> None:
        """A lease has ended."""
        ordinal = record.key.ordinal
        del self._by_ordinal[ordinal]
        held = self._by_holder[record.holder]
        del held[ordinal]
        self._note(record.holder)
        if not held:
            del self._by_holder[record.holder], self._changed[record.holder]
        self._deadlines.remove(ordinal)

    def past_deadline(self, now: float) -> list[LeaseRecord]:
        """Leases whose deadline has come, the earliest first. They must be removed by the caller."""
        return [self._by_ordinal[ordinal] for ordinal in self._deadlines.take_due(now)]

    def next_deadline(self) -> float:
        """The earliest deadline; infinity when nothing runs."""
        return self._deadlines.earliest()
