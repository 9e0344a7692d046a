"""Aggregation as a property of splits; sums that merge to those of the whole batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.losses import AGGREGATIONS, aggregate_loss, merge_sums, ratio_sums, sums_to_floats
from asyncrl.errors import ConfigError, ShapeError

pytestmark = pytest.mark.numeric


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match=r"sequence_index \(2,\)"):
        aggregate_loss(torch.zeros(3), torch.zeros(2, dtype=torch.int64), num_tokens=3, num_sequences=1)
    with pytest.raises(ShapeError, match=r"is_clipped \(2,\)"):
        ratio_sums(torch.zeros(3), torch.zeros(2, dtype=torch.bool))


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
        index = torch.tensor([i for i, sequence in enumerate(some) for _ in sequence], dtype=torch.int64)
        flat = torch.cat([*some, f64()])
        return aggregate_loss(flat, index, num_tokens=sum(lengths), num_sequences=len(lengths), mode=mode, max_tokens=7)

    torch.testing.assert_close(part(losses[:cut]) + part(losses[cut:]), part(losses))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_no_tokens_give_a_zero_loss_with_a_graph(mode):
    losses = torch.zeros(0, requires_grad=True)
    index = torch.zeros(0, dtype=torch.int64)
    total = aggregate_loss(losses, index, num_tokens=3, num_sequences=1, mode=mode, max_tokens=2)
    assert total.item() == 0.0
    total.backward()
    assert losses.grad.shape == (0,)


CLIPPED = torch.tensor([True, True, False])


def test_ratio_sums_of_three_tokens_by_hand():
    sums = sums_to_floats(ratio_sums(f64(1.5, 0.5, 4.0).log(), CLIPPED, is_capped=~CLIPPED))
    logs = [math.log(1.5), math.log(0.5), math.log(4.0)]
    assert sums == pytest.approx(
        {
            "tokens": 3, "ratio_sum": 6, "ratio_square_sum": 18.5, "ratio_max": 4, "clipped": 2, "capped": 1,
            "log_ratio_sum": sum(logs), "log_ratio_abs_sum": sum(map(abs, logs)),
        }
    )  # fmt: skip


def test_a_loss_without_a_cap_has_no_capped_tokens():
    assert "capped" not in ratio_sums(f64(1.5, 0.5, 4.0).log(), CLIPPED)


def test_ratio_sums_of_extremes_stay_in_range_and_nan_stays_nan():
    sums = ratio_sums(torch.tensor([-math.inf, 400.0, math.inf]), CLIPPED)
    assert sums["ratio_sum"] == pytest.approx(2 * math.exp(20.0), rel=1e-5)
    assert torch.isfinite(sums["ratio_square_sum"])
    sums = ratio_sums(torch.tensor([math.nan, 0.0, 0.0]), CLIPPED)
    assert torch.isnan(sums["ratio_sum"]) and torch.isnan(sums["ratio_max"])


def test_without_tokens_there_is_no_largest_ratio():
    sums = ratio_sums(torch.zeros(0), torch.zeros(0, dtype=torch.bool), is_capped=torch.zeros(0, dtype=torch.bool))
    assert "ratio_max" not in sums
    assert sums["tokens"] == sums["ratio_sum"] == sums["capped"] == 0


def test_sums_of_parts_merge_to_the_sums_of_the_whole():
    log_ratios, is_clipped, is_capped = torch.randn(6, dtype=torch.float64), torch.rand(6) < 0.5, torch.rand(6) < 0.5

    def sums(rows):
        return ratio_sums(log_ratios[rows], is_clipped[rows], is_capped=is_capped[rows])

    merged = merge_sums(merge_sums({}, sums(slice(0, 2))), merge_sums(sums(slice(2, 2)), sums(slice(2, 6))))
    whole = sums(slice(0, 6))
    assert merged.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name])


def test_vectors_merge_elementwise():
    part, other = {"n": f64(1, 2), "r_max": f64(1, 5)}, {"n": f64(10, 20), "r_max": f64(4, 2), "new": f64(3)}
    assert sums_to_floats(merge_sums(part, other)) == {"n": [11, 22], "r_max": [4, 5], "new": [3]}


def test_floats_keep_names_shapes_and_values():
    sums = {"a": torch.tensor(1.5), "b": torch.tensor([1, 2]), "c": torch.tensor(True), "d": f64()}
    assert sums_to_floats(sums) == {"a": 1.5, "b": [1.0, 2.0], "c": 1.0, "d": []}
    assert sums_to_floats({}) == {}
