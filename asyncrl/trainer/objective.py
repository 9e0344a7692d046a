"""The actor's loss on one micro-batch, as the section `algorithm` of the configuration puts it together.

ratio against (behaviour | recomputed | interpolated) → policy loss x correction weights x masks → + KL - entropy
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import (
    age_cap,
    age_clip,
    interpolated_proximal_logprobs,
    sequence_truncated_weights,
    truncated_ratios,
)
from asyncrl.algorithms.health import health_sums
from asyncrl.algorithms.kl import kl_estimate
from asyncrl.algorithms.losses import Sums, ratio_sums
from asyncrl.algorithms.masks import band_mask, opsm_mask, sequence_band_mask
from asyncrl.algorithms.policy_losses import (
    PolicyLoss,
    cispo_loss,
    gspo_loss,
    ppo_clip_loss,
    reinforce_loss,
    topr_loss,
)
from asyncrl.config import Config
from asyncrl.trainer.batch import Prepared


class ActorLosses(NamedTuple):
    """What is minimised, [N]; its part without KL and entropy, [N] without gradient; sums for the metrics."""

    losses: Tensor
    policy_losses: Tensor
    sums: Sums


class ActorObjective:
    """Token losses of the actor under one configuration. Holds no state."""

    def __init__(self, config: Config) -> None:
        self._algorithm = config.algorithm

    def losses(self, one: Prepared, logprobs: Tensor, entropies: Tensor, kl_coef: float) -> ActorLosses:
        """Losses with the gradient of `logprobs` [N] and `entropies` [N]."""
        algorithm = self._algorithm
        log_ratios = logprobs.detach() - one.behaviour_logprobs
        proximal = self._proximal_logprobs(one, logprobs)
        drift = log_ratios if proximal is None else proximal - one.behaviour_logprobs
        stays = self._stays(one, drift)
        weights = self._weights(one, drift, stays, has_proximal=proximal is not None)
        policy = self._policy_loss(one, logprobs, proximal, weights)
        losses = policy.losses
        sums: Sums = {}
        if one.reference_logprobs is not None:
            kl = kl_estimate(logprobs, one.reference_logprobs, algorithm.kl_estimator)
            sums["kl_reference_sum"] = kl.detach().sum()
            if algorithm.kl_in == "loss":
                losses = losses + kl_coef * kl
        if algorithm.entropy_coef > 0.0:
            losses = losses - algorithm.entropy_coef * entropies
        cap = self._cap(one) if algorithm.correction != "none" else None
        sums |= ratio_sums(log_ratios, policy.is_clipped, cap=cap)
        sums |= health_sums(log_ratios, one.policy_ages, is_clipped=policy.is_clipped, is_masked=~stays)
        is_fresh = one.policy_ages == 0
        sums |= {
            "entropy_sum": entropies.detach().sum(),
            "gap_age0_sum": (log_ratios.abs() * is_fresh).sum(),
            "tokens_age0": is_fresh.sum(),
            "non_finite": (~torch.isfinite(logprobs.detach())).sum(),
        }
        return ActorLosses(losses, policy.losses.detach(), sums)

    def _proximal_logprobs(self, one: Prepared, logprobs: Tensor) -> Tensor | None:
        """Log-probs of the policy at the start of the step; None when ratios are against the behaviour policy."""
        if self._algorithm.proximal == "recomputed":
            # Not prepared when the step has one update: then the policy in training is the one at its start.
            return logprobs.detach() if one.start_logprobs is None else one.start_logprobs
        if self._algorithm.proximal == "interpolated":
            return interpolated_proximal_logprobs(logprobs, one.behaviour_logprobs, one.policy_ages)
        return None

    def _stays(self, one: Prepared, drift: Tensor) -> Tensor:
        """Tokens that no mask leaves out, bool [N]; `drift` [N] as in `_weights`."""
        algorithm = self._algorithm
        stays = torch.ones_like(drift, dtype=torch.bool) if one.stays is None else one.stays
        low, high = algorithm.mask_low, algorithm.mask_high
        if "band" in algorithm.masks:
            stays = stays & band_mask(drift, low, high)
        if "sequence_band" in algorithm.masks:
            stays = stays & sequence_band_mask(drift, one.sequence_index, low, high)
        if "opsm" in algorithm.masks:
            stays = stays & opsm_mask(drift, one.sequence_index, one.advantages, algorithm.opsm_delta)
        return stays

    def _weights(self, one: Prepared, drift: Tensor, stays: Tensor, *, has_proximal: bool) -> Tensor:
        """Constant factors of the losses, [N]: 0 under a mask, else the correction that the ratio lacks.

        drift [N] is the log-ratio from the behaviour policy to the proximal one, or to the current without one.

        Where ratios are against the behaviour policy they are the correction themselves, and only their cap is left
        to the loss; against a proximal policy the step from behaviour to proximal is a weight.
        """
        algorithm = self._algorithm
        weights = stays.to(drift.dtype)
        if algorithm.correction == "sequence_tis":
            return weights * sequence_truncated_weights(drift, one.sequence_index, algorithm.tis_cap)
        if algorithm.correction == "tis" and has_proximal:
            return weights * truncated_ratios(drift, self._cap(one))
        return weights

    def _policy_loss(self, one: Prepared, logprobs: Tensor, proximal: Tensor | None, weights: Tensor) -> PolicyLoss:
        algorithm, advantages = self._algorithm, one.advantages
        old = one.behaviour_logprobs if proximal is None else proximal
        cap = self._cap(one) if proximal is None and algorithm.correction == "tis" else None
        low, high = self._clip(one, algorithm.clip_low), self._clip(one, algorithm.clip_high)
        match algorithm.loss:
            case "ppo_clip":
                return ppo_clip_loss(
                    logprobs, old, advantages, clip_low=low, clip_high=high, ratio_cap=cap,
                    dual_clip=algorithm.dual_clip or None, weights=weights,
                )  # fmt: skip
            case "gspo":
                return gspo_loss(
                    logprobs, old, advantages, one.sequence_index, clip_low=low, clip_high=high, ratio_cap=cap,
                    weights=weights,
                )  # fmt: skip
            case "cispo":
                return cispo_loss(logprobs, old, advantages, clip_low=None, clip_high=high, weights=weights)
            case "reinforce":
                has_ratio = algorithm.correction == "tis"
                return reinforce_loss(logprobs, old, advantages, ratio_cap=cap, importance=has_ratio, weights=weights)
            case "topr":
                return topr_loss(logprobs, old, advantages, weights=weights)
        raise AssertionError(f"loss {algorithm.loss!r} is not known")

    def _cap(self, one: Prepared) -> float | Tensor:
        cap = self._algorithm.tis_cap
        return age_cap(cap, one.policy_ages) if self._algorithm.age_schedule == "cap" else cap

    def _clip(self, one: Prepared, clip: float) -> float | Tensor:
        return age_clip(clip, one.policy_ages) if self._algorithm.age_schedule == "clip" else clip
