"""Per-token estimators of the Kullback-Leibler divergence to a reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import MAX_LOG_RATIO
from asyncrl.errors import ConfigError, ShapeError

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference) from the sampled tokens (Schulman 2020, "Approximating KL
    divergence").

    With d = log pi_ref - log pi of a token sampled from pi:

        k1 = -d              unbiased, high variance, may be negative
        k2 = d^2 / 2         biased, low variance; its gradient is that of the exact KL in expectation
        k3 = exp(d) - 1 - d  unbiased, never negative; the estimator of GRPO (Shao et al. 2024, eq. 4)
        abs = |d|            a distance, not an estimate of the KL

    logprobs            [...] under the policy; carries the gradient
    reference_logprobs  [...] of the same tokens under the reference
    In k3, d is held below 20 inside exp (no gradient beyond), as in verl and NeMo RL.

    Example: log pi = (-1, -1, -1), log pi_ref = (-1, -2, 0): d = (0, -1, 1) and k3 = (0, 0.3679, 0.7183).

    Returns [...]. Raises ShapeError when shapes differ, ConfigError for an unknown estimator.
    """
    if logprobs.shape != reference_logprobs.shape:
        shapes = tuple(logprobs.shape), tuple(reference_logprobs.shape)
        raise ShapeError(f"logprobs and reference_logprobs must share one shape; got {shapes}")
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(difference.clamp(max=MAX_LOG_RATIO)) - difference
    if estimator == "abs":
        return difference.abs()
    raise ConfigError(f"KL estimator {estimator!r} is not one of {', '.join(KL_ESTIMATORS)}")
