"""Importance ratios: truncation, its gradient, and the effective sample size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.corrections import (
    age_cap,
    age_clip,
    effective_sample_share,
    interpolated_proximal_logprobs,
    log_importance_ratios,
    sequence_truncated_weights,
    truncated_ratios,
)
from asyncrl.errors import ShapeError

pytestmark = pytest.mark.numeric


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


def share_of(weights):
    return effective_sample_share(weights.sum(), weights.square().sum(), weights.numel())


def test_differing_shapes_are_refused():
    with pytest.raises(ShapeError, match="behaviour_logprobs"):
        log_importance_ratios(torch.zeros(3), torch.zeros(2))


def test_effective_sample_share_by_hand():
    assert share_of(torch.ones(3)).item() == pytest.approx(1.0)
    assert share_of(torch.tensor([3.0, 0.0, 0.0])).item() == pytest.approx(1 / 3)
    # (1 + 2 + 3)^2 / (3 (1 + 4 + 9)) = 36 / 42
    assert share_of(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(36 / 42)


def test_without_weights_nothing_was_measured():
    assert math.isnan(share_of(torch.zeros(0)).item())
    assert math.isnan(share_of(torch.zeros(3)).item())


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.integers(0, 20))
def test_the_share_lies_between_one_nth_and_one_and_adds_up_from_parts(weights, cut):
    weights = torch.tensor(weights, dtype=torch.float64)
    share = share_of(weights)
    assert 1 / len(weights) - 1e-9 <= share <= 1 + 1e-9
    parts = [weights[:cut], weights[cut:]]
    from_sums = effective_sample_share(sum(p.sum() for p in parts), sum(p.square().sum() for p in parts), len(weights))
    torch.testing.assert_close(from_sums, share)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.5, 10)), max_size=8))
def test_a_cap_per_token_is_the_cap_of_each_token_gradient_included(tokens):
    log_ratios = f64(*[log_ratio for log_ratio, _ in tokens]).requires_grad_()
    caps = f64(*[cap for _, cap in tokens])
    ours = truncated_ratios(log_ratios, caps)
    (gradient,) = torch.autograd.grad(ours.sum(), log_ratios)
    one_by_one = [truncated_ratios(f64(log_ratio), cap).item() for log_ratio, cap in tokens]
    assert ours.tolist() == pytest.approx(one_by_one)
    assert gradient.tolist() == pytest.approx(one_by_one)  # d min(rho, cap) = min(rho, cap) d log pi


@pytest.mark.parametrize("log_ratio", [-math.inf, -30.0, 30.0, 500.0, math.inf])
def test_extreme_ratios_under_a_cap_per_token(log_ratio):
    value = truncated_ratios(torch.tensor([log_ratio]), torch.tensor([2.0]))
    torch.testing.assert_close(value, torch.tensor([min(math.exp(min(log_ratio, 700.0)), 2.0)]), rtol=1e-5, atol=1e-12)


def test_a_cap_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match="cap"):
        truncated_ratios(torch.zeros(3), torch.ones(2))


def test_sequence_weights_of_three_tokens_by_hand():
    log_ratios, index = f64(2.0, 2.0, 0.5).log().requires_grad_(), torch.tensor([0, 0, 1])
    weights = sequence_truncated_weights(log_ratios, index, 3.0)
    torch.testing.assert_close(weights, f64(3.0, 3.0, 0.5))
    assert not weights.requires_grad
    torch.testing.assert_close(sequence_truncated_weights(log_ratios, index, 3.0, mean=True), f64(2.0, 2.0, 0.5))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-4, 4), min_size=1, max_size=4), max_size=4),
    st.floats(0.5, 8),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_sequence_weights_equal_the_loop_in_any_order_of_tokens(sequences, cap, mean, random):
    expected = []
    for number, sequence in enumerate(sequences):
        product = math.prod(math.exp(x) for x in sequence)
        ratio = product ** (1 / len(sequence)) if mean else product
        expected += [(number, x, min(ratio, cap)) for x in sequence]
    random.shuffle(expected)
    index = torch.tensor([number for number, _, _ in expected], dtype=torch.int64)
    weights = sequence_truncated_weights(f64(*[x for _, x, _ in expected]), index, cap, mean=mean)
    assert weights.tolist() == pytest.approx([weight for _, _, weight in expected])


def test_one_impossible_token_makes_the_weight_of_its_sequence_zero_and_of_no_other():
    log_ratios, index = torch.tensor([-math.inf, 1.0, 30.0, 30.0]), torch.tensor([0, 0, 1, 1])
    for mean in (False, True):
        assert sequence_truncated_weights(log_ratios, index, 2.0, mean=mean).tolist() == pytest.approx(
            [0, 0, 2, 2], rel=1e-5
        )
    nan = sequence_truncated_weights(torch.tensor([math.nan, 1.0, 0.0]), torch.tensor([0, 0, 1]), 2.0)
    assert torch.isnan(nan).tolist() == [True, True, False]


def test_interpolated_proximal_logprobs_by_hand():
    logprobs, behaviour = f64(-1.0, -1.0, -1.0).requires_grad_(), f64(-2.0, -2.0, -2.0)
    proximal = interpolated_proximal_logprobs(logprobs, behaviour, torch.tensor([0, 1, 3]))
    torch.testing.assert_close(proximal, f64(-2.0, -1.5, -1.25))
    assert not proximal.requires_grad


def test_the_ratio_to_an_interpolated_proximal_policy_is_one_of_equal_steps():
    logprobs, behaviour, ages = f64(-0.3, -5.0, -2.0), f64(-1.7, -0.1, -2.0), torch.tensor([4, 9, 63])
    steps = logprobs - interpolated_proximal_logprobs(logprobs, behaviour, ages)
    torch.testing.assert_close(steps * (ages + 1), logprobs - behaviour)


def test_interpolation_refuses_differing_shapes():
    with pytest.raises(ShapeError, match="policy_ages"):
        interpolated_proximal_logprobs(torch.zeros(3), torch.zeros(3), torch.zeros(2, dtype=torch.int64))


def test_age_schedules_by_hand():
    torch.testing.assert_close(age_cap(3.0, torch.tensor([0, 1, 3])), torch.tensor([3.0, 2.0, 1.5]))
    torch.testing.assert_close(age_clip(0.2, torch.tensor([0, 3, 8])), torch.tensor([0.2, 0.1, 0.2 / 3]))


def test_age_schedules_tighten_with_age_and_never_below_one_and_zero():
    ages = torch.arange(200)
    caps, clips = age_cap(5.0, ages), age_clip(0.2, ages)
    assert (caps.diff() < 0).all() and (caps > 1.0).all()
    assert (clips.diff() < 0).all() and (clips > 0.0).all()
    assert (age_cap(1.0, ages) == 1.0).all()
    assert age_cap(2.0, ages[:0]).shape == age_clip(0.2, ages[:0]).shape == (0,)
