"""The clipped loss against worked tokens and plain autograd; aggregation as a property of splits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.corrections import truncated_importance_weights
from asyncrl.algorithms.losses import AGGREGATIONS, aggregate_loss, merge_sums, ppo_clip_loss
from asyncrl.errors import ConfigError, ShapeError


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def clip_loss(ratios, advantages, **kwargs):
    """Loss and gradient towards log pi for given ratios, at log mu = 0."""
    logprobs = torch.as_tensor(ratios, dtype=torch.float64).log().requires_grad_()
    kwargs = {"clip_low": 0.2, "clip_high": 0.2, **kwargs}
    losses, sums = ppo_clip_loss(logprobs, torch.zeros_like(logprobs), f64(*advantages), **kwargs)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, sums


def test_three_tokens_by_hand():
    losses, gradient, sums = clip_loss([1.5, 0.5, 4.0], [1, -1, -1], ratio_cap=2.0)
    # 1: A > 0, clipped at 1.2. 2: A < 0, clipped at 0.8. 3: A < 0, truncated to weight 2, gradient kept.
    torch.testing.assert_close(losses, f64(-1.2, 0.8, 2.0))
    torch.testing.assert_close(gradient, f64(0.0, 0.0, 2.0))
    assert sums["clipped"] == 2
    assert sums["capped"] == 1
    assert sums["ratio_max"] == pytest.approx(4.0)
    assert sums["ratio_sum"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "weight"),
    [
        # The table of the docstring: weight of A * d log pi, clip 0.2 / 0.2, cap 3.
        (1, 0.5, 0.5), (1, 1.0, 1.0), (1, 2.0, 0.0), (1, 5.0, 0.0),
        (-1, 0.5, 0.0), (-1, 1.0, 1.0), (-1, 2.0, 2.0), (-1, 5.0, 3.0),
    ],
)  # fmt: skip
def test_the_gradient_weight_of_each_region(advantage, ratio, weight):
    _, gradient, _ = clip_loss([ratio], [advantage], ratio_cap=3.0)
    torch.testing.assert_close(gradient, f64(-advantage * weight))


def test_dual_clip_bounds_the_loss_and_switches_the_gradient_off():
    losses, gradient, sums = clip_loss([5.0, 5.0], [-1, 1], dual_clip=3.0)
    torch.testing.assert_close(losses, f64(3.0, -1.2))
    assert not gradient.any()
    assert sums["clipped"] == 2


def test_age_zero_is_the_plain_policy_gradient():
    _, gradient, sums = clip_loss([1.0, 1.0, 1.0], [1, -2, 0], ratio_cap=2.0)
    torch.testing.assert_close(gradient, f64(-1.0, 2.0, 0.0))
    assert sums["clipped"] == 0
    assert sums["log_ratio_abs_sum"] == 0


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 0.9)), min_size=1, max_size=8))
def test_without_a_cap_it_is_ppo_as_published(tokens):
    log_ratios, advantages, clips = (f64(*column) for column in zip(*tokens, strict=True))
    ours_in, plain_in = log_ratios.clone().requires_grad_(), log_ratios.clone().requires_grad_()
    ours, _ = ppo_clip_loss(ours_in, torch.zeros_like(ours_in), advantages, clip_low=clips, clip_high=clips)
    r = plain_in.exp()
    plain = -torch.minimum(r * advantages, torch.clamp(r, 1 - clips, 1 + clips) * advantages)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), ours_in)[0], torch.autograd.grad(plain.sum(), plain_in)[0]
    )


def test_decoupled_ppo_is_the_same_function_with_proximal_log_probs_and_weights():
    # mu = 1, prox = 3 and cap 2 -> weight 2; pi = prox, so the ratio is 1: loss -2 A, gradient -2 A.
    proximal = f64(3.0).log()
    logprobs = proximal.clone().requires_grad_()
    weights = truncated_importance_weights(proximal, f64(0.0), 2.0)
    losses, _ = ppo_clip_loss(logprobs, proximal, f64(1.0), clip_low=0.2, clip_high=0.2, weights=weights)
    torch.testing.assert_close(losses.detach(), f64(-2.0))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logprobs)[0], f64(-2.0))


@pytest.mark.parametrize("log_ratio", [-math.inf, -30.0, 30.0, 400.0, math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_extreme_ratios_give_finite_losses(log_ratio, advantage, cap):
    losses, _ = ppo_clip_loss(
        torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]),
        clip_low=0.2, clip_high=0.2, ratio_cap=cap,
    )  # fmt: skip
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_nan_log_prob_makes_a_nan_loss_never_a_zero(advantage):
    losses, sums = ppo_clip_loss(
        torch.tensor([math.nan, 0.0]), torch.zeros(2), torch.tensor([advantage, 1.0]),
        clip_low=0.2, clip_high=0.2, ratio_cap=2.0,
    )  # fmt: skip
    assert torch.isnan(losses[0])
    assert torch.isnan(sums["ratio_sum"])


def test_no_tokens_give_a_zero_loss_with_a_graph():
    logprobs = torch.zeros(0, requires_grad=True)
    losses, sums = ppo_clip_loss(logprobs, torch.zeros(0), torch.zeros(0), clip_low=0.2, clip_high=0.2)
    total = aggregate_loss(losses, torch.zeros(0, dtype=torch.int64), num_tokens=3, num_sequences=1)
    assert total.item() == 0.0
    total.backward()
    assert "ratio_max" not in sums


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match=r"advantages \(2,\)"):
        ppo_clip_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2), clip_low=0.2, clip_high=0.2)
    with pytest.raises(ShapeError):
        aggregate_loss(torch.zeros(3), torch.zeros(2, dtype=torch.int64), num_tokens=3, num_sequences=1)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ConfigError, match="'mean' is not one of token-mean"):
        aggregate_loss(torch.zeros(1), torch.zeros(1, dtype=torch.int64), num_tokens=1, num_sequences=1, mode="mean")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 6 / 3),
        ("seq-mean-token-mean", (1.5 + 3) / 2),
        ("seq-mean-token-sum", 6 / 2),
        ("seq-mean-token-sum-norm", 6 / (2 * 10)),
    ],
)
def test_aggregations_of_three_tokens_by_hand(mode, expected):
    got = aggregate_loss(f64(1, 2, 3), torch.tensor([0, 0, 1]), num_tokens=3, num_sequences=2, mode=mode, max_tokens=10)
    assert got.item() == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    mode=st.sampled_from(AGGREGATIONS),
)
def test_parts_of_any_split_add_up_to_the_whole(lengths, cut, mode):
    generator = torch.Generator().manual_seed(sum(lengths))
    losses = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]

    def part(some):
        index = torch.tensor([i for i, one in enumerate(some) for _ in one], dtype=torch.int64)
        flat = torch.cat([*some, f64()])
        return aggregate_loss(flat, index, num_tokens=sum(lengths), num_sequences=len(lengths), mode=mode, max_tokens=7)

    torch.testing.assert_close(part(losses[:cut]) + part(losses[cut:]), part(losses))


def test_sums_of_parts_merge_to_the_sums_of_the_whole():
    logprobs, behaviour = torch.randn(6), torch.randn(6)
    advantages = torch.randn(6)

    def sums(rows):
        return ppo_clip_loss(
            logprobs[rows], behaviour[rows], advantages[rows], clip_low=0.2, clip_high=0.2, ratio_cap=2.0
        )[1]

    merged = merge_sums(merge_sums({}, sums(slice(0, 2))), sums(slice(2, 6)))
    whole = sums(slice(0, 6))
    assert merged.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name])
