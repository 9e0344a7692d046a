"""Which ordinals wait to be leased, against a set that is sorted anew each time."""

from __future__ import annotations

import random

import pytest

from asyncrl.replay.waiting_prompts import WaitingPrompts


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_that_are_due_come_first_whatever_comes_and_goes(seed):
    rng = random.Random(seed)
    start = rng.sample(range(400), 150)
    waiting, due, later = WaitingPrompts(start), set(start), {}
    for now in range(600):
        ordinal = rng.randrange(400)
        if ordinal in due or ordinal in later:
            waiting.discard(ordinal)
            due.discard(ordinal)
            later.pop(ordinal, None)
        else:
            not_before = now + rng.choice([0, 0, 3, 20])
            waiting.add(ordinal, not_before, now)
            if not_before > now:
                later[ordinal] = not_before
            else:
                due.add(ordinal)
        due |= {number for number, at in later.items() if at <= now}
        later = {number: at for number, at in later.items() if at > now}
        assert waiting.first(now) == min(due, default=None)
        assert waiting.next_time(now) == min(later.values(), default=float("inf"))
        assert len(waiting) == len(due) + len(later)
        assert (ordinal in waiting) == (ordinal in due or ordinal in later)
        some = waiting.some_due(10)
        assert some == sorted(due)[: len(some)] and (len(some) > 0) == bool(due)
        assert len(waiting._due) <= 2 * len(due) + 400 + 64


def test_of_many_that_were_leased_in_turn_the_next_ones_are_known():
    waiting = WaitingPrompts(range(10_000))
    for ordinal in range(6_000):
        assert waiting.first(0.0) == ordinal
        waiting.discard(ordinal)
        if ordinal % 100 == 99:
            waiting.first(0.0)
            assert waiting.some_due(256) == list(range(ordinal + 1, ordinal + 257))
