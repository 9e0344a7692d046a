"""Every policy loss against worked tokens, and against a loop over tokens in plain words, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.corrections import age_cap, age_clip, truncated_ratios
from asyncrl.algorithms.losses import AGGREGATIONS, aggregate_loss
from asyncrl.algorithms.policy_losses import cispo_loss, gspo_loss, ppo_clip_loss, reinforce_loss, topr_loss
from asyncrl.errors import ConfigError, ShapeError

pytestmark = pytest.mark.numeric


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def clip_loss(ratios, advantages, **kwargs):
    """Loss and gradient towards log pi for given ratios, at log mu = 0."""
    logprobs = torch.as_tensor(ratios, dtype=torch.float64).log().requires_grad_()
    kwargs = {"clip_low": 0.2, "clip_high": 0.2, **kwargs}
    losses, is_clipped = ppo_clip_loss(logprobs, torch.zeros_like(logprobs), f64(*advantages), **kwargs)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, is_clipped.tolist()


def test_ppo_clip_of_three_tokens_by_hand():
    losses, gradient, is_clipped = clip_loss([1.5, 0.5, 4.0], [1, -1, -1], ratio_cap=2.0)
    # 1: A > 0, clipped at 1.2. 2: A < 0, clipped at 0.8. 3: A < 0, truncated to weight 2, gradient kept.
    torch.testing.assert_close(losses, f64(-1.2, 0.8, 2.0))
    torch.testing.assert_close(gradient, f64(0.0, 0.0, 2.0))
    assert is_clipped == [True, True, False]


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
    losses, gradient, is_clipped = clip_loss([5.0, 5.0], [-1, 1], dual_clip=3.0)
    torch.testing.assert_close(losses, f64(3.0, -1.2))
    assert not gradient.any()
    assert is_clipped == [True, True]


def test_age_zero_is_the_plain_policy_gradient():
    _, gradient, is_clipped = clip_loss([1.0, 1.0, 1.0], [1, -2, 0], ratio_cap=2.0)
    torch.testing.assert_close(gradient, f64(-1.0, 2.0, 0.0))
    assert not any(is_clipped)


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
    factors = truncated_ratios(proximal - f64(0.0), 2.0)
    losses, _ = ppo_clip_loss(logprobs, proximal, f64(1.0), clip_low=0.2, clip_high=0.2, loss_factors=factors)
    torch.testing.assert_close(losses.detach(), f64(-2.0))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logprobs)[0], f64(-2.0))


def with_gradient(loss, log_pi, ratios, advantages, **kwargs):
    """Losses, gradient of their sum towards log pi, and what was clipped."""
    logprobs = f64(*log_pi).requires_grad_()
    old = logprobs.detach() - f64(*ratios).log()
    losses, is_clipped = loss(logprobs, old, f64(*advantages), **kwargs)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.tolist(), gradient.tolist(), is_clipped.tolist()


THREE = ((-1.0, -1.0, -1.0), (0.5, 1.0, 8.0), (1.0, 1.0, -1.0))  # log pi, ratios, advantages


def test_clip_and_cap_may_differ_per_token():
    # Ages 0 and 3: clip 0.4 and 0.2, cap 5 and 2. A > 0 shows the clip, A < 0 the cap.
    ages = torch.tensor([0, 3, 0, 3])
    losses, _, _ = clip_loss(
        [6.0] * 4, [1, 1, -1, -1], clip_low=0.1, clip_high=age_clip(0.4, ages), ratio_cap=age_cap(5.0, ages)
    )
    torch.testing.assert_close(losses, f64(-1.4, -1.2, 5.0, 2.0))


def test_gspo_of_three_tokens_by_hand():
    loss, old = f64(0.5, 2.0, 1.5).log().requires_grad_(), torch.zeros(3, dtype=torch.float64)
    index = torch.tensor([0, 0, 1])
    losses, is_clipped = gspo_loss(loss, old, torch.ones(3).double(), index, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(losses.detach(), f64(-1.0, -1.0, -1.2))
    assert is_clipped.tolist() == [False, False, True]


def test_gspo_gradients_agree_for_one_advantage_per_sequence_and_differ_otherwise():
    index, kwargs = torch.tensor([0, 0]), {"clip_low": 0.9, "clip_high": 9.0}

    def gradient(kind, advantages):
        logprobs = f64(0.5, 2.0).log().requires_grad_()
        losses, _ = gspo_loss(logprobs, f64(0.0, 0.0), f64(*advantages), index, gradient=kind, **kwargs)
        return torch.autograd.grad(losses.sum(), logprobs)[0].tolist()

    assert gradient("sequence", (3, 3)) == pytest.approx(gradient("token", (3, 3)))
    # s = 1: the sequence's gradient spreads 1 + 3 over both tokens, the token's stays where it is.
    assert gradient("sequence", (1, 3)) == pytest.approx([-2.0, -2.0])
    assert gradient("token", (1, 3)) == pytest.approx([-1.0, -3.0])


def test_gspo_refuses_an_unknown_gradient():
    with pytest.raises(ConfigError, match="'both' is not one of sequence, token"):
        gspo_loss(*[torch.zeros(1)] * 3, torch.tensor([0]), clip_low=0.2, clip_high=0.2, gradient="both")


def test_cispo_of_three_tokens_by_hand():
    losses, gradient, is_clipped = with_gradient(cispo_loss, *THREE, clip_low=None, clip_high=4.0)
    assert losses == pytest.approx([0.5, 1.0, -5.0])
    assert gradient == pytest.approx([-0.5, -1.0, 5.0])
    assert is_clipped == [False, False, True]
    losses, gradient, is_clipped = with_gradient(cispo_loss, *THREE, clip_low=0.2, clip_high=4.0)
    assert losses == pytest.approx([0.8, 1.0, -5.0])
    assert gradient == pytest.approx([-0.8, -1.0, 5.0])
    assert is_clipped == [True, False, True]


def test_reinforce_of_three_tokens_by_hand():
    losses, gradient, is_clipped = with_gradient(reinforce_loss, *THREE, ratio_cap=5.0)
    assert losses == pytest.approx([0.5, 1.0, -5.0])
    assert gradient == pytest.approx([-0.5, -1.0, 5.0])
    assert is_clipped == [False, False, True]
    losses, gradient, is_clipped = with_gradient(reinforce_loss, *THREE, ratio_cap=5.0, importance=False)
    assert losses == pytest.approx([1.0, 1.0, -1.0])
    assert gradient == pytest.approx([-1.0, -1.0, 1.0])
    assert not any(is_clipped)
    assert with_gradient(reinforce_loss, *THREE, ratio_cap=None)[0] == pytest.approx([0.5, 1.0, -8.0])


def test_topr_of_three_tokens_by_hand():
    log_pi = (-1.0, -1.0, -1.0)
    losses, gradient, is_clipped = with_gradient(topr_loss, log_pi, (0.5, 0.5, 8.0), (1.0, -1.0, -1.0))
    assert losses == pytest.approx([1.0, -0.5, -1.0])
    assert gradient == pytest.approx([-1.0, 0.5, 1.0])
    assert is_clipped == [False, False, True]


LOW, HIGH, CAP = 0.2, 0.28, 2.0
CLIP = {"clip_low": LOW, "clip_high": HIGH}

# (log pi, log mu, A, index, weights) -> PolicyLoss
LOSSES = {
    "ppo": lambda p, q, a, i, w: ppo_clip_loss(p, q, a, **CLIP, loss_factors=w),
    "ppo, cap": lambda p, q, a, i, w: ppo_clip_loss(p, q, a, **CLIP, ratio_cap=CAP, loss_factors=w),
    "ppo, low cap": lambda p, q, a, i, w: ppo_clip_loss(p, q, a, **CLIP, ratio_cap=1.1, loss_factors=w),
    "ppo, dual clip, cap": lambda p, q, a, i, w: ppo_clip_loss(
        p, q, a, **CLIP, ratio_cap=1.3, dual_clip=1.6, loss_factors=w
    ),
    "gspo, low cap": lambda p, q, a, i, w: gspo_loss(p, q, a, i, **CLIP, ratio_cap=1.1, loss_factors=w),
    "ppo, dual clip": lambda p, q, a, i, w: ppo_clip_loss(p, q, a, **CLIP, dual_clip=1.6, loss_factors=w),
    "gspo": lambda p, q, a, i, w: gspo_loss(p, q, a, i, **CLIP, ratio_cap=1.5, loss_factors=w),
    "gspo, token": lambda p, q, a, i, w: gspo_loss(p, q, a, i, **CLIP, gradient="token", loss_factors=w),
    "cispo": lambda p, q, a, i, w: cispo_loss(p, q, a, clip_low=None, clip_high=HIGH, loss_factors=w),
    "cispo, floor": lambda p, q, a, i, w: cispo_loss(p, q, a, **CLIP, loss_factors=w),
    "reinforce": lambda p, q, a, i, w: reinforce_loss(p, q, a, ratio_cap=None, loss_factors=w),
    "reinforce, cap": lambda p, q, a, i, w: reinforce_loss(p, q, a, ratio_cap=CAP, loss_factors=w),
    "reinforce, no weights": lambda p, q, a, i, w: reinforce_loss(
        p, q, a, ratio_cap=CAP, importance=False, loss_factors=w
    ),
    "topr": lambda p, q, a, i, w: topr_loss(p, q, a, loss_factors=w),
}


CAPS = {"ppo, cap": CAP, "ppo, low cap": 1.1, "ppo, dual clip, cap": 1.3, "gspo": 1.5, "gspo, low cap": 1.1}


def slow_loss(name, p, q, a, t):
    """Loss of token t of one sequence, lists of scalars, and whether a bound acted on it: the formulas as read."""
    kind, _, variant = name.partition(", ")
    ratio = (p[t] - q[t]).exp()
    if kind == "gspo":
        ratio = (sum(x - y for x, y in zip(p, q, strict=True)) / len(p)).exp()
        if variant == "token":
            ratio = ratio.detach() * (p[t] - p[t].detach()).exp()
    if kind in ("ppo", "gspo"):
        cap = {"ppo, cap": CAP, "gspo": 1.5, "ppo, dual clip, cap": 1.3}.get(
            name, 1.1 if "low cap" in name else math.inf
        )
        plain = float(ratio.detach())
        bound = 1 + HIGH if a[t] > 0 and plain > 1 + HIGH else 1 - LOW if a[t] < 0 and plain < 1 - LOW else None
        if "dual clip" in name and a[t] < 0 and plain > 1.6:
            bound = 1.6
        if bound is not None:
            return -min(bound, cap) * a[t] + 0.0 * p[t], True
        return -(ratio / plain * min(plain, cap)) * a[t], False
    weight = float(ratio.detach())
    bounded = weight
    if kind == "cispo":
        bounded = min(weight, 1 + HIGH)
        if variant == "floor":
            bounded = max(bounded, 1 - LOW)
    elif name == "reinforce, cap":
        bounded = min(weight, CAP)
    elif name == "reinforce, no weights" or (kind == "topr" and a[t] > 0):
        bounded = weight = 1.0
    elif kind == "topr":
        bounded = min(weight, 1.0)
    return -bounded * a[t] * p[t], bounded != weight


def random_sequences(lengths, seed):
    """(log pi, log mu, A, weights) of each sequence; a token in five has weight 0."""
    draw = torch.Generator().manual_seed(seed)

    def normal(n):
        return torch.randn(n, generator=draw, dtype=torch.float64)

    def sequence(n):
        logprobs = -1.0 - normal(n).abs()
        weights = normal(n).abs() * (torch.rand(n, generator=draw) > 0.2)
        return logprobs, logprobs - normal(n), normal(n), weights

    return [sequence(n) for n in lengths]


def flat(sequences):
    """Columns of `random_sequences`, flat, with their sequence_index."""
    columns = [torch.cat([f64(), *column]) for column in zip(*sequences, strict=True)] or [f64() for _ in range(4)]
    index = [i for i, (logprobs, *_) in enumerate(sequences) for _ in logprobs]
    return *columns, torch.tensor(index, dtype=torch.int64)


LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, seed=SEEDS)
def test_values_gradients_and_clipping_equal_the_loop_over_tokens(name, lengths, seed):
    sequences = random_sequences(lengths, seed)
    logprobs, old, advantages, weights, index = flat(sequences)
    logprobs.requires_grad_()
    losses, is_clipped = LOSSES[name](logprobs, old, advantages, index, weights)

    slow, clipped, start = [], [], 0
    plain = logprobs.detach().clone().requires_grad_()
    for n, (_, q, a, w) in zip(lengths, sequences, strict=True):
        p = list(plain[start : start + n])
        start += n
        for t in range(n):
            loss, bounded = slow_loss(name, p, list(q), list(a), t)
            slow.append(w[t] * loss)
            clipped.append(bounded)
    torch.testing.assert_close(losses, torch.stack(slow))
    assert is_clipped.tolist() == clipped
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logprobs)[0], torch.autograd.grad(sum(slow), plain)[0])


def loss_and_gradients(name, mode, sequences, counts):
    logprobs, old, advantages, weights, index = flat(sequences)
    logprobs.requires_grad_()
    losses, _ = LOSSES[name](logprobs, old, advantages, index, weights)
    loss = aggregate_loss(losses, index, **counts, mode=mode, max_tokens=7)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), list(gradient.split([len(sequence[0]) for sequence in sequences]))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=12, deadline=None)
@given(lengths=LENGTHS, seed=SEEDS, data=st.data())
def test_order_and_split_of_sequences_change_neither_loss_nor_gradient(name, lengths, seed, data):
    sequences = random_sequences(lengths, seed)
    counts = {"num_tokens": sum(lengths), "num_sequences": len(lengths)}
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(lengths)))
    for mode in AGGREGATIONS:
        whole, gradients = loss_and_gradients(name, mode, sequences, counts)
        first, first_gradients = loss_and_gradients(name, mode, [sequences[i] for i in order[:cut]], counts)
        second, second_gradients = loss_and_gradients(name, mode, [sequences[i] for i in order[cut:]], counts)
        torch.testing.assert_close(first + second, whole)
        for i, gradient in zip(order, first_gradients + second_gradients, strict=True):
            torch.testing.assert_close(gradient, gradients[i])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_ratio", [-30.0, 30.0, 400.0, math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_give_finite_losses_and_gradients(name, log_ratio, advantage):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0 - log_ratio, -1.0])
    losses, _ = LOSSES[name](logprobs, old, torch.full((2,), advantage), torch.tensor([0, 1]), None)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_impossible_under_the_policy_has_ratio_zero_or_no_finite_loss(name, advantage):
    logprobs, old = torch.tensor([-math.inf, -1.0]), torch.tensor([-1.0, -1.0])
    losses, _ = LOSSES[name](logprobs, old, torch.full((2,), advantage), torch.tensor([0, 1]), None)
    has_ratio_alone = name.startswith("ppo") or (
        name.startswith("gspo") and "token" not in name
    )  # the others multiply by log pi, or cancel it
    assert bool(torch.isfinite(losses[0])) == has_ratio_alone
    assert torch.isfinite(losses[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("weight", [None, 0.0])
def test_a_nan_log_prob_makes_a_nan_loss_never_a_zero(name, advantage, weight):
    weights = None if weight is None else torch.full((2,), weight)
    logprobs, old, index = torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([0, 1])
    losses, _ = LOSSES[name](logprobs, old, torch.full((2,), advantage), index, weights)
    assert torch.isnan(losses[0])
    assert torch.isfinite(losses[1])


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_give_no_losses_but_a_graph(name):
    logprobs, none = torch.zeros(0, requires_grad=True), torch.zeros(0)
    losses, is_clipped = LOSSES[name](logprobs, none, none, torch.zeros(0, dtype=torch.int64), none)
    assert losses.shape == is_clipped.shape == (0,)
    assert is_clipped.dtype == torch.bool
    losses.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_differ_are_refused(name):
    three, two, index = torch.zeros(3), torch.zeros(2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"advantages \(2,\)"):
        LOSSES[name](three, three, two, index, None)
    with pytest.raises(ShapeError, match=r"old_logprobs \(2,\)"):
        LOSSES[name](three, two, three, index, None)
    with pytest.raises(ShapeError, match=r"loss_factors \(2,\)"):
        LOSSES[name](three, three, three, index, two)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_that_want_a_gradient_are_a_programming_error(name):
    three, index = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(AssertionError, match="constants"):
        LOSSES[name](three, three, three, index, torch.ones(3, requires_grad=True))
