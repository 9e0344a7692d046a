"""Advantages and targets with a critic, against worked examples, explicit sums and the exact values of a small tree."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.losses import merge_sums
from asyncrl.algorithms.value_targets import (
    explained_variance_from_sums,
    gae,
    importance_weighted_gae,
    token_rewards,
    value_loss,
    vtrace,
)
from asyncrl.errors import ConfigError, NonFiniteError, ShapeError
from tests.tolerances import slack

pytestmark = pytest.mark.numeric


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def full(rows):
    return torch.ones(rows.shape, dtype=torch.bool)


REWARDS, VALUES = f64(0, 0, 1)[None], f64(0.5, 0.5, 0.5)[None]
RATIOS = f64(2, 0.5, 0.5)[None]
UNITS = st.floats(0, 1)
BARS = st.floats(0.2, 3)

# Every function of rows, with the same arguments.
METHODS = {
    "gae": lambda rewards, values, log_ratios, mask, **kwargs: gae(rewards, values, mask, **kwargs),
    "vtrace": vtrace,
    "importance_weighted_gae": importance_weighted_gae,
}


# ------------------------------------------------------------------------------------------- slow references


def product(factors):
    return math.prod(factors)


def slow_deltas(rewards, values, gamma):
    following = [*values, 0.0][1:]
    return [r + gamma * after - v for r, after, v in zip(rewards, following, values, strict=True)]


def slow_gae(rewards, values, gamma, lam):
    """One row, straight from the sum: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    deltas = slow_deltas(rewards, values, gamma)
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def slow_vtrace(rewards, values, ratios, gamma, lam, rho_bar, c_bar):
    """One row, straight from Espeholt et al., eq. 1: a sum over t of products of all c between s and t."""
    deltas = slow_deltas(rewards, values, gamma)
    steps = range(len(deltas))
    rho = [min(rho_bar, ratio) for ratio in ratios]
    c = [lam * min(c_bar, ratio) for ratio in ratios]
    targets = [
        values[s] + sum(gamma ** (t - s) * product(c[s:t]) * rho[t] * deltas[t] for t in steps if t >= s) for s in steps
    ]
    following = [*targets, 0.0][1:]
    return [rewards[s] + gamma * following[s] - values[s] for s in steps], targets


def slow_importance_weighted_gae(rewards, values, ratios, gamma, lam, c_bar):
    """One row, straight from the sum: the ratio of the token itself is not in its product, those after it are."""
    deltas = slow_deltas(rewards, values, gamma)
    steps = range(len(deltas))
    c = [min(c_bar, ratio) for ratio in ratios]
    advantages = [
        sum((gamma * lam) ** (t - s) * product(c[s + 1 : t + 1]) * deltas[t] for t in steps if t >= s) for s in steps
    ]
    return advantages, [values[s] + c[s] * advantages[s] for s in steps]


@st.composite
def padded(draw):
    """Rows of random numbers with a span of tokens in each; outside the spans nothing but NaN."""
    width = 6
    spans = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
    rows = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [torch.where(mask, row, math.nan) for row in rows], mask


def assert_rows_equal(got, mask, slow):
    """`slow(row)` gives (advantages, targets) of the tokens of one row, as lists; outside the mask all is 0."""
    for row in range(mask.shape[0]):
        for ours, expected in zip(got, slow(row), strict=True):
            torch.testing.assert_close(ours[row, mask[row]], f64(*expected), rtol=1e-9, atol=1e-9)
    assert not any(ours[~mask].any() for ours in got)


# ------------------------------------------------------------------------------------------------------- gae


def test_gae_of_three_tokens_by_hand():
    advantages, returns = gae(REWARDS, VALUES, full(REWARDS))
    torch.testing.assert_close(advantages, f64(0.5, 0.5, 0.5)[None])
    torch.testing.assert_close(returns, f64(1, 1, 1)[None])
    # lam = 0: one-step errors 0.5 - 0.5, 0.5 - 0.5, 1 - 0.5.
    advantages, _ = gae(REWARDS, VALUES, full(REWARDS), lam=0.0)
    torch.testing.assert_close(advantages, f64(0, 0, 0.5)[None])


@settings(max_examples=50, deadline=None)
@given(batch=padded(), gamma=UNITS, lam=UNITS)
def test_gae_of_padded_rows_equals_the_sum_of_each_row(batch, gamma, lam):
    (rewards, values, _), mask = batch
    got = gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert_rows_equal(
        got, mask, lambda b: slow_gae(rewards[b, mask[b]].tolist(), values[b, mask[b]].tolist(), gamma, lam)
    )


# ---------------------------------------------------------------------------------------------------- vtrace


def test_vtrace_of_three_tokens_by_hand():
    # rho = c = (1, 0.5, 0.5): v_3 = 0.5 + 0.5 * 0.5; v_2 = 0.5 + 0.5 * 0.25; v_1 = 0.5 + 1 * 0.125.
    advantages, targets = vtrace(REWARDS, VALUES, RATIOS.log(), full(REWARDS))
    torch.testing.assert_close(targets, f64(0.625, 0.625, 0.75)[None])
    torch.testing.assert_close(advantages, f64(0.125, 0.25, 0.5)[None])


@settings(max_examples=60, deadline=None)
@given(batch=padded(), gamma=UNITS, lam=UNITS, rho_bar=BARS, c_bar=BARS)
def test_vtrace_equals_the_published_sum_of_products(batch, gamma, lam, rho_bar, c_bar):
    (rewards, values, log_ratios), mask = batch
    got = vtrace(rewards, values, log_ratios, mask, gamma=gamma, lam=lam, rho_bar=rho_bar, c_bar=c_bar)

    def slow(b):
        row = [x[b, mask[b]].tolist() for x in (rewards, values, log_ratios.exp())]
        return slow_vtrace(*row, gamma, lam, rho_bar, c_bar)

    assert_rows_equal(got, mask, slow)


@settings(max_examples=30, deadline=None)
@given(batch=padded(), gamma=UNITS, lam=UNITS, bar=st.floats(1, 3))
def test_on_policy_targets_are_the_returns_of_gae_with_the_same_lambda(batch, gamma, lam, bar):
    (rewards, values, _), mask = batch
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    on_policy = torch.zeros_like(rewards)
    ours = vtrace(rewards, values, on_policy, mask, gamma=gamma, lam=lam, rho_bar=bar, c_bar=bar)
    torch.testing.assert_close(ours[1], returns)
    weighted = importance_weighted_gae(rewards, values, on_policy, mask, gamma=gamma, lam=lam, c_bar=bar)
    torch.testing.assert_close(weighted, (advantages, returns))
    if lam == 1.0:
        torch.testing.assert_close(ours[0], advantages)


def test_on_policy_vtrace_with_lambda_1_is_gae_with_lambda_1():
    arguments = torch.randn(2, 4, 5, dtype=torch.float64)
    on_policy = torch.zeros(4, 5, dtype=torch.float64)
    ours = vtrace(*arguments, on_policy, full(on_policy), gamma=0.9)
    torch.testing.assert_close(ours, gae(*arguments, full(on_policy), gamma=0.9))


# ----------------------------------------------------------------------------------- importance-weighted gae


def test_importance_weighted_gae_of_three_tokens_by_hand():
    # c = (1, 0.5, 0.5): A_3 = 0.5; A_2 = 0 + 0.5 * 0.5; A_1 = 0 + 0.5 * 0.25.
    advantages, targets = importance_weighted_gae(REWARDS, VALUES, RATIOS.log(), full(REWARDS))
    torch.testing.assert_close(advantages, f64(0.125, 0.25, 0.5)[None])
    torch.testing.assert_close(targets, f64(0.625, 0.625, 0.75)[None])


@settings(max_examples=60, deadline=None)
@given(batch=padded(), gamma=UNITS, lam=UNITS, c_bar=BARS)
def test_importance_weighted_gae_equals_the_sum_of_each_row(batch, gamma, lam, c_bar):
    (rewards, values, log_ratios), mask = batch
    got = importance_weighted_gae(rewards, values, log_ratios, mask, gamma=gamma, lam=lam, c_bar=c_bar)

    def slow(b):
        row = [x[b, mask[b]].tolist() for x in (rewards, values, log_ratios.exp())]
        return slow_importance_weighted_gae(*row, gamma, lam, c_bar)

    assert_rows_equal(got, mask, slow)
    # The docstring's other form: V-trace's targets, and advantages that trust them for the share lambda only.
    _, targets = vtrace(rewards, values, log_ratios, mask, gamma=gamma, lam=lam, rho_bar=c_bar, c_bar=c_bar)
    torch.testing.assert_close(got[1], targets)
    mixed = torch.where(mask, lam * targets + (1 - lam) * values, 0.0)
    following = torch.nn.functional.pad(mixed[:, 1:], (0, 1))
    torch.testing.assert_close(got[0], torch.where(mask, rewards + gamma * following - values, 0.0))


# ----------------------------------------------------------------- what the corrections are for, on a whole tree

DEPTH = 3


class Tree:
    """All 8 strings of three bits, each with a reward; pi and mu give the probability of a 1 after each prefix."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.strings = list(itertools.product((0, 1), repeat=DEPTH))
        self.reward = {s: torch.rand((), generator=generator).item() for s in self.strings}
        prefixes = [s[:n] for s in self.strings for n in range(DEPTH)]
        self.pi, self.mu, self.values = (
            {p: 0.1 + 0.8 * torch.rand((), generator=generator).item() for p in dict.fromkeys(prefixes)}
            for _ in range(3)
        )

    def exact(self, policy, prefix=()):
        """Value of a prefix under a policy."""
        if len(prefix) == DEPTH:
            return self.reward[prefix]
        return sum(self.chance(policy, prefix, bit) * self.exact(policy, (*prefix, bit)) for bit in (0, 1))

    @staticmethod
    def chance(policy, prefix, bit):
        return policy[prefix] if bit else 1 - policy[prefix]

    def rows(self, values):
        """(probability under mu [8], rewards, values, log-ratios [8, 3]) of all strings."""
        probability, rewards, states, log_ratios = [], [], [], []
        for s in self.strings:
            steps = [(s[:n], s[n]) for n in range(DEPTH)]
            mu = [self.chance(self.mu, *step) for step in steps]
            probability.append(math.prod(mu))
            rewards.append([0.0] * (DEPTH - 1) + [self.reward[s]])
            states.append([values[prefix] for prefix, _ in steps])
            log_ratios.append([math.log(self.chance(self.pi, *step) / m) for step, m in zip(steps, mu, strict=True)])
        return f64(*probability), f64(*rewards), f64(*states), f64(*log_ratios)


NO_BAR = 1e6


@pytest.mark.parametrize(
    ("name", "bars"),
    [("vtrace", {"rho_bar": NO_BAR, "c_bar": NO_BAR}), ("importance_weighted_gae", {"c_bar": NO_BAR})],
)
def test_the_mean_target_of_old_rollouts_is_the_value_under_the_new_policy(name, bars):
    tree = Tree()
    probability, rewards, values, log_ratios = tree.rows(tree.values)
    exact = tree.exact(tree.pi)
    _, targets = METHODS[name](rewards, values, log_ratios, full(rewards), **bars)
    assert (probability * targets[:, 0]).sum().item() == pytest.approx(exact)
    _, uncorrected = gae(rewards, values, full(rewards))
    assert (probability * uncorrected[:, 0]).sum().item() == pytest.approx(tree.exact(tree.mu))
    assert abs(exact - tree.exact(tree.mu)) > 0.02


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vtrace", "importance_weighted_gae"])
def test_the_exact_values_of_the_new_policy_are_a_fixed_point_for_any_lambda(name, lam):
    tree = Tree()
    exact = {prefix: tree.exact(tree.pi, prefix) for prefix in tree.values}
    probability, rewards, values, log_ratios = tree.rows(exact)
    bars = {"c_bar": NO_BAR} | ({"rho_bar": NO_BAR} if name == "vtrace" else {})
    _, targets = METHODS[name](rewards, values, log_ratios, full(rewards), lam=lam, **bars)
    for prefix, value in exact.items():
        reached = f64(*(float(s[: len(prefix)] == prefix) for s in tree.strings)) * probability
        mean = (reached * targets[:, len(prefix)]).sum() / reached.sum()
        assert mean.item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "bars"),
    [("vtrace", {"rho_bar": NO_BAR, "c_bar": NO_BAR}), ("importance_weighted_gae", {"c_bar": NO_BAR})],
)
def test_advantages_times_the_ratio_of_their_own_token_give_the_exact_policy_gradient(name, bars):
    """Of the first bit: the ratio must come in exactly once, from the policy loss."""
    tree = Tree()
    probability, rewards, values, log_ratios = tree.rows(tree.values)
    advantages, _ = METHODS[name](rewards, values, log_ratios, full(rewards), **bars)
    p = tree.pi[()]
    # d log pi(bit) / dp is 1/p for a 1 and -1/(1-p) for a 0; dJ/dp is the difference of the two branches.
    score = f64(*(1 / p if s[0] else -1 / (1 - p) for s in tree.strings))
    gradient = (probability * log_ratios[:, 0].exp() * advantages[:, 0] * score).sum().item()
    assert gradient == pytest.approx(tree.exact(tree.pi, (1,)) - tree.exact(tree.pi, (0,)))


# -------------------------------------------------------------------------- properties that all of them share


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None)
@given(batch=padded(), left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_and_the_other_rows_never_change_a_value(name, batch, left, right):
    rows, mask = batch
    whole = METHODS[name](*rows, mask, gamma=0.9, lam=0.8)
    wider = [torch.nn.functional.pad(row, (left, right), value=math.inf) for row in rows]
    wide_mask = torch.nn.functional.pad(mask, (left, right))
    for row in range(mask.shape[0]):
        alone = METHODS[name](*(x[row : row + 1] for x in wider), wide_mask[row : row + 1], gamma=0.9, lam=0.8)
        for ours, expected in zip(alone, whole, strict=True):
            assert torch.equal(ours[:, left : left + mask.shape[1]], expected[row : row + 1])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 3), (2, 0), (0, 3), (0, 0)])
def test_an_empty_mask_gives_zeros(name, shape):
    rows = torch.full(shape, math.nan)
    advantages, targets = METHODS[name](rows, rows, rows, torch.zeros(shape, dtype=torch.bool))
    assert advantages.shape == targets.shape == shape
    assert not advantages.any()
    assert not targets.any()


@pytest.mark.parametrize("name", METHODS)
def test_one_token_is_its_reward_minus_its_value(name):
    mask = torch.ones(1, 1, dtype=torch.bool)
    # Ratio 0.5: the advantage is without it (the loss multiplies it), the target goes half the way.
    advantages, targets = METHODS[name](f64(1)[None], f64(0.2)[None], f64(0.5).log()[None], mask)
    assert advantages.item() == pytest.approx(0.8)
    assert targets.item() == pytest.approx(1.0 if name == "gae" else 0.6)


@pytest.mark.parametrize("name", ["vtrace", "importance_weighted_gae"])
@pytest.mark.parametrize("log_ratio", [-math.inf, -30.0, 30.0, 500.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_are_truncated_or_zero_and_nothing_overflows(name, log_ratio, dtype):
    log_ratios = torch.tensor([[0.0, log_ratio, 0.0]], dtype=dtype)
    got = METHODS[name](REWARDS.to(dtype), VALUES.to(dtype), log_ratios, full(REWARDS))
    # As a ratio of 1, or of 0: then nothing behind token 2 reaches it and those before.
    expected = [[0.5, 0.5, 0.5], [1, 1, 1]] if log_ratio > 0 else [[0, 0.5, 0.5], [0.5, 0.5, 1]]
    small = math.exp(-20.0) + slack(1.0, dtype, steps=4)  # no log-ratio counts as less than -20
    torch.testing.assert_close(torch.cat(got), torch.tensor(expected, dtype=dtype), rtol=0, atol=small)
    bars = {"c_bar": math.inf} | ({"rho_bar": math.inf} if name == "vtrace" else {})
    unbounded = METHODS[name](REWARDS.to(dtype), VALUES.to(dtype), log_ratios.expand(1, 3), full(REWARDS), **bars)
    assert all(torch.isfinite(x).all() for x in unbounded)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_or_value_that_is_not_finite_is_an_error(name, bad):
    broken = f64(0, bad, 1)[None]
    with pytest.raises(NonFiniteError, match="1 of 3 values of rewards"):
        METHODS[name](broken, VALUES, RATIOS.log(), full(broken))
    with pytest.raises(NonFiniteError, match="1 of 3 values of values"):
        METHODS[name](REWARDS, broken, RATIOS.log(), full(broken))


@pytest.mark.parametrize("name", ["vtrace", "importance_weighted_gae"])
def test_a_nan_log_ratio_is_an_error(name):
    with pytest.raises(NonFiniteError, match="log_ratios"):
        METHODS[name](REWARDS, VALUES, f64(0, math.nan, 0)[None], full(REWARDS))


@pytest.mark.parametrize("name", METHODS)
def test_targets_and_advantages_carry_no_gradient(name):
    rewards, values, log_ratios = (x.clone().requires_grad_() for x in (REWARDS, VALUES, RATIOS.log()))
    assert not any(x.requires_grad for x in METHODS[name](rewards, values, log_ratios, full(REWARDS)))


@pytest.mark.parametrize("name", METHODS)
def test_the_inputs_are_left_as_they_are_and_float32_stays_float32(name):
    rows = [x.float() for x in (REWARDS, VALUES, RATIOS.log())]
    before = [x.clone() for x in rows]
    assert all(x.dtype == torch.float32 for x in METHODS[name](*rows, full(REWARDS), gamma=0.99, lam=0.95))
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_different_shapes_are_refused(name):
    mask = torch.ones(2, 3, dtype=torch.bool)
    rows, other = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"\[B, T\]"):
        METHODS[name](rows, other, rows, mask)
    with pytest.raises(ShapeError, match=r"\[B, T\]"):
        METHODS[name](rows[0], rows[0], rows[0], mask[0])
    if name != "gae":
        with pytest.raises(ShapeError, match="log_ratios"):
            METHODS[name](rows, rows, other, mask)


# --------------------------------------------------------------------------------------------- token rewards


def test_token_rewards_of_three_tokens_by_hand():
    index = torch.tensor([0, 0, 1])
    assert token_rewards(f64(1, 0.5), index).tolist() == [0, 1, 0.5]
    torch.testing.assert_close(token_rewards(f64(1, 0.5), index, f64(0.1, 0.2, 0)), f64(-0.1, 0.8, 0.5))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), max_size=5), seed=st.integers(0, 99))
def test_token_rewards_of_a_sequence_add_up_to_its_reward_minus_its_penalties(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    penalties = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    index = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    got = token_rewards(rewards, index, penalties)
    expected = []
    for i, part in enumerate(penalties.split(lengths) if lengths else []):
        expected += [-p for p in part.tolist()[:-1]] + [rewards[i].item() - part[-1].item()]
    torch.testing.assert_close(got, f64(*expected))


def test_token_rewards_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match="sequence_index"):
        token_rewards(f64(1, 2, 3), torch.tensor([0, 0, 1]))  # the third reward has no token
    with pytest.raises(ShapeError, match="penalties"):
        token_rewards(f64(1), torch.tensor([0, 0]), f64(0))
    with pytest.raises(ShapeError, match=r"\[S\]"):
        token_rewards(f64(1)[None], torch.tensor([0]))
    with pytest.raises(NonFiniteError, match="rewards"):
        token_rewards(f64(math.nan), torch.tensor([0]))
    with pytest.raises(NonFiniteError, match="penalties"):
        token_rewards(f64(1), torch.tensor([0, 0]), f64(0, math.inf))


def test_penalties_carry_no_gradient_into_the_reward():
    assert not token_rewards(f64(1), torch.tensor([0]), f64(1).requires_grad_()).requires_grad


# ------------------------------------------------------------------------------------------------ value loss


def loss_and_gradient(values, old, targets, **kwargs):
    values = values.clone().requires_grad_()
    losses, sums = value_loss(values, old, targets, **kwargs)
    return losses.detach(), torch.autograd.grad(losses.sum(), values)[0], sums


def test_value_loss_of_three_tokens_by_hand():
    # 1: not moved. 2: on its way to the target, beyond 0.7: no gradient. 3: away from the target: full gradient.
    losses, gradient, sums = loss_and_gradient(f64(0.5, 1, 0.1), f64(0.5, 0.5, 0.5), f64(1, 1, 1), clip=0.2)
    torch.testing.assert_close(losses, f64(0.125, 0.045, 0.405))
    torch.testing.assert_close(gradient, f64(-0.5, 0, -0.9))
    assert {name: round(float(x), 12) for name, x in sums.items()} == {
        "value_tokens": 3, "value_clipped": 1, "value_sum": 1.6,
        "value_error_square_sum": 1.06, "target_sum": 3, "target_square_sum": 3,
    }  # fmt: skip


def test_a_value_that_moved_past_its_target_gets_the_gradient_back():
    losses, gradient, sums = loss_and_gradient(f64(1), f64(0.5), f64(0.6), clip=0.2)
    torch.testing.assert_close(losses, f64(0.08))
    torch.testing.assert_close(gradient, f64(0.4))
    assert sums["value_clipped"] == 0


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 3), min_size=1, max_size=6),
    clip=st.none() | st.floats(0.1, 2),
    kind=st.sampled_from(["mse", "huber"]),
    delta=st.floats(0.3, 2),
)
def test_value_loss_and_gradient_equal_a_loop_over_tokens(tokens, clip, kind, delta):
    columns = [f64(*column) for column in zip(*tokens, strict=True)]
    losses, gradient, sums = loss_and_gradient(*columns, clip=clip, kind=kind, huber_delta=delta)

    def slow(v, target):
        """Loss of one value, and its slope."""
        error = v - target
        if kind == "mse" or abs(error) <= delta:
            return 0.5 * error**2, error
        return delta * (abs(error) - 0.5 * delta), math.copysign(delta, error)

    clipped = 0
    for i, (v, old, target) in enumerate(tokens):
        expected, slope = slow(v, target)
        if clip is not None and abs(v - old) > clip:
            bounded = slow(old + math.copysign(clip, v - old), target)[0]
            if bounded > expected:
                expected, slope, clipped = bounded, 0.0, clipped + 1
            elif bounded == expected:
                continue  # a kink: any slope between the two is right
        assert losses[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert sums["value_clipped"] == clipped


def test_only_the_values_get_a_gradient():
    values, old, targets = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    losses, sums = value_loss(values, old, targets, clip=0.1)
    losses.sum().backward()
    assert values.grad is not None
    assert old.grad is None
    assert targets.grad is None
    assert not any(x.requires_grad for x in sums.values())


def test_a_nan_value_makes_a_nan_loss_never_a_zero():
    losses, _ = value_loss(f64(math.nan, 0), f64(0, 0), f64(0, 0), clip=0.2)
    assert torch.isnan(losses[0])
    assert losses[1] == 0


def test_value_loss_refuses_unknown_kinds_and_differing_shapes():
    with pytest.raises(ConfigError, match="'mae' is not one of mse, huber"):
        value_loss(f64(1), f64(1), f64(1), kind="mae")
    with pytest.raises(ShapeError, match=r"\[N\]"):
        value_loss(f64(1, 2), f64(1, 2), f64(1))


# ---------------------------------------------------------------------------------------- explained variance


def explained_variance(values, targets):
    _, sums = value_loss(values, values, targets)
    return explained_variance_from_sums({name: x.item() for name, x in sums.items()})


def test_explained_variance_of_three_tokens_by_hand():
    assert explained_variance(f64(0, 1, 1), f64(0, 1, 2)) == pytest.approx(2 / 3)
    assert explained_variance(f64(5, 6, 7), f64(0, 1, 2)) == pytest.approx(1.0)
    assert explained_variance(f64(4, 4, 4), f64(0, 1, 2)) == pytest.approx(0.0)
    assert explained_variance(f64(2, 1, 0), f64(0, 1, 2)) == pytest.approx(-3.0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 30), cut=st.integers(0, 30), offset=st.floats(-100, 100))
def test_explained_variance_of_merged_sums_equals_that_of_all_tokens(seed, count, cut, offset):
    generator = torch.Generator().manual_seed(seed)
    values, targets = (torch.randn(count, generator=generator) + offset for _ in range(2))
    parts = [value_loss(values[rows], values[rows], targets[rows])[1] for rows in (slice(cut), slice(cut, None))]
    merged = merge_sums(merge_sums({}, parts[0]), parts[1])
    values, targets = values.double(), targets.double()
    expected = 1 - (targets - values).var(correction=0) / targets.var(correction=0)
    got = explained_variance_from_sums({name: x.item() for name, x in merged.items()})
    assert got == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("target", [0.0, 0.1, 1 / 3, 1000.1])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_where_the_targets_do_not_vary_nothing_was_measured(target, count):
    assert math.isnan(explained_variance(torch.randn(count), torch.full((count,), target)))


def test_explained_variance_of_a_nan_is_nan():
    assert math.isnan(explained_variance(f64(0, math.nan), f64(0, 1)))
    assert math.isnan(explained_variance(f64(0, 1), f64(0, math.nan)))
