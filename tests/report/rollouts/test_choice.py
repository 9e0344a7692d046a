"""Which rollouts of a batch are kept, against a choice that could not be plainer, and of which steps."""

from __future__ import annotations

import numpy as np
import pytest

from asyncrl.report.rollouts.choice import Why, choose, is_due


def slow_choice(rewards, advantages, count, seed):
    """One rollout after the other: the best that is left, then the worst, then the next in a random order."""
    order = list(np.random.default_rng(list(seed)).permutation(len(rewards)))
    left, chosen = set(range(len(rewards))), []
    count = min(count, len(rewards))
    extremes = min((count + 1) // 3 if count > 1 else 0, len(rewards) // 2)

    def take(why, key):
        index = min(left, key=key)
        left.remove(index)
        chosen.append((index, why))

    def weight(index):
        return 0.0 if advantages is None else abs(advantages[index])

    for _ in range(extremes):
        take(Why.BEST, lambda index: (-rewards[index], -weight(index), order.index(index)))
    for _ in range(extremes):
        take(Why.WORST, lambda index: (rewards[index], -weight(index), order.index(index)))
    while len(chosen) < count:
        take(Why.RANDOM, order.index)
    return chosen


@pytest.mark.parametrize("seed", range(40))
def test_a_choice_is_that_of_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    size, count = int(rng.integers(1, 30)), int(rng.integers(1, 20))
    rewards = rng.integers(0, 3, size) / 2  # with many ties
    advantages = None if seed % 3 == 0 else np.round(rng.standard_normal(size), 1)
    assert choose(rewards, advantages, count, (7, seed)) == slow_choice(rewards, advantages, count, (7, seed))


def test_the_same_batch_gives_the_same_choice_and_another_step_another_one():
    rewards = np.zeros(64)
    assert choose(rewards, None, 12, (0, 3)) == choose(rewards, None, 12, (0, 3))
    assert choose(rewards, None, 12, (0, 3)) != choose(rewards, None, 12, (0, 4))


def test_a_third_is_best_a_third_worst_and_the_rest_random():
    choices = choose(np.arange(100.0), None, 12, (0, 0))
    assert [choice.why for choice in choices] == [Why.BEST] * 4 + [Why.WORST] * 4 + [Why.RANDOM] * 4
    assert [choice.number for choice in choices[:8]] == [99, 98, 97, 96, 0, 1, 2, 3]


@pytest.mark.parametrize(("size", "count", "kept"), [(3, 12, 3), (1, 12, 1), (5, 1, 1), (5, 2, 2), (0, 4, 0)])
def test_none_is_kept_twice_and_no_more_than_there_are(size, count, kept):
    indices = [choice.number for choice in choose(np.arange(float(size)), None, count, (0, 0))]
    assert len(indices) == len(set(indices)) == kept


def test_among_equal_rewards_the_larger_advantage_counts():
    """Of those that failed, the failure where others succeeded says more than that of a group that always fails."""
    best, worst, _ = choose(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.2, 1.0, -0.1, -2.0]), 3, (0, 0))
    assert (best.number, worst.number) == (1, 3)


def test_the_first_the_last_and_every_so_many_steps_are_due():
    assert [step for step in range(1, 48) if is_due(step, 47, 20)] == [1, 20, 40, 47]
    assert [step for step in range(1, 4) if is_due(step, 3, 1)] == [1, 2, 3]
    assert not any(is_due(step, 47, 0) for step in range(1, 48))
