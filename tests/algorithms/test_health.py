"""Health by policy age against a loop over tokens; what was not measured is absent."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.health import AGE_BUCKETS, age_buckets, health_metrics, health_sums
from asyncrl.algorithms.losses import merge_sums, sums_to_floats
from asyncrl.errors import ShapeError

pytestmark = pytest.mark.numeric


def sums_of(tokens):
    """Sums of (log-ratio, age, clipped, masked) tuples, in float64."""
    log_ratios, ages, clipped, masked = zip(*tokens, strict=True) if tokens else ((),) * 4
    return health_sums(
        torch.tensor(log_ratios, dtype=torch.float64),
        torch.tensor(ages, dtype=torch.int64),
        is_clipped=torch.tensor(clipped, dtype=torch.bool),
        is_masked=torch.tensor(masked, dtype=torch.bool),
    )


def metrics_of(tokens):
    return health_metrics(sums_to_floats(sums_of(tokens)))


def test_every_age_falls_into_the_bucket_that_names_it():
    ages = torch.arange(200)
    for age, bucket in zip(ages.tolist(), age_buckets(ages).tolist(), strict=True):
        low, _, high = AGE_BUCKETS[bucket].rstrip("+").partition("-")
        last = math.inf if AGE_BUCKETS[bucket].endswith("+") else int(high or low)
        assert int(low) <= age <= last


THREE = [(0.0, 0, False, False), (math.log(2), 5, True, False), (math.log(4), 6, False, True)]


def test_three_tokens_by_hand():
    sums = sums_to_floats(sums_of(THREE))
    assert sums["age_tokens"] == [1, 0, 0, 2, 0, 0, 0, 0]
    assert sums["age_ratio_sum"] == pytest.approx([1, 0, 0, 6, 0, 0, 0, 0])
    assert sums["age_ratio_max"] == pytest.approx([1, 0, 0, 4, 0, 0, 0, 0])
    assert health_metrics(sums) == pytest.approx(
        {
            "masked_share": 1 / 3,
            "age/0/tokens": 1, "age/0/ratio_mean": 1, "age/0/ratio_max": 1, "age/0/clip_fraction": 0,
            "age/0/kl_behaviour": 0, "age/0/ess_share": 1, "age/0/masked_share": 0,
            "age/4-7/tokens": 2, "age/4-7/ratio_mean": 3, "age/4-7/ratio_max": 4, "age/4-7/clip_fraction": 0.5,
            "age/4-7/kl_behaviour": -math.log(8) / 2, "age/4-7/ess_share": 36 / 40, "age/4-7/masked_share": 0.5,
        }
    )  # fmt: skip


def slow_metrics(tokens):
    rows = {}
    for token in tokens:
        name = next(b for b in reversed(AGE_BUCKETS) if token[1] >= int(b.rstrip("+").partition("-")[0]))
        rows.setdefault(name, []).append(token)
    metrics = {"masked_share": sum(t[3] for t in tokens) / len(tokens)} if tokens else {}
    for name, row in rows.items():
        ratios, n = [math.exp(t[0]) for t in row], len(row)
        metrics |= {
            f"age/{name}/tokens": n,
            f"age/{name}/ratio_mean": sum(ratios) / n,
            f"age/{name}/ratio_max": max(ratios),
            f"age/{name}/clip_fraction": sum(t[2] for t in row) / n,
            f"age/{name}/kl_behaviour": -sum(t[0] for t in row) / n,
            f"age/{name}/ess_share": sum(ratios) ** 2 / n / sum(r * r for r in ratios),
            f"age/{name}/masked_share": sum(t[3] for t in row) / n,
        }
    return metrics


TOKENS = st.lists(st.tuples(st.floats(-4, 4), st.integers(0, 90), st.booleans(), st.booleans()), max_size=12)


@settings(deadline=None)
@given(TOKENS, st.integers(0, 12))
def test_metrics_equal_the_loop_however_micro_batches_split(tokens, cut):
    merged = merge_sums(merge_sums({}, sums_of(tokens[:cut])), sums_of(tokens[cut:]))
    assert health_metrics(sums_to_floats(merged)) == pytest.approx(slow_metrics(tokens), abs=1e-12)


def test_nothing_measured_is_nothing_said():
    assert metrics_of([]) == {}
    assert health_metrics({}) == {}
    assert health_metrics({"tokens": 3.0}) == {}


def test_ratios_that_are_all_zero_have_no_effective_sample_size():
    metrics = metrics_of([(-math.inf, 1, False, True)])
    assert metrics["age/1/ratio_mean"] == 0.0
    assert metrics["age/1/kl_behaviour"] == math.inf
    assert "age/1/ess_share" not in metrics


@pytest.mark.parametrize("log_ratio", [30.0, 500.0, math.inf])
def test_extreme_ratios_are_held_in_range(log_ratio):
    metrics = metrics_of([(log_ratio, 2, False, False), (0.0, 3, False, False)])
    assert metrics["age/2-3/ratio_max"] == pytest.approx(math.exp(20.0))
    assert metrics["age/2-3/ess_share"] == pytest.approx(0.5)


def test_nan_stays_nan_in_its_own_bucket():
    metrics = metrics_of([(math.nan, 8, False, False), (0.0, 0, False, False)])
    assert all(math.isnan(metrics[f"age/8-15/{name}"]) for name in ("ratio_mean", "ratio_max", "kl_behaviour"))
    assert metrics["age/0/ratio_mean"] == metrics["age/0/ratio_max"] == 1.0


def test_differing_shapes_are_refused():
    three, two = torch.zeros(3), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ShapeError, match="is_clipped"):
        health_sums(three, torch.zeros(3, dtype=torch.int64), is_clipped=two, is_masked=three.bool())
