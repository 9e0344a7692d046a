"""Importance ratios: truncation, its gradient, and the effective sample size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.algorithms.corrections import (
    effective_sample_share,
    effective_sample_share_from_sums,
    log_importance_ratios,
    truncated_importance_weights,
    truncated_ratios,
)
from asyncrl.errors import ShapeError


def test_three_tokens_by_hand():
    # rho = (0.5, 1, 4), cap 2.
    logprobs = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).log().requires_grad_()
    ratios = truncated_ratios(log_importance_ratios(logprobs, torch.zeros(3, dtype=torch.float64)), 2.0)
    torch.testing.assert_close(ratios.detach(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(ratios.sum(), logprobs)
    # Unlike a clamp, the truncated token keeps a gradient, of weight 2.
    torch.testing.assert_close(gradient, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("log_ratio", [-math.inf, -30.0, 30.0, 500.0, math.inf])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_extreme_ratios_neither_overflow_nor_become_nan(log_ratio, cap):
    value = truncated_ratios(torch.tensor([log_ratio]), cap)
    limit = math.exp(20.0) if cap is None else cap
    expected = min(math.exp(min(log_ratio, 700.0)), limit)
    torch.testing.assert_close(value, torch.tensor([expected]), rtol=1e-5, atol=1e-12)


def test_nan_stays_nan():
    assert torch.isnan(truncated_ratios(torch.tensor([math.nan]), 2.0)).all()


def test_weights_have_no_gradient():
    logprobs = torch.zeros(2, requires_grad=True)
    weights = truncated_importance_weights(logprobs, torch.tensor([-3.0, 0.0]), 2.0)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0]))


def test_differing_shapes_are_refused():
    with pytest.raises(ShapeError, match="behaviour_logprobs"):
        log_importance_ratios(torch.zeros(3), torch.zeros(2))


def test_effective_sample_share_by_hand():
    assert effective_sample_share(torch.ones(3)).item() == pytest.approx(1.0)
    assert effective_sample_share(torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(1 / 3)
    # (1 + 2 + 3)^2 / (3 (1 + 4 + 9)) = 36 / 42
    assert effective_sample_share(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(36 / 42)


def test_without_weights_nothing_was_measured():
    assert math.isnan(effective_sample_share(torch.zeros(0)).item())
    assert math.isnan(effective_sample_share(torch.zeros(3)).item())


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.integers(0, 20))
def test_the_share_lies_between_one_nth_and_one_and_adds_up_from_parts(weights, cut):
    weights = torch.tensor(weights, dtype=torch.float64)
    share = effective_sample_share(weights)
    assert 1 / len(weights) - 1e-9 <= share <= 1 + 1e-9
    parts = [weights[:cut], weights[cut:]]
    from_sums = effective_sample_share_from_sums(
        sum(p.sum() for p in parts), sum(p.square().sum() for p in parts), len(weights)
    )
    torch.testing.assert_close(from_sums, share)
