"""The leases in hand: each is at work in a task of its own and ends as one group or one failure."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator

from asyncrl.generator.engines.base import nothing
from asyncrl.generator.lease_runner import LeaseFailure, LeaseRunner
from asyncrl.link.wire_types import FailureReason
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind

log = logging.getLogger(__name__)

MAX_IN_HAND = 4  # sequences of all leases, finished ones included, per sequence of capacity: bounds memory
BACKLOG_SHARE = 0.25  # leases waiting behind a full engine, so that it never runs dry between two grants

Report = Callable[[Lease, Group | LeaseFailure], None]


class HeldLeases:
    """Takes leases, runs each and reports how it ended.

    max_sequences is what the engine samples at once. `report` is called once per lease, when it is in hand no more;
    on_change, whenever there are other leases in hand than before.
    """

    def __init__(
        self, runner: LeaseRunner, max_sequences: int, report: Report, on_change: Callable[[], None] = nothing
    ) -> None:
        self.sequences_received = 0  # of all grants of this run epoch, repeated ones too: the learner counts likewise
        self._runner = runner
        self._capacity = math.ceil(max_sequences * (1 + BACKLOG_SHARE))
        self._report = report
        self._on_change = on_change
        self._leases: dict[LeaseKey, Lease] = {}
        self._tasks: dict[LeaseKey, asyncio.Task[Group | LeaseFailure]] = {}
        self._why_returned: dict[LeaseKey, str] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def take(self, lease: Lease) -> None:
        """Begins to work on a lease. One that is in hand already was granted twice, and is counted twice."""
        self.sequences_received += lease.num_sequences
        if lease.key in self._leases:
            return
        self._leases[lease.key] = lease
        task = asyncio.create_task(self._runner.run(lease))
        task.add_done_callback(functools.partial(self._ended, lease))
        self._tasks[lease.key] = task
        self._on_change()

    def room(self) -> int:
        """Sequences it could take now, a small backlog behind the full engine included."""
        # A group ends with its longest sequence. Room counted by whole leases would leave the others' slots empty.
        left = sum(self._runner.sequences_left(lease) for lease in self._leases.values())
        in_hand = sum(lease.num_sequences for lease in self._leases.values())
        return max(0, min(self._capacity - left, MAX_IN_HAND * self._capacity - in_hand))

    def give_back(self, keys: Iterable[LeaseKey], why: str) -> None:
        """Breaks off the work on these leases; each is reported as returned, and `why`. Unknown keys are ignored."""
        for key in keys:
            if task := self._tasks.get(key):
                self._why_returned[key] = why
                task.cancel()

    async def give_back_all(self, why: str) -> None:
        """Returns when no lease is in hand any more."""
        tasks = list(self._tasks.values())
        self.give_back(list(self._tasks), why)
        await asyncio.gather(*tasks, return_exceptions=True)

    def samples(self, kind: LeaseKind) -> bool:
        """Whether a lease of this kind has sequences that have not ended."""
        return any(lease.key.kind is kind and self._runner.sequences_left(lease) > 0 for lease in self._leases.values())

    def _ended(self, lease: Lease, task: asyncio.Task[Group | LeaseFailure]) -> None:
        """The end of the task, not of what runs in it: one that is cancelled before its first step runs nothing."""
        del self._leases[lease.key], self._tasks[lease.key]
        self._on_change()
        why_returned = self._why_returned.pop(lease.key, "abandoned")
        if task.cancelled():
            outcome: Group | LeaseFailure = LeaseFailure(FailureReason.RETURNED, why_returned)
        elif error := task.exception():  # a bug in a task must not leave the lease hanging until its deadline
            log.error("lease %s failed", lease.key, exc_info=error)
            outcome = LeaseFailure(FailureReason.ENGINE, f"{type(error).__name__}: {error}")
        else:
            outcome = task.result()
        self._report(lease, outcome)
