"""KL estimators: worked values, their expectation, and extremes."""

import math

import pytest
import torch

from asyncrl.algorithms.kl import KL_ESTIMATORS, adapted_kl_coef, kl_estimate
from asyncrl.errors import ConfigError, NonFiniteError, ShapeError

pytestmark = pytest.mark.numeric

LOGPROBS = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
REFERENCE = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # d = log pi_ref - log pi = (0, -1, 1)
        ("k1", [0.0, 1.0, -1.0]),
        ("k2", [0.0, 0.5, 0.5]),
        ("k3", [0.0, math.exp(-1), math.e - 2]),
        ("abs", [0.0, 1.0, 1.0]),
    ],
)
def test_three_tokens_by_hand(estimator, expected):
    got = kl_estimate(LOGPROBS, REFERENCE, estimator)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expectation_of_k1_and_k3_is_the_exact_kl(estimator):
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_same_policy_has_no_divergence_and_no_gradient_in_k2_and_k3(estimator):
    logprobs = LOGPROBS.clone().requires_grad_()
    value = kl_estimate(logprobs, LOGPROBS, estimator)
    assert not value.any()
    if estimator in ("k2", "k3"):
        (gradient,) = torch.autograd.grad(value.sum(), logprobs)
        assert not gradient.any()


def test_k3_is_never_negative_and_precise_near_zero_in_float32():
    d = torch.tensor([-1e-3, -1e-4, 0.0, 1e-4, 1e-3])
    k3 = kl_estimate(torch.zeros(5), d, "k3")
    assert (k3 >= 0).all()
    torch.testing.assert_close(k3, d.square() / 2, rtol=1e-2, atol=1e-11)


@pytest.mark.parametrize("d", [30.0, -30.0, 500.0])
def test_k3_of_far_apart_policies_stays_finite_with_a_finite_gradient(d):
    logprobs = torch.zeros(1, requires_grad=True)
    k3 = kl_estimate(logprobs, torch.tensor([d]), "k3")
    (gradient,) = torch.autograd.grad(k3.sum(), logprobs)
    assert torch.isfinite(k3).all()
    assert torch.isfinite(gradient).all()


def test_nan_stays_nan():
    assert torch.isnan(kl_estimate(torch.tensor([math.nan]), torch.zeros(1), "k3")).all()


def test_no_tokens_give_no_values():
    assert kl_estimate(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_differing_shapes_and_unknown_names_are_refused():
    with pytest.raises(ShapeError):
        kl_estimate(LOGPROBS, REFERENCE[:2])
    with pytest.raises(ConfigError, match="'k4' is not one of k1, k2, k3, abs"):
        kl_estimate(LOGPROBS, REFERENCE, "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.055, 0.101), (0.05, 0.1), (0.045, 0.099), (0.5, 0.102), (0.0, 0.098), (-1.0, 0.098)],
)
def test_the_kl_coefficient_by_hand(kl, expected):
    assert adapted_kl_coef(0.1, kl, 0.05) == pytest.approx(expected)


def test_a_longer_horizon_moves_the_coefficient_less():
    assert adapted_kl_coef(0.1, 0.5, 0.05, horizon_steps=100) == pytest.approx(0.1002)


@pytest.mark.parametrize("start", [1e-3, 10.0])
def test_the_controller_brings_a_kl_that_answers_it_to_its_target(start):
    coef = start
    for _ in range(2000):
        coef = adapted_kl_coef(coef, 0.01 / coef, 0.05)
    assert 0.01 / coef == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_adapts_nothing(kl):
    with pytest.raises(NonFiniteError, match="cannot be adapted"):
        adapted_kl_coef(0.1, kl, 0.05)
