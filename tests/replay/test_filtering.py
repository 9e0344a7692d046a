"""Which groups are left out because their rewards are all equal, and when that ends."""

from __future__ import annotations

import numpy as np
import pytest

from asyncrl.replay.filtering import MAX_FILTERED_PER_GROUP, DynamicSampling, has_equal_rewards
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan


def group(*rewards, baseline=None):
    tokens, logprobs = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
    rollouts = [Rollout(tokens, logprobs, (VersionSpan(0, 1, 0),), FinishReason.STOP, reward) for reward in rewards]
    return Group(LeaseKey(LeaseKind.TRAIN, 0, 0), np.zeros(1, dtype=np.int32), rollouts, baseline)


@pytest.mark.parametrize(
    ("item", "equal"),
    [
        (group(1.0, 1.0, 1.0), True),
        (group(0.0, 0.0), True),
        (group(1.0, 1.0, 0.0), False),
        (group(0.1 + 0.2, 0.3), False),
        (group(1.0), False),
        (group(1.0, 1.0, baseline=1.0), True),
        (group(1.0, 1.0, baseline=0.0), False),
        (group(1.0, baseline=1.0), True),
        (group(1.0, baseline=0.0), False),
    ],
)
def test_rewards_are_equal_when_no_two_of_those_that_are_compared_differ(item, equal):
    assert has_equal_rewards(item) is equal


def test_groups_whose_rewards_differ_are_never_left_out():
    sampling = DynamicSampling(2)
    assert not any(sampling.leaves_out(False) for _ in range(1000))


def test_when_all_rewards_are_equal_sixteen_per_group_of_a_batch_are_left_out_and_the_rest_is_taken():
    sampling = DynamicSampling(2)
    decisions = [sampling.leaves_out(True) for _ in range(40)]
    assert decisions == [True] * 32 + [False] * 8


def test_each_group_that_differs_allows_sixteen_more():
    sampling = DynamicSampling(2)
    assert all(sampling.leaves_out(True) for _ in range(32))
    assert not sampling.leaves_out(True)
    assert not sampling.leaves_out(False)
    assert [sampling.leaves_out(True) for _ in range(17)] == [True] * 16 + [False]


def test_the_next_batch_has_its_own_bound():
    sampling = DynamicSampling(1)
    for _ in range(3):
        assert [sampling.leaves_out(True) for _ in range(17)] == [True] * 16 + [False]
        sampling.batch_taken()


@pytest.mark.parametrize("one_in", [2, 10, 17, 18, 100, 10**9])
@pytest.mark.parametrize("groups_per_step", [1, 4])
def test_a_batch_is_full_after_a_bounded_number_of_groups(one_in, groups_per_step):
    """However rare a signal is: one group in `one_in`."""
    sampling = DynamicSampling(groups_per_step)
    taken = left_out = 0
    while taken < groups_per_step:
        rewards_are_equal = (taken + left_out + 1) % one_in != 0
        if sampling.leaves_out(rewards_are_equal):
            left_out += 1
        else:
            taken += 1
    assert left_out <= 2 * MAX_FILTERED_PER_GROUP * groups_per_step
