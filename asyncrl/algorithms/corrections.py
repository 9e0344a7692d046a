"""Importance ratios between the policy that sampled a token and the one being trained, and how to bound them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.algorithms.sequences import require_same_shape, sequence_means, sequence_sums

# A ratio of e^20 is as good as infinite; without the bound float32 overflows at 88 and gradients become NaN.
MAX_LOG_RATIO = 20.0


def log_importance_ratios(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Log-ratio log rho = log pi - log mu of each token, [N]. Carries the gradient of logprobs. Raises ShapeError."""
    require_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    return logprobs - behaviour_logprobs


def truncated_ratios(log_ratios: Tensor, cap: float | Tensor | None) -> Tensor:
    """min(rho, cap), with the gradient of a truncated importance weight (TIS; Espeholt et al. 2018, section 4.1).

        value  min(rho, cap)            gradient  min(rho, cap) * d log pi

    A plain `clamp` has no gradient above the cap: a token that became much likelier although it was bad would
    stay so. Truncation keeps pushing it back, with a bounded weight. Both agree below the cap. Without a cap
    the ratio is held below e^20 in the same way.

    log_ratios  [N] from `log_importance_ratios`; -inf gives 0, NaN stays NaN, no value overflows
    cap         float, or [N] for a cap per token (`age_cap`); above 0

    Example: rho = (0.5, 1, 4), cap 2: value (0.5, 1, 2); d value / d log pi = (0.5, 1, 2).

    Returns [N]. Raises ShapeError when `cap` is a tensor of another shape.
    """
    limit: float | Tensor
    if isinstance(cap, Tensor):
        require_same_shape(log_ratios=log_ratios, cap=cap)
        limit = cap.to(log_ratios.dtype).log().clamp(max=MAX_LOG_RATIO)
    else:
        limit = MAX_LOG_RATIO if cap is None else min(math.log(cap), MAX_LOG_RATIO)
    excess = (log_ratios.detach() - limit).clamp(min=0.0)
    # inf - inf would be NaN: an infinite ratio is truncated like any other, and the caller reports its cause.
    return torch.exp(torch.where(torch.isposinf(excess), limit, log_ratios - excess))


def sequence_truncated_weights(
    log_ratios: Tensor, sequence_index: Tensor, cap: float | Tensor, *, mean: bool = False
) -> Tensor:
    """Truncated importance weights of whole sequences, read off at every token, [N] without gradient.

        w = min(exp(sum over the sequence of log rho), cap)       the ratio of the sequence; verl, SkyRL
        w = min(exp(mean over the sequence of log rho), cap)      with `mean`: its geometric mean; AReaL

    The sum is unbiased below the cap, but after some thousand tokens it is either near 0 or at the cap.

    log_ratios      [N] log rho, detached here. One -inf makes the weight of its sequence 0; a NaN, or -inf and inf
                    together, make it NaN
    sequence_index  [N] int64, see `sequences`

    Example: rho = (2, 2, 0.5), sequences (0, 0, 1), cap 3: (3, 3, 0.5); with mean: (2, 2, 0.5).

    Raises ShapeError.
    """
    reduce = sequence_means if mean else sequence_sums
    return truncated_ratios(reduce(log_ratios.detach(), sequence_index), cap)


def interpolated_proximal_logprobs(logprobs: Tensor, behaviour_logprobs: Tensor, policy_ages: Tensor) -> Tensor:
    """Proximal log-probs of decoupled PPO without a forward pass, by token age (A-3PO, 2512.06547).

        log pi_p = log mu + a (log pi - log mu)        a = (v_p - v_mu) / (v_pi - v_mu) = d / (d + 1)

    v_mu is the version that sampled the token, v_p the trainer's, v_pi = v_p + 1 the one being made, and d = v_p - v_mu
    the policy age. So a fresh token has pi_p = mu, and the ratio pi / pi_p = (pi / mu)^(1 / (d + 1)) of an old one is
    that of one step out of d + 1 equal ones.

    logprobs, behaviour_logprobs  [N]; policy_ages [N] int64, >= 0

    Example: log mu = -2, log pi = -1, ages (0, 1, 3): (-2, -1.5, -1.25).

    Returns [N] without gradient. Raises ShapeError.
    """
    require_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, policy_ages=policy_ages)
    ages = policy_ages.to(logprobs.dtype)
    share = ages / (ages + 1.0)
    return behaviour_logprobs + share * (logprobs.detach() - behaviour_logprobs)


def age_cap(cap: float, policy_ages: Tensor) -> Tensor:
    """Cap of importance ratios that falls with the policy age d of a token: C(d) = 1 + (cap - 1) / (1 + d).

    The schedule is ours, not a published one: old ratios are noisier, so they may amplify less, down to 1.

    cap          a ratio, above 1
    policy_ages  [N] int64, optimizer steps, >= 0

    Example: cap 3, ages (0, 1, 3): (3, 2, 1.5).

    Returns float32 [N].
    """
    return 1.0 + (cap - 1.0) / (1.0 + policy_ages)


def age_clip(clip: float, policy_ages: Tensor) -> Tensor:
    """Clip distance that falls with the policy age d of a token: eps(d) = clip / sqrt(1 + d).

    The schedule is ours, not a published one.

    clip         distance of a ratio from 1
    policy_ages  [N] int64, optimizer steps, >= 0

    Example: clip 0.2, ages (0, 3, 8): (0.2, 0.1, 0.0667).

    Returns float32 [N].
    """
    return clip * torch.rsqrt(1.0 + policy_ages)


def effective_sample_share(total: Tensor, total_of_squares: Tensor, count: int | Tensor) -> Tensor:
    """Effective sample size over N, (sum w)^2 / (N sum w^2), in [1/N, 1] (Kong 1992).

    total, total_of_squares  sums of the N weights w >= 0 and of their squares: they add up over micro-batches and ranks
    count                    N

    Example: w = (1, 1, 1) -> 1; w = (3, 0, 0) -> 1/3.

    Returns a scalar; NaN without weights, or where all are 0: nothing was measured.
    """
    return total.square() / (count * total_of_squares)
