"""Per-token estimators of the Kullback-Leibler divergence to a reference policy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import MAX_LOG_RATIO, truncated_ratios
from asyncrl.algorithms.sequences import require_same_shape
from asyncrl.errors import ConfigError, NonFiniteError

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference), in nats, from sampled tokens (Schulman 2020, "Approximating KL divergence").

    With d = log pi_ref - log pi of a token sampled from pi:

        k1 = -d              unbiased, high variance, may be negative
        k2 = d^2 / 2         biased, low variance
        k3 = exp(d) - 1 - d  unbiased, never negative; the estimator of GRPO (Shao et al. 2024, eq. 4)
        abs = |d|            a distance, not an estimate of the KL

    A good value is not yet a good gradient. What each teaches, in expectation over tokens of the policy itself:

               in the reward (as a penalty)                   in the loss (differentiated)
        k1     the gradient of KL(policy || reference)        0: the mean of d log pi
        k2     that of another function                       the gradient of KL(policy || reference)
        k3     that of another function, may point away       the gradient of KL(reference || policy)
        abs    that of another function                       the gradient of twice the total variation distance

    So k1 belongs into the reward, k2 and k3 into the loss; `importance_weighted_kl` is for tokens of another policy.

    logprobs            [...] under the policy; carries the gradient
    reference_logprobs  [...] of the same tokens under the reference
    In k3, d is held below 20 inside exp (no gradient beyond), as in verl and NeMo RL.

    Example: log pi = (-1, -1, -1), log pi_ref = (-1, -2, 0): d = (0, -1, 1) and k3 = (0, 0.3679, 0.7183).

    Returns [...]. Raises ShapeError when shapes differ, ConfigError for an unknown estimator.
    """
    require_same_shape(logprobs=logprobs, reference_logprobs=reference_logprobs)
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


def importance_weighted_kl(
    logprobs: Tensor, reference_logprobs: Tensor, behaviour_logprobs: Tensor, cap: float | Tensor | None
) -> Tensor:
    """k3 of tokens that an older policy sampled, weighted by their truncated importance ratio (DeepSeek-V3.2, 3.1).

        min(rho, cap) k3        gradient: min(rho, cap) (log pi - log pi_ref) d log pi

    Both factors carry the gradient. Below the cap the mean over tokens of the *behaviour* policy is exactly
    KL(policy || reference), and so is its gradient; without the weight k2 and k3 are those of neither policy.

    logprobs, reference_logprobs  as in `kl_estimate`; [N]
    behaviour_logprobs            [N] of the policy that sampled
    cap                           float or [N], above 0; None: ratios are held below e^20

    Example: log pi = -1, log pi_ref = -2, log mu = -1.5, no cap: rho = 1.6487, k3 = 0.3679, value 0.6065,
    gradient 1.6487.

    Returns [N]. Raises ShapeError.
    """
    require_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs)
    return truncated_ratios(logprobs - behaviour_logprobs, cap) * kl_estimate(logprobs, reference_logprobs, "k3")


def adapted_kl_coef(coef: float, kl: float, target: float, *, horizon_steps: float = 10.0) -> float:
    """Weight of the KL for the next step, so that the KL comes near its target (Ziegler et al. 2019, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2)        coef' = coef (1 + e / horizon_steps)

    kl, target     nats per token, of this step and wanted; target > 0
    horizon_steps  optimizer steps; 10 is the paper's K_beta = 0.1, with which a step changes coef by 2 % at most

    `kl` may be negative, as some estimators are: that is below any target.

    Example: coef 0.1, target 0.05: kl 0.055 -> 0.101, kl 0.5 -> 0.102, kl 0 -> 0.098.

    Raises NonFiniteError when kl is NaN or infinite: a coefficient once NaN would stay so.
    """
    assert target > 0.0 and horizon_steps > 0.0, (target, horizon_steps)
    if not math.isfinite(kl):
        raise NonFiniteError(f"KL to the reference policy is {kl}; its coefficient cannot be adapted to it")
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error / horizon_steps)
