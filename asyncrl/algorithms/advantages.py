"""Advantages from rewards alone: against the group, the batch or a greedy completion.

Those that need a critic are in `value_targets`. Rewards and advantages are in the task's own units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algorithms.logprobs import require_finite
from asyncrl.algorithms.reducer import OneRank, Reducer
from asyncrl.errors import NonFiniteError, ShapeError


def group_relative_advantages(
    rewards: Tensor,
    group_index: Tensor,
    num_groups: int,
    *,
    normalize_std: bool = True,
    epsilon: float = 1e-6,
) -> Tensor:
    """Advantage of each rollout against the others of its group (GRPO, Shao et al. 2024, section 4.1.2).

        A_i = (R_i - mean(R)) / (std(R) + epsilon)
        A_i = R_i - mean(R)                              without `normalize_std` (Dr. GRPO, Liu et al. 2025)

    rewards      [R] floating point
    group_index  [R] int64 in [0, num_groups): which group a rollout belongs to, in any order
    The standard deviation is the unbiased one, as in verl, TRL and AReaL; epsilon is verl's.

    Groups whose rewards are all equal, groups of one among them, tell nothing about the policy: their advantages are
    exactly 0.0, not rounding noise divided by epsilon. `zero_variance_groups` says which groups those are.

    Example: rewards (1, 0, 0) of one group: mean 1/3, std 0.57735 -> (1.1547, -0.57735, -0.57735).

    Returns [R]. Raises ShapeError on differing shapes and NonFiniteError on a reward that is NaN or infinite.
    """
    _check_groups(rewards, group_index)
    centred, counts = _centred(rewards, group_index, num_groups)
    if normalize_std:
        variances = _group_sum(centred.square(), group_index, num_groups) / (counts - 1).clamp_min(1)
        centred = centred / (variances.sqrt()[group_index] + epsilon)
    flat = zero_variance_groups(rewards, group_index, num_groups)
    return centred.masked_fill(flat[group_index], 0.0)


def zero_variance_groups(rewards: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """Which groups have no two different rewards, bool [num_groups].

    Arguments and errors are those of `group_relative_advantages`.
    """
    _check_groups(rewards, group_index)
    lowest = rewards.new_full((num_groups,), torch.inf).scatter_reduce(0, group_index, rewards, "amin")
    highest = rewards.new_full((num_groups,), -torch.inf).scatter_reduce(0, group_index, rewards, "amax")
    return lowest >= highest  # a group without rollouts keeps (inf, -inf) and counts as flat


def rloo_advantages(rewards: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """Reward of each rollout minus the mean of the others of its group (REINFORCE leave-one-out).

    Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics", 2402.14740.

        A_i = R_i - 1 / (n - 1) sum_{j != i} R_j = n / (n - 1) (R_i - mean(R))

    The baseline does not depend on rollout i, so the gradient is unbiased; that of Dr. GRPO is the same up to
    the factor n / (n - 1). Nothing is divided by a standard deviation.

    rewards, group_index, num_groups  as in `group_relative_advantages`

    Groups whose rewards are all equal get exactly 0.0. A group of one has no others to compare with and
    gets 0.0 too, so that it gives no gradient. (verl keeps its bare reward, which is on another scale than all
    other advantages.)

    Example: rewards (1, 0, 0.5) of one group: others' means (0.25, 0.75, 0.5) -> (0.75, -0.75, 0).

    Returns [R]. Raises ShapeError on differing shapes and NonFiniteError on a reward that is NaN or infinite.
    """
    _check_groups(rewards, group_index)
    centred, counts = _centred(rewards, group_index, num_groups)
    scale = counts / (counts - 1).clamp_min(1)
    flat = zero_variance_groups(rewards, group_index, num_groups)
    return (centred * scale[group_index]).masked_fill(flat[group_index], 0.0)


def reinforce_pp_advantages(
    rewards: Tensor,
    *,
    epsilon: float = 1e-6,
    group_index: Tensor | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """Rewards whitened over the whole batch instead of within a group (REINFORCE++, Hu 2025, 2501.03262).

        A_i = (R_i - mean(R)) / (std(R) + epsilon)                                      over the batch
        A_i = R'_i / (std(R') + epsilon),  R'_i = R_i - mean(R of the group of i)       with groups: "baseline"

    rewards                  [R] of the whole batch: those of one micro-batch or rank alone would be whitened apart
    group_index, num_groups  both or neither, as in `group_relative_advantages`. With them it is the paper's variant
                             with a baseline: the group takes away how hard a prompt is, the batch sets the scale

    The mean and the (unbiased) standard deviation count every rollout once. verl and OpenRLHF repeat a rollout's
    reward for each of its tokens and whiten `rewards[sequence_index]`, so that long completions weigh more.

    Where all rewards are equal, or with groups all rewards of a group, advantages are exactly 0.0.

    Example: rewards (1, 0, 0): mean 1/3, std 0.57735 -> (1.1547, -0.57735, -0.57735). Groups (0, 0, 1):
    R' = (0.5, -0.5, 0), std 0.5 -> (1, -1, 0).

    Returns [R]. Raises ShapeError on differing shapes and NonFiniteError on a reward that is NaN or infinite.
    """
    if group_index is None:
        assert num_groups is None, "num_groups without group_index"
        if rewards.dim() != 1:
            raise ShapeError(f"rewards must be [R]; got {tuple(rewards.shape)}")
        require_finite(rewards, "rewards")
        return whiten(rewards, epsilon=epsilon)
    assert num_groups is not None, "group_index without num_groups"
    _check_groups(rewards, group_index)
    flat = zero_variance_groups(rewards, group_index, num_groups)[group_index]
    centred, _ = _centred(rewards, group_index, num_groups)
    # Once more at the end: whitening subtracts a mean that is 0 up to rounding.
    return whiten(centred.masked_fill(flat, 0.0), epsilon=epsilon).masked_fill(flat, 0.0)


def remax_advantages(rewards: Tensor, baselines: Tensor) -> Tensor:
    """Reward of each rollout minus that of the greedy completion of its prompt (ReMax, Li et al. 2023, 2310.10505).

        A_i = R_i - R(greedy completion of the prompt of i)

    rewards    [R]
    baselines  [R], reward of the greedy completion, repeated for the rollouts of a prompt. That completion must come
               from the policy that sampled the rollouts, or one near it

    A greedy completion that could not be scored has no reward. Its baseline is NaN, which is refused here and never
    taken for a reward of 0.

    Example: rewards (1, 0, 0.5), baselines (0.5, 0.5, 0.5) -> (0.5, -0.5, 0).

    Returns [R]. Raises ShapeError on differing shapes, NonFiniteError on a reward or baseline that is not finite.
    """
    if rewards.dim() != 1 or rewards.shape != baselines.shape:
        shapes = tuple(rewards.shape), tuple(baselines.shape)
        raise ShapeError(f"rewards and baselines must both be [R]; got {shapes}")
    require_finite(rewards, "rewards")
    require_finite(baselines, "baselines (leave out groups whose greedy completion has no reward)")
    return rewards - baselines


def whiten(
    values: Tensor, mask: Tensor | None = None, *, epsilon: float = 1e-6, ranks: Reducer | None = None
) -> Tensor:
    """Values shifted and scaled to mean 0 and standard deviation 1 over all tokens: for the advantages of a critic.

    Advantage normalisation; Andrychowicz et al. 2021, "What matters for on-policy deep actor-critic methods?".

        (x - mean(x)) / (std(x) + epsilon)

    values  [N] or [B, T]: all tokens of the whole batch
    mask    bool, shape of values: only tokens inside count, the others become 0.0. None: all count
    ranks   who holds the other tokens of the batch. None: nobody

    The standard deviation is the unbiased one (divisor N - 1), as in `group_relative_advantages` and verl;
    OpenRLHF divides by N. Where all values are equal, and where there is only one, the result is exactly 0.0.

    Example: (1, 2, 3): mean 2, std 1 -> (-1, 0, 1).

    Returns the shape of values. Raises ShapeError on differing shapes and NonFiniteError on a NaN or infinity
    inside the mask.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if values.shape != mask.shape:
        raise ShapeError(f"values and mask must share one shape; got {tuple(values.shape)} and {tuple(mask.shape)}")
    ranks = ranks or OneRank()
    inside = values[mask].double()
    # Of all ranks before anything is refused: a rank that raised alone would leave the others waiting.
    bad = (~torch.isfinite(inside)).sum(dtype=torch.float64)
    count, total, bad = ranks.sum(torch.stack([inside.new_full((), inside.numel()), inside.sum(), bad])).unbind()
    if bad:
        raise NonFiniteError(f"{int(bad)} of {int(count)} values of the values to whiten are NaN or infinite")
    nothing = inside.new_full((1,), -torch.inf)
    extremes = torch.stack([torch.cat([inside, nothing]).max(), torch.cat([-inside, nothing]).max()])
    largest, smallest = ranks.largest(extremes).unbind()
    if largest <= -smallest:
        return torch.zeros_like(values)
    mean = total / count
    variance = ranks.sum((inside - mean).square().sum().reshape(1))[0] / (count - 1)
    return torch.where(mask, ((values - mean) / (variance.sqrt() + epsilon)).to(values.dtype), 0.0)


def _centred(rewards: Tensor, group_index: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Rewards minus the mean of their group, [R], and the size of each group, [num_groups]."""
    counts = torch.bincount(group_index, minlength=num_groups).to(rewards.dtype)
    means = _group_sum(rewards, group_index, num_groups) / counts.clamp_min(1)
    return rewards - means[group_index], counts


def _group_sum(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add(0, group_index, values)


def _check_groups(rewards: Tensor, group_index: Tensor) -> None:
    if rewards.dim() != 1 or rewards.shape != group_index.shape:
        raise ShapeError(
            f"rewards and group_index must both be [R]; got {tuple(rewards.shape)} and {tuple(group_index.shape)}"
        )
    require_finite(rewards, "rewards")
