"""Accepted groups between journal and trainer: ordered by the age of their oldest token, taken by the batch.

Its size is bounded by admission: at most (max_age + 1) * groups_per_step groups (`replay.pacing`). A worked trace
with groups_per_step = 2 and max_age = 1, at version 5, where `o7@4` is ordinal 7 whose oldest token is of version 4:

    buffer.add(o12@5); buffer.add(o10@4)       # [o10@4, o12@5]
    buffer.can_take(5, {4: 1})                 # False: the lease of o11, issued at 4, must be trained now
    buffer.waiting_for(5, [lease of o11])      # "version 5 waits for 1 of 1 leases issued at version 4 ..."
    buffer.add(o11@5)                          # [o10@4, o11@5, o12@5]: it was sampled after a weight swap
    buffer.can_take(5, {})                     # True
    buffer.take(5)                             # -> o10@4, o11@5, ages 1 and 0; left: [o12@5]
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.replay.lengths import LengthHistogram
from asyncrl.replay.pacing import Pacing
from asyncrl.storage.records import StoredGroup


class ReplayBuffer:
    """Holds accepted groups, oldest token first, ties by ordinal.

    over_age says what happens to a group whose oldest token is more than `max_age` steps old when it could be taken:
    "drop" hands it back from `drop_over_age`, to be leased again; "train" leaves it in, to be trained with correction.
    """

    def __init__(self, pacing: Pacing, over_age: str = "drop") -> None:
        assert over_age in ("drop", "train"), over_age
        self._pacing = pacing
        self._drops = over_age == "drop"
        self._groups: list[StoredGroup] = []
        self._ordinals: set[int] = set()
        self._lengths = LengthHistogram()
        self._dropped_lengths = LengthHistogram()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, group: StoredGroup) -> None:
        """Takes in an accepted group; ordinals are unique.

        To be called in the turn of `LeaseBook.accept`: between the two the group is counted nowhere, and a batch
        taken then could leave it behind. It need not be durable yet; the record of the step that trains it comes
        after its own in the journal, and is made durable before the trainer sees the batch.
        """
        assert group.ordinal not in self._ordinals, f"ordinal {group.ordinal} is already in the buffer"
        bisect.insort(self._groups, group, key=_oldest_first)
        self._ordinals.add(group.ordinal)
        self.num_bytes += len(group.body)
        self._lengths.add(group.num_tokens)

    def drop_over_age(self, version: int) -> list[StoredGroup]:
        """Removes and returns what is too old to be trained at `version`; nothing when over_age is "train".

        To be called at each new version, before `can_take`; the caller leases those ordinals again.
        """
        if not self._drops:
            return []
        dropped = self._groups[: self._num_over_age(version)]
        self._remove(dropped)
        for group in dropped:
            self._dropped_lengths.add(group.num_tokens)
        return dropped

    def can_take(self, version: int, running_by_version: Mapping[int, int]) -> bool:
        """Whether a batch may be taken at `version`; running_by_version is `LeaseBook.running_by_version`."""
        return self._num_missing() <= 0 and self._straggling(version, running_by_version) is None

    def take(self, version: int) -> list[StoredGroup]:
        """The batch that makes `version` + 1: the groups with the oldest tokens, in that order."""
        batch = self._groups[: self._pacing.groups_per_step]
        assert len(batch) == self._pacing.groups_per_step, f"{len(batch)} groups buffered"
        num_over_age = min(self._num_over_age(version), len(batch))
        assert not (self._drops and num_over_age), f"over-age at version {version}: {batch[0].key}; drop_over_age first"
        self._remove(batch)
        return batch

    def waiting_for(self, version: int, running: Sequence[LeaseRecord]) -> str:
        """Why no batch can be taken, in words; empty when one can. `running` is `LeaseBook.running()`."""
        size = self._pacing.groups_per_step
        if (missing := self._num_missing()) > 0:
            return (
                f"version {version} waits for {missing} more groups: {len(self)} of {size} are buffered, "
                f"{_some_leases(running)}"
            )
        by_version: dict[int, int] = {}
        for lease in running:
            by_version[lease.issued_version] = by_version.get(lease.issued_version, 0) + 1
        issued = self._straggling(version, by_version)
        if issued is None:
            return ""
        stragglers = [lease for lease in running if lease.issued_version <= issued]
        surplus = len(stragglers) - max(0, (issued + self._pacing.max_age - version) * size)
        return (
            f"version {version} waits for {surplus} of {len(stragglers)} leases issued at version {issued} "
            f"or before, which would be older than max_age={self._pacing.max_age} when their turn comes: "
            f"{_some_leases(stragglers)}"
        )

    def dropped_by_length_decile(self) -> list[float]:
        """Dropped rollouts per tenth of all rollouts by length, shortest first; fair drops are even."""
        return self._dropped_lengths.by_decile_of(self._lengths)

    def _num_missing(self) -> int:
        return self._pacing.groups_per_step - len(self._groups)

    def _straggling(self, version: int, running_by_version: Mapping[int, int]) -> int | None:
        newest = self._groups[self._pacing.groups_per_step - 1].oldest_version
        return self._pacing.straggling_version(version, newest, running_by_version)

    def _num_over_age(self, version: int) -> int:
        first_fresh = version - self._pacing.max_age
        return bisect.bisect_left(self._groups, first_fresh, key=lambda group: group.oldest_version)

    def _remove(self, oldest: list[StoredGroup]) -> None:
        del self._groups[: len(oldest)]
        for group in oldest:
            self._ordinals.remove(group.ordinal)
            self.num_bytes -= len(group.body)


def _oldest_first(group: StoredGroup) -> tuple[int, int]:
    return (group.oldest_version, group.ordinal)


def _some_leases(leases: Sequence[LeaseRecord], limit: int = 5) -> str:
    if not leases:
        return "no lease is running"
    names = [f"{lease.key.ordinal}.{lease.key.attempt} at {lease.holder}" for lease in leases[:limit]]
    more = f" and {len(leases) - limit} more" if len(leases) > limit else ""
    return f"running: {', '.join(names)}{more}"
