"""Off-policy health by policy age: how far the policy has moved from the one that sampled its tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import MAX_LOG_RATIO
from asyncrl.algorithms.losses import Sums
from asyncrl.algorithms.sequences import require_same_shape

AGE_BUCKETS = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")
_FIRST_AGES = (1, 2, 4, 8, 16, 32, 64)  # of each bucket but the first

_COLUMNS = ("tokens", "ratio_sum", "ratio_square_sum", "log_ratio_sum", "clipped", "masked")


def age_buckets(policy_ages: Tensor) -> Tensor:
    """Index into AGE_BUCKETS of each token, int64 [N].

    policy_ages  [N] int64, optimizer steps, >= 0

    Example: ages (0, 5, 64): (0, 3, 7).
    """
    return torch.bucketize(policy_ages, _first_ages(policy_ages.device), right=True)


@functools.lru_cache(maxsize=8)
def _first_ages(device: torch.device) -> Tensor:
    """Made once: a copy to a GPU from a list waits for all that is queued there."""
    return torch.tensor(_FIRST_AGES, device=device)


def health_sums(log_ratios: Tensor, policy_ages: Tensor, *, is_clipped: Tensor, is_masked: Tensor) -> Sums:
    """Sums over the tokens of one micro-batch, one entry per age bucket.

    log_ratios   [N] without gradient: log pi - log mu, mu the policy that sampled
    policy_ages  [N] int64, optimizer steps, >= 0
    is_clipped   [N] bool, as a policy loss returns it
    is_masked    [N] bool, True = left out of the loss; masked tokens count in all other sums too

    Ratios are held below e^20. A NaN stays NaN, in the bucket of its token alone.

    Example: r = (1, 2, 4), ages (0, 5, 6): age_tokens (1, 0, 0, 2, 0, 0, 0, 0), age_ratio_sum (1, 0, 0, 6, 0,
    ...), age_ratio_max (1, 0, 0, 4, 0, ...).

    Returns age_tokens, age_ratio_sum, age_ratio_square_sum, age_log_ratio_sum, age_clipped, age_masked and
    age_ratio_max, each [8]; 0 in buckets without tokens. They merge with `losses.merge_sums`. Raises
    ShapeError on differing shapes.
    """
    require_same_shape(log_ratios=log_ratios, policy_ages=policy_ages, is_clipped=is_clipped, is_masked=is_masked)
    buckets = age_buckets(policy_ages)
    ratios = log_ratios.clamp(max=MAX_LOG_RATIO).exp()
    rows = torch.stack(
        [torch.ones_like(ratios), ratios, ratios.square(), log_ratios, is_clipped.to(ratios), is_masked.to(ratios)],
        dim=1,
    )
    table = ratios.new_zeros(len(AGE_BUCKETS), len(_COLUMNS)).index_add(0, buckets, rows)
    sums = {f"age_{name}": column for name, column in zip(_COLUMNS, table.unbind(1), strict=True)}
    sums["age_ratio_max"] = ratios.new_zeros(len(AGE_BUCKETS)).scatter_reduce(0, buckets, ratios, "amax")
    return sums


def health_metrics(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Metrics from the sums of `health_sums`, merged and turned into lists by `losses.sums_to_floats`.

    For each bucket that has tokens, under age/<bucket>/:

        tokens, ratio_mean, ratio_max, clip_fraction, masked_share
        kl_behaviour   mean log mu - log pi: the k1 estimate of KL(behaviour || current)
        ess_share      ESS / N of the ratios, see `effective_sample_share`; absent when all ratios are 0

    and masked_share over all tokens. A bucket without tokens has no keys; without any token the result is empty.

    Example, from that of `health_sums`: age/4-7/tokens 2, age/4-7/ratio_mean 3, age/4-7/ess_share 36 / 40.
    """
    if "age_tokens" not in sums or not any(sums["age_tokens"]):
        return {}
    metrics = {"masked_share": sum(sums["age_masked"]) / sum(sums["age_tokens"])}
    for index, bucket in enumerate(AGE_BUCKETS):
        if sums["age_tokens"][index]:
            part = {name: sums[f"age_{name}"][index] for name in (*_COLUMNS, "ratio_max")}
            metrics |= {f"age/{bucket}/{name}": value for name, value in _bucket_metrics(part).items()}
    return metrics


def _bucket_metrics(part: Mapping[str, float]) -> dict[str, float]:
    tokens = part["tokens"]
    metrics = {
        "tokens": tokens,
        "ratio_mean": part["ratio_sum"] / tokens,
        "ratio_max": part["ratio_max"],
        "clip_fraction": part["clipped"] / tokens,
        "kl_behaviour": -part["log_ratio_sum"] / tokens,
        "masked_share": part["masked"] / tokens,
    }
    if part["ratio_square_sum"]:
        metrics["ess_share"] = part["ratio_sum"] ** 2 / (tokens * part["ratio_square_sum"])
    return metrics
