"""Advantages: group-relative (GRPO, Dr. GRPO) and generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algorithms.logprobs import require_finite
from asyncrl.errors import ShapeError


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

    Groups whose rewards are all equal, groups of one among them, tell nothing about the policy: their
    advantages are exactly 0.0, not rounding noise divided by epsilon (see `zero_variance_groups` to count
    them).

    Example: rewards (1, 0, 0) of one group: mean 1/3, std 0.57735 -> (1.1547, -0.57735, -0.57735).

    Returns [R]. Raises ShapeError on differing shapes and NonFiniteError on a reward that is NaN or infinite.
    """
    _check_groups(rewards, group_index)
    counts = torch.bincount(group_index, minlength=num_groups).to(rewards.dtype)
    means = _group_sum(rewards, group_index, num_groups) / counts.clamp_min(1)
    centred = rewards - means[group_index]
    if normalize_std:
        variances = _group_sum(centred.square(), group_index, num_groups) / (counts - 1).clamp_min(1)
        centred = centred / (variances.sqrt()[group_index] + epsilon)
    flat = zero_variance_groups(rewards, group_index, num_groups)
    return centred.masked_fill(flat[group_index], 0.0)


def zero_variance_groups(rewards: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    """Which groups have no two different rewards, bool [num_groups]. Arguments as
    `group_relative_advantages`.
    """
    _check_groups(rewards, group_index)
    lowest = rewards.new_full((num_groups,), torch.inf).scatter_reduce(0, group_index, rewards, "amin")
    highest = rewards.new_full((num_groups,), -torch.inf).scatter_reduce(0, group_index, rewards, "amax")
    return lowest >= highest  # a group without rollouts keeps (inf, -inf) and counts as flat


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over completion tokens.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    rewards, values  [B, T], value of the state before token t; mask [B, T] bool, True on completion tokens,
    which are contiguous in each row. Behind its last token a row has ended: value and advantage there are 0.

    Example: rewards (0, 0, 1), values (0.5, 0.5, 0.5), gamma = lam = 1: A = (0.5, 0.5, 0.5), returns (1, 1,
    1).

    Returns (advantages, returns), both [B, T] and 0.0 outside the mask; nothing is whitened.
    Raises ShapeError when shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        shapes = tuple(rewards.shape), tuple(values.shape), tuple(mask.shape)
        raise ShapeError(f"rewards, values and mask must share one shape [B, T]; got {shapes}")
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def _group_sum(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add(0, group_index, values)


def _check_groups(rewards: Tensor, group_index: Tensor) -> None:
    if rewards.dim() != 1 or rewards.shape != group_index.shape:
        raise ShapeError(
            f"rewards and group_index must both be [R]; got {tuple(rewards.shape)} and {tuple(group_index.shape)}"
        )
    require_finite(rewards, "rewards")
