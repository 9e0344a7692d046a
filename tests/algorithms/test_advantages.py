"""Advantages against worked examples and slow loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import (
    group_relative_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    whiten,
    zero_variance_groups,
)
from asyncrl.errors import NonFiniteError, ShapeError

pytestmark = pytest.mark.numeric


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


ONE_GROUP = torch.zeros(3, dtype=torch.int64)


def test_three_rewards_by_hand():
    # mean 1/3; unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3; std 0.57735.
    std = math.sqrt(1 / 3)
    with_std = group_relative_advantages(f64(1, 0, 0), ONE_GROUP, 1, epsilon=0.0)
    torch.testing.assert_close(with_std, f64(2 / 3, -1 / 3, -1 / 3) / std)
    without = group_relative_advantages(f64(1, 0, 0), ONE_GROUP, 1, normalize_std=False)
    torch.testing.assert_close(without, f64(2 / 3, -1 / 3, -1 / 3))


def test_groups_do_not_see_each_other_and_may_be_interleaved():
    rewards, index = f64(1, 10, 0, 30), torch.tensor([0, 1, 0, 1])
    got = group_relative_advantages(rewards, index, 2, normalize_std=False)
    torch.testing.assert_close(got, f64(0.5, -10, -0.5, 10))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -7.3, 1e9])
def test_equal_rewards_give_exactly_zero_not_amplified_rounding(reward):
    rewards = torch.full((7,), reward, dtype=torch.float32)
    index = torch.zeros(7, dtype=torch.int64)
    assert not group_relative_advantages(rewards, index, 1, epsilon=1e-12).any()
    assert not rloo_advantages(rewards, index, 1).any()
    assert not reinforce_pp_advantages(rewards, epsilon=1e-12).any()
    assert not reinforce_pp_advantages(rewards, epsilon=1e-12, group_index=index, num_groups=1).any()
    assert not whiten(rewards, epsilon=1e-12).any()
    assert zero_variance_groups(rewards, index, 1).tolist() == [True]


def test_a_group_of_one_and_a_group_of_none_are_flat():
    rewards, index = f64(3, 1, 2), torch.tensor([0, 2, 2])
    assert zero_variance_groups(rewards, index, 3).tolist() == [True, True, False]
    advantages = group_relative_advantages(rewards, index, 3)
    assert advantages[0] == 0.0
    assert torch.isfinite(advantages).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_not_a_zero(bad):
    rewards = f64(1, bad, 0)
    for function in (
        lambda: group_relative_advantages(rewards, ONE_GROUP, 1),
        lambda: rloo_advantages(rewards, ONE_GROUP, 1),
        lambda: reinforce_pp_advantages(rewards),
        lambda: reinforce_pp_advantages(rewards, group_index=ONE_GROUP, num_groups=1),
        lambda: remax_advantages(rewards, f64(0, 0, 0)),
    ):
        with pytest.raises(NonFiniteError, match="rewards"):
            function()
    with pytest.raises(NonFiniteError, match="baselines"):
        remax_advantages(f64(0, 0, 0), rewards)
    with pytest.raises(NonFiniteError, match="whiten"):
        whiten(rewards)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match="group_index"):
        group_relative_advantages(f64(1, 2), ONE_GROUP, 1)
    with pytest.raises(ShapeError, match="group_index"):
        rloo_advantages(f64(1, 2), ONE_GROUP, 1)
    with pytest.raises(ShapeError, match="group_index"):
        reinforce_pp_advantages(f64(1, 2), group_index=ONE_GROUP, num_groups=1)
    with pytest.raises(ShapeError, match=r"\[R\]"):
        reinforce_pp_advantages(f64(1, 2)[None])
    with pytest.raises(ShapeError, match="baselines"):
        remax_advantages(f64(1, 2), f64(1))
    with pytest.raises(ShapeError, match="mask"):
        whiten(f64(1, 2), torch.ones(3, dtype=torch.bool))


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=5),
    normalize=st.booleans(),
)
def test_equals_a_loop_over_groups(groups, normalize):
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    index = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    got = group_relative_advantages(rewards, index, len(groups), normalize_std=normalize)
    expected = []
    for group in groups:
        centred = torch.tensor(group, dtype=torch.float64) - sum(group) / len(group)
        if len(set(group)) < 2:
            centred = torch.zeros(len(group), dtype=torch.float64)
        elif normalize:
            centred = centred / (torch.tensor(group, dtype=torch.float64).std() + 1e-6)
        expected.append(centred)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-9, atol=1e-9)


GROUPS = st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), min_size=1, max_size=5)


def flatten(groups):
    """Rewards and group_index of a list of groups."""
    rewards = f64(*(r for group in groups for r in group))
    return rewards, torch.tensor([g for g, group in enumerate(groups) for _ in group])


def slow_std(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def test_rloo_of_three_rewards_by_hand():
    # Means of the others: 0.25, 0.75, 0.5.
    torch.testing.assert_close(rloo_advantages(f64(1, 0, 0.5), ONE_GROUP, 1), f64(0.75, -0.75, 0))


@settings(max_examples=50, deadline=None)
@given(groups=GROUPS)
def test_rloo_equals_a_loop_over_the_others_and_a_group_of_one_is_zero(groups):
    rewards, index = flatten(groups)
    expected = []
    for group in groups:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            expected.append(reward - sum(others) / len(others) if others else 0.0)
    got = rloo_advantages(rewards, index, len(groups))
    torch.testing.assert_close(got, f64(*expected), rtol=1e-9, atol=1e-9)
    for g, group in enumerate(groups):
        if len(set(group)) == 1:
            assert got[index == g].tolist() == [0.0] * len(group)


def test_reinforce_pp_of_three_rewards_by_hand():
    # mean 1/3, unbiased std 0.57735.
    got = reinforce_pp_advantages(f64(1, 0, 0), epsilon=0.0)
    torch.testing.assert_close(got, f64(2 / 3, -1 / 3, -1 / 3) / math.sqrt(1 / 3))
    # Minus the group's mean (0.5, -0.5, 0), std 0.5.
    got = reinforce_pp_advantages(f64(1, 0, 0), epsilon=0.0, group_index=torch.tensor([0, 0, 1]), num_groups=2)
    torch.testing.assert_close(got, f64(1, -1, 0))


@settings(max_examples=50, deadline=None)
@given(groups=GROUPS, with_baseline=st.booleans())
def test_reinforce_pp_equals_a_loop_over_the_batch(groups, with_baseline):
    rewards, index = flatten(groups)
    kwargs = {"group_index": index, "num_groups": len(groups)} if with_baseline else {}
    got = reinforce_pp_advantages(rewards, epsilon=0.01, **kwargs)
    if with_baseline:
        groups = [[r - sum(group) / len(group) if len(set(group)) > 1 else 0.0 for r in group] for group in groups]
    values = [value for group in groups for value in group]
    mean = sum(values) / len(values)
    expected = [(v - mean) / (slow_std(values) + 0.01) if len(set(values)) > 1 else 0.0 for v in values]
    torch.testing.assert_close(got, f64(*expected), rtol=1e-9, atol=1e-9)
    if with_baseline:  # flat groups stay exactly zero, whatever the rest of the batch is
        for g, group in enumerate(groups):
            if not any(group):
                assert not got[index == g].any()


def test_remax_of_three_rewards_by_hand():
    got = remax_advantages(f64(1, 0, 0.5), f64(0.5, 0.5, 0.5))
    torch.testing.assert_close(got, f64(0.5, -0.5, 0))


def test_a_greedy_completion_without_a_reward_is_an_error_with_its_remedy():
    with pytest.raises(NonFiniteError, match="1 of 3 values of baselines .leave out groups whose greedy"):
        remax_advantages(f64(1, 0, 0), f64(0, math.nan, 0))


def test_whitening_three_values_by_hand():
    torch.testing.assert_close(whiten(f64(1, 2, 3), epsilon=0.0), f64(-1, 0, 1))
    # The masked value neither counts nor is changed into anything but 0.
    mask = torch.tensor([[True, True], [True, False]])
    got = whiten(torch.stack([f64(1, 2), f64(3, math.nan)]), mask, epsilon=0.0)
    torch.testing.assert_close(got, torch.stack([f64(-1, 0), f64(1, 0)]))


def test_whitening_one_value_or_none_gives_zero_or_nothing():
    assert whiten(f64(7)).tolist() == [0.0]
    assert whiten(f64()).shape == (0,)
    assert not whiten(f64(1, 2), torch.zeros(2, dtype=torch.bool)).any()


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-5, 5), min_size=2, max_size=20), epsilon=st.floats(0, 0.1))
def test_whitening_equals_a_loop_and_has_mean_0_and_std_1(values, epsilon):
    if slow_std(values) < 1e-3:
        values = [0.0, *values[1:], 1.0]
    got = whiten(f64(*values), epsilon=epsilon)
    mean, std = sum(values) / len(values), slow_std(values)
    torch.testing.assert_close(got, f64(*((v - mean) / (std + epsilon) for v in values)), rtol=1e-9, atol=1e-9)
    assert got.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert got.std().item() == pytest.approx(std / (std + epsilon))


@settings(max_examples=50, deadline=None)
@given(groups=GROUPS, shift=st.integers(-3, 3), seed=st.integers(0, 99))
def test_order_and_a_constant_added_to_all_rewards_change_nothing(groups, shift, seed):
    rewards, index = flatten(groups)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    methods = (
        lambda r, i: group_relative_advantages(r, i, len(groups), epsilon=0.01),
        lambda r, i: group_relative_advantages(r, i, len(groups), normalize_std=False),
        lambda r, i: rloo_advantages(r, i, len(groups)),
        lambda r, i: reinforce_pp_advantages(r, epsilon=0.01),
        lambda r, i: reinforce_pp_advantages(r, epsilon=0.01, group_index=i, num_groups=len(groups)),
    )
    for method in methods:
        expected = method(rewards, index)
        torch.testing.assert_close(method(rewards[order], index[order]), expected[order], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(method(rewards + shift, index), expected, rtol=1e-6, atol=1e-6)
    baselines = torch.arange(len(rewards), dtype=torch.float64)
    torch.testing.assert_close(
        remax_advantages(rewards + shift, baselines + shift), remax_advantages(rewards, baselines)
    )
