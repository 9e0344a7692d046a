"""Masks against worked tokens and loops over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.masks import band_mask, opsm_mask, second_moment_mask, sequence_band_mask
from asyncrl.algorithms.policy_losses import reinforce_loss
from asyncrl.errors import ShapeError

pytestmark = pytest.mark.numeric

NOT_FINITE = [math.nan, math.inf, -math.inf]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_band_of_three_tokens_by_hand():
    assert band_mask(f64(0.4, 1.0, 6.0).log(), 0.5, 5.0).tolist() == [False, True, False]


def test_both_ends_belong_to_the_band():
    # Logarithms by one route: float32 kernels may round log(5) to either side.
    assert band_mask(torch.tensor([math.log(0.5), math.log(5.0)]), 0.5, 5.0).all()


def test_a_band_from_zero_has_no_lower_end_but_keeps_no_infinity():
    assert band_mask(f64(-30.0, -math.inf), 0.0, 5.0).tolist() == [True, False]


def test_the_sequence_band_of_three_tokens_by_hand():
    log_ratios, index = f64(0.1, 10.0, 6.0).log(), torch.tensor([0, 0, 1])
    assert sequence_band_mask(log_ratios, index, 0.5, 5.0).tolist() == [True, True, False]
    assert not band_mask(log_ratios, 0.5, 5.0).any()


def test_opsm_of_three_tokens_by_hand():
    log_ratios, index = f64(-1.0, -1.0, -1.0), torch.tensor([0, 0, 1])
    assert opsm_mask(log_ratios, index, f64(-1, 1, -1), 0.5).tolist() == [False, True, False]
    assert opsm_mask(log_ratios, index, f64(-1, -1, 0), 0.5).tolist() == [False, False, True]
    assert opsm_mask(log_ratios, index, f64(-1, -1, -1), 1.0).all()  # the limit itself is allowed
    assert opsm_mask(-log_ratios, index, f64(-1, -1, -1), 0.5).all()  # likelier than before is no drift


TOKENS = st.lists(st.tuples(st.integers(0, 3), st.floats(-3, 3), st.sampled_from([-1.0, 0.0, 1.0])), max_size=10)


@settings(deadline=None)
@given(TOKENS)
def test_sequence_masks_equal_the_loop(tokens):
    numbers = sorted({number for number, _, _ in tokens})
    index = torch.tensor([numbers.index(number) for number, _, _ in tokens], dtype=torch.int64)
    log_ratios, advantages = f64(*[x for _, x, _ in tokens]), f64(*[a for _, _, a in tokens])
    band, opsm = [], []
    for number, _, advantage in tokens:
        row = [x for other, x, _ in tokens if other == number]
        mean = math.fsum(row) / len(row)
        # Where rounding decides, either answer is right.
        band.append(None if abs(abs(mean) - 1.0) < 1e-9 else -1.0 < mean < 1.0)
        opsm.append(None if abs(mean + 0.5) < 1e-9 and advantage < 0 else advantage >= 0 or -mean <= 0.5)
    kept = sequence_band_mask(log_ratios, index, math.exp(-1.0), math.exp(1.0)).tolist()
    assert all(ours == slow for ours, slow in zip(kept, band, strict=True) if slow is not None)
    kept = opsm_mask(log_ratios, index, advantages, 0.5).tolist()
    assert all(ours == slow for ours, slow in zip(kept, opsm, strict=True) if slow is not None)


def test_the_second_moment_of_three_tokens_by_hand():
    assert second_moment_mask(f64(0.1, -0.2, 0.5), 0.04).tolist() == [True, True, False]


def slow_second_moment_mask(log_ratios, threshold):
    """Drops the largest square, and all that equal it, until the mean of the rest fits."""
    squares = [x * x for x in log_ratios]
    rest = list(squares)
    while rest and math.fsum(rest) / len(rest) > threshold:
        # Among equals the budget may end in the middle: then all of them go.
        largest = max(rest)
        rest = [x for x in rest if x < largest]
    return [x in rest for x in squares]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-8, 8).map(lambda x: x / 8), max_size=12), st.sampled_from([0.01, 0.1, 0.3, 0.7]))
def test_the_second_moment_mask_equals_the_loop_with_many_equals(log_ratios, threshold):
    kept = second_moment_mask(f64(*log_ratios), threshold).tolist()
    assert kept == slow_second_moment_mask(log_ratios, threshold)


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_second_moment_fits_its_budget_and_does_not_depend_on_the_order(log_ratios, random):
    kept = second_moment_mask(f64(*log_ratios), 0.04).tolist()
    squares = [x * x for x, is_kept in zip(log_ratios, kept, strict=True) if is_kept]
    assert not squares or math.fsum(squares) / len(squares) <= 0.04 * (1 + 1e-12)
    order = list(range(len(log_ratios)))
    random.shuffle(order)
    shuffled = second_moment_mask(f64(*[log_ratios[i] for i in order]), 0.04).tolist()
    assert shuffled == [kept[i] for i in order]


def test_one_token_and_none():
    assert second_moment_mask(f64(0.2), 0.05).tolist() == [True]
    assert second_moment_mask(f64(0.3), 0.05).tolist() == [False]
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for mask in (
        band_mask(none, 0.5, 5.0),
        sequence_band_mask(none, index, 0.5, 5.0),
        opsm_mask(none, index, none, 0.5),
        second_moment_mask(none, 0.04),
    ):
        assert mask.shape == (0,) and mask.dtype == torch.bool


@pytest.mark.parametrize("bad", [-30.0, 30.0])
def test_far_ratios_leave_and_the_rest_stays(bad):
    log_ratios, index = torch.tensor([bad, 0.0, 0.1]), torch.tensor([0, 1, 1])
    advantages = torch.tensor([-1.0, -1.0, -1.0])
    assert band_mask(log_ratios, 0.5, 5.0).tolist() == [False, True, True]
    assert sequence_band_mask(log_ratios, index, 0.5, 5.0).tolist() == [False, True, True]
    assert second_moment_mask(log_ratios, 0.04).tolist() == [False, True, True]
    assert opsm_mask(log_ratios, index, advantages, 0.5).tolist() == [bad > 0, True, True]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_what_is_not_finite_never_stays(bad):
    log_ratios, index = torch.tensor([bad, 0.0, 0.1]), torch.tensor([0, 0, 1])
    assert band_mask(log_ratios, 0.0, 5.0).tolist() == [False, True, True]
    assert second_moment_mask(log_ratios, 0.04).tolist() == [False, True, True]
    # Where sequences are judged, the other tokens of the sequence go with it, good ones too.
    assert sequence_band_mask(log_ratios, index, 0.0, 5.0).tolist() == [False, False, True]
    assert opsm_mask(log_ratios, index, torch.ones(3), 0.5).tolist() == [False, False, True]


def test_a_mask_hides_no_nan():
    logprobs = torch.tensor([math.nan, -1.0])
    kept = band_mask(logprobs - (-1.0), 0.5, 5.0)
    losses, _ = reinforce_loss(
        logprobs, torch.full((2,), -1.0), torch.ones(2), ratio_cap=2.0, loss_factors=kept.float()
    )
    assert not kept[0] and torch.isnan(losses[0])


def test_differing_shapes_are_refused():
    three, two, index = torch.zeros(3), torch.zeros(2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="sequence_index"):
        sequence_band_mask(two, index, 0.5, 5.0)
    with pytest.raises(ShapeError, match="advantages"):
        opsm_mask(three, index, two, 0.5)
