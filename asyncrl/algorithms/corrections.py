"""Importance ratios between the policy that sampled a token and the one being trained, and how to bound
them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.errors import ShapeError

# A ratio of e^20 is as good as infinite; without the bound float32 overflows at 88 and gradients become NaN.
MAX_LOG_RATIO = 20.0


def log_importance_ratios(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """log rho = log pi - log mu per token, [N]. Carries the gradient of logprobs. Raises ShapeError."""
    if logprobs.shape != behaviour_logprobs.shape:
        shapes = tuple(logprobs.shape), tuple(behaviour_logprobs.shape)
        raise ShapeError(f"logprobs and behaviour_logprobs must share one shape; got {shapes}")
    return logprobs - behaviour_logprobs


def truncated_ratios(log_ratios: Tensor, cap: float | None) -> Tensor:
    """min(rho, cap), with the gradient of a truncated importance weight (TIS; Espeholt et al. 2018, section
    4.1).

        value  min(rho, cap)            gradient  min(rho, cap) * d log pi

    A plain `clamp` has no gradient above the cap: a token that became much likelier although it was bad would
    stay so. Truncation keeps pushing it back, with a bounded weight. Both agree below the cap. Without a cap
    the ratio is held below e^20 in the same way.

    log_ratios [N] from `log_importance_ratios`; -inf gives 0, NaN stays NaN, no value overflows.

    Example: rho = (0.5, 1, 4), cap 2: value (0.5, 1, 2); d value / d log pi = (0.5, 1, 2).
    """
    limit = MAX_LOG_RATIO if cap is None else min(math.log(cap), MAX_LOG_RATIO)
    excess = (log_ratios.detach() - limit).clamp(min=0.0)
    # inf - inf would be NaN: an infinite ratio is truncated like any other, its cause is reported by the
    # caller.
    return torch.exp(torch.where(torch.isposinf(excess), limit, log_ratios - excess))


def truncated_importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """TIS weights w = sg(min(pi / mu, cap)), [N], without gradient. Raises ShapeError."""
    return truncated_ratios(log_importance_ratios(logprobs, behaviour_logprobs).detach(), cap)


def effective_sample_share(weights: Tensor) -> Tensor:
    """ESS / N = (sum w)^2 / (N sum w^2) in [1/N, 1] (Kong 1992); alarm below about 0.3.

    Example: w = (1, 1, 1) -> 1; w = (3, 0, 0) -> 1/3. No weights, or only zeros -> NaN: nothing was measured.
    """
    return effective_sample_share_from_sums(weights.sum(), weights.square().sum(), weights.numel())


def effective_sample_share_from_sums(total: Tensor, total_of_squares: Tensor, count: int | Tensor) -> Tensor:
    """`effective_sample_share` from sums, which add up over micro-batches and ranks."""
    return total.square() / (count * total_of_squares)
