"""Advantages against worked examples and slow loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.advantages import gae, group_relative_advantages, zero_variance_groups
from asyncrl.errors import NonFiniteError, ShapeError


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
    assert zero_variance_groups(rewards, index, 1).tolist() == [True]


def test_a_group_of_one_and_a_group_of_none_are_flat():
    rewards, index = f64(3, 1, 2), torch.tensor([0, 2, 2])
    assert zero_variance_groups(rewards, index, 3).tolist() == [True, True, False]
    advantages = group_relative_advantages(rewards, index, 3)
    assert advantages[0] == 0.0
    assert torch.isfinite(advantages).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error_not_a_zero(bad):
    with pytest.raises(NonFiniteError, match="rewards"):
        group_relative_advantages(f64(1, bad, 0), ONE_GROUP, 1)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match="group_index"):
        group_relative_advantages(f64(1, 2), ONE_GROUP, 1)
    with pytest.raises(ShapeError, match=r"\[B, T\]"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))


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


def slow_gae(rewards, values, gamma, lam):
    """One row, straight from the sum: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(values))
    ]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_gae_of_three_tokens_by_hand():
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(f64(0, 0, 1)[None], f64(0.5, 0.5, 0.5)[None], mask)
    torch.testing.assert_close(advantages, f64(0.5, 0.5, 0.5)[None])
    torch.testing.assert_close(returns, f64(1, 1, 1)[None])
    # lam = 0: one-step errors 0.5 - 0.5, 0.5 - 0.5, 1 - 0.5.
    advantages, _ = gae(f64(0, 0, 1)[None], f64(0.5, 0.5, 0.5)[None], mask, lam=0.0)
    torch.testing.assert_close(advantages, f64(0, 0, 0.5)[None])


def test_gae_of_an_empty_row_is_zero():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    advantages, returns = gae(torch.ones(1, 3), torch.ones(1, 3), mask)
    assert not advantages.any()
    assert not returns.any()


@settings(max_examples=50, deadline=None)
@given(data=st.data(), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_of_padded_rows_equals_the_sum_of_each_row(data, gamma, lam):
    width = 6
    spans = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    rewards = torch.randn(len(spans), width, generator=generator, dtype=torch.float64)
    values = torch.randn(len(spans), width, generator=generator, dtype=torch.float64)
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, (start, length) in enumerate(spans):
        inside = slice(start, start + length)
        expected = slow_gae(rewards[row, inside].tolist(), values[row, inside].tolist(), gamma, lam)
        torch.testing.assert_close(advantages[row, inside], f64(*expected), rtol=1e-9, atol=1e-9)
    assert not advantages[~mask].any()
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0.0))
