"""Leases in hand: each is reported once, however it ends, and the room for more follows the sequences left."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncrl.generator.held_leases import HeldLeases
from asyncrl.generator.lease_runner import LeaseFailure
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind


class Runner:
    """Leases that end when the test says so; `bug` is raised in their place."""

    def __init__(self, bug: Exception | None = None):
        self.release = asyncio.Event()
        self.begun: list[LeaseKey] = []
        self.left: dict[LeaseKey, int] = {}
        self._bug = bug

    async def run(self, lease):
        self.begun.append(lease.key)
        if self._bug is not None:
            raise self._bug
        await self.release.wait()
        return Group(lease.key, lease.prompt_token_ids, [])

    def sequences_left(self, lease):
        return self.left.get(lease.key, lease.num_sequences)


def lease(ordinal, num_rollouts=4):
    return Lease(
        key=LeaseKey(LeaseKind.TRAIN, ordinal, 0),
        issued_version=0,
        deadline_s=30.0,
        prompt_token_ids=np.array([5], dtype=np.int32),
        payload={},
        num_rollouts=num_rollouts,
        max_new_tokens=8,
        temperature=1.0,
    )


def with_leases(work, *, max_sequences=8, bug=None):
    """Runs `work(leases, runner)`; returns its result and the reports."""
    reports = []

    async def run():
        runner = Runner(bug)
        leases = HeldLeases(runner, max_sequences, lambda ended, outcome: reports.append((ended.key.ordinal, outcome)))
        async with asyncio.timeout(10):
            return await work(leases, runner)

    return asyncio.run(run()), reports


def test_a_lease_is_reported_when_it_is_in_hand_no_more():
    async def work(leases, runner):
        leases.take(lease(1))
        leases.take(lease(2))
        assert [held.key.ordinal for held in leases] == [1, 2]
        runner.release.set()
        while leases:
            await asyncio.sleep(0)

    _, reports = with_leases(work)
    assert [(ordinal, type(outcome)) for ordinal, outcome in reports] == [(1, Group), (2, Group)]


def test_a_lease_that_is_granted_twice_is_worked_on_once_and_counted_twice():
    async def work(leases, runner):
        leases.take(lease(1))
        leases.take(lease(1))
        await leases.give_back_all("over")
        return leases.sequences_received, runner.begun

    (received, begun), reports = with_leases(work)
    assert received == 8
    assert len(begun) <= 1 and len(reports) == 1


@pytest.mark.parametrize("turns", [0, 3], ids=["before its first step", "at work"])
def test_a_lease_that_is_given_back_is_reported_with_the_reason(turns):
    async def work(leases, runner):
        leases.take(lease(1))
        leases.take(lease(2))
        for _ in range(turns):
            await asyncio.sleep(0)
        leases.give_back([LeaseKey(LeaseKind.TRAIN, 1, 0), LeaseKey(LeaseKind.TRAIN, 9, 0)], "abandoned")
        while len(leases) == 2:
            await asyncio.sleep(0)
        await leases.give_back_all("signal")
        return len(leases)

    left, reports = with_leases(work)
    assert left == 0
    assert reports == [(1, LeaseFailure("returned", "abandoned")), (2, LeaseFailure("returned", "signal"))]


def test_a_bug_in_a_lease_is_its_failure_and_not_the_daemons():
    async def work(leases, runner):
        leases.take(lease(1))
        while leases:
            await asyncio.sleep(0)

    _, reports = with_leases(work, bug=KeyError("no such thing"))
    assert reports == [(1, LeaseFailure("engine", "KeyError: 'no such thing'"))]


def test_room_follows_the_sequences_left_and_is_bounded_by_those_in_hand():
    async def work(leases, runner):
        rooms = [leases.room()]
        for ordinal in range(10):
            leases.take(lease(ordinal))
            runner.left[lease(ordinal).key] = 1  # three of four have ended
            rooms.append(leases.room())
        await leases.give_back_all("over")
        return rooms

    rooms, _ = with_leases(work, max_sequences=8)  # a capacity of 10 with the backlog; 40 sequences in hand at most
    assert rooms == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_sequences_that_are_left_are_told_by_kind_and_every_change_is_told():
    async def work(leases, runner):
        changes, seen = [], []
        leases._on_change = lambda: changes.append(len(leases))
        leases.take(lease(1))
        seen.append((leases.samples(LeaseKind.TRAIN), leases.samples(LeaseKind.EVAL)))
        runner.left[lease(1).key] = 0
        seen.append((leases.samples(LeaseKind.TRAIN), leases.samples(LeaseKind.EVAL)))
        await leases.give_back_all("over")
        return changes, seen

    (changes, seen), _ = with_leases(work)
    assert seen == [(True, False), (False, False)]
    assert changes == [1, 0]
