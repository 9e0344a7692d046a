"""The actor's loss on one micro-batch, as the section `algorithm` of the configuration puts it together.

    ratio against (behaviour | recomputed | interpolated) → policy loss x loss factors → + KL - entropy

A loss factor is 0 where a mask leaves a token out, else the correction that the ratio of the loss lacks.
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
from asyncrl.algorithms.kl import importance_weighted_kl, kl_estimate
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
from asyncrl.algorithms.sequences import sequence_means, sequence_sums
from asyncrl.config import Config
from asyncrl.config.methods import chosen_kl_estimator
from asyncrl.trainer.batch import MicroBatchData


class ActorLosses(NamedTuple):
    """The actor's losses on the N completion tokens of a micro-batch."""

    losses: Tensor  # [N], what is minimised; carries the gradient
    policy_losses: Tensor  # [N], the same without KL and entropy, and without gradient
    sums: Sums  # for the metrics


class ActorObjective:
    """Token losses of the actor under one configuration. Holds no state."""

    def __init__(self, config: Config) -> None:
        self._algorithm = config.algorithm

    def losses(self, data: MicroBatchData, logprobs: Tensor, entropies: Tensor, kl_coef: float) -> ActorLosses:
        """Losses with the gradient of `logprobs` [N] and `entropies` [N], the actor's as it is now."""
        algorithm = self._algorithm
        log_ratios = logprobs.detach() - data.behaviour_logprobs
        proximal = self._proximal_logprobs(data, logprobs)
        # From the behaviour policy to the proximal one, against which the loss takes its ratio; without a proximal
        # policy, to the current one.
        correction_log_ratios = log_ratios if proximal is None else proximal - data.behaviour_logprobs
        keep_mask = self._keep_mask(data, correction_log_ratios)
        loss_factors = self._loss_factors(data, correction_log_ratios, keep_mask, has_proximal=proximal is not None)
        policy = self._policy_loss(data, logprobs, proximal, loss_factors)
        losses = policy.losses
        sums: Sums = {}
        if data.reference_logprobs is not None:
            kl = self._kl(data, data.reference_logprobs, logprobs)
            sums["kl_reference_sum"] = kl.detach().sum()
            if algorithm.kl_in == "loss":
                losses = losses + kl_coef * kl
        if algorithm.entropy_coef > 0.0:
            losses = losses - algorithm.entropy_coef * entropies
        is_capped = self._is_capped(data, correction_log_ratios, has_proximal=proximal is not None)
        sums |= ratio_sums(log_ratios, policy.is_clipped, is_capped=is_capped)
        sums |= health_sums(log_ratios, data.policy_ages, is_clipped=policy.is_clipped, is_masked=~keep_mask)
        is_fresh = data.policy_ages == 0
        sums |= {
            "entropy_sum": entropies.detach().sum(),
            "gap_age0_sum": (log_ratios.abs() * is_fresh).sum(),
            "tokens_age0": is_fresh.sum(),
            "non_finite": (~torch.isfinite(logprobs.detach())).sum(),
        }
        return ActorLosses(losses, policy.losses.detach(), sums)

    def _proximal_logprobs(self, data: MicroBatchData, logprobs: Tensor) -> Tensor | None:
        """Log-probs [N] of the policy the ratio is taken against; None = the behaviour policy."""
        if self._algorithm.proximal == "recomputed":
            # Not prepared when the step has one update: then the policy in training is the one at its start.
            return logprobs.detach() if data.start_logprobs is None else data.start_logprobs
        if self._algorithm.proximal == "interpolated":
            return interpolated_proximal_logprobs(logprobs, data.behaviour_logprobs, data.policy_ages)
        return None

    def _keep_mask(self, data: MicroBatchData, log_ratios: Tensor) -> Tensor:
        """Tokens that no mask leaves out, bool [N]; `log_ratios` [N] as in `_loss_factors`."""
        algorithm = self._algorithm
        keep_mask = torch.ones_like(log_ratios, dtype=torch.bool) if data.keep_mask is None else data.keep_mask
        low, high = algorithm.mask_low, algorithm.mask_high
        if "band" in algorithm.masks:
            keep_mask = keep_mask & band_mask(log_ratios, low, high)
        if "sequence_band" in algorithm.masks:
            keep_mask = keep_mask & sequence_band_mask(log_ratios, data.sequence_index, low, high)
        if "opsm" in algorithm.masks:
            keep_mask = keep_mask & opsm_mask(log_ratios, data.sequence_index, data.advantages, algorithm.opsm_delta)
        return keep_mask

    def _loss_factors(
        self, data: MicroBatchData, log_ratios: Tensor, keep_mask: Tensor, *, has_proximal: bool
    ) -> Tensor:
        """Constant factors of the losses, [N]: 0 under a mask, else the correction that the loss's ratio lacks.

        log_ratios  [N], from the behaviour policy to the proximal one, or to the current one without a proximal

        A ratio against the behaviour policy is the correction itself, and only its cap is left to the loss. With a
        proximal policy the ratio starts there, so the way from the behaviour policy to it becomes a factor.
        """
        algorithm = self._algorithm
        factors = keep_mask.to(log_ratios.dtype)
        if algorithm.correction == "sequence_tis":
            return factors * sequence_truncated_weights(log_ratios, data.sequence_index, algorithm.tis_cap)
        if algorithm.correction == "tis" and has_proximal:
            return factors * truncated_ratios(log_ratios, self._cap(data))
        return factors

    def _is_capped(self, data: MicroBatchData, log_ratios: Tensor, *, has_proximal: bool) -> Tensor | None:
        """Tokens whose importance weight the cap truncated, bool [N]; None where there is no cap.

        log_ratios  [N] as in `_loss_factors`
        """
        algorithm, index = self._algorithm, data.sequence_index
        if algorithm.correction == "sequence_tis":
            return sequence_sums(log_ratios, index).exp() > algorithm.tis_cap
        if algorithm.correction == "none" or (algorithm.loss in ("cispo", "topr") and not has_proximal):
            return None
        if algorithm.loss == "gspo" and not has_proximal:
            log_ratios = sequence_means(log_ratios, index)
        return log_ratios.exp() > self._cap(data)

    def _kl(self, data: MicroBatchData, reference_logprobs: Tensor, logprobs: Tensor) -> Tensor:
        """KL to the reference, [N], as the loss takes it."""
        estimator = chosen_kl_estimator(self._algorithm.kl_estimator, self._algorithm.kl_in)
        if estimator == "k3_weighted":
            cap = self._cap(data)
            return importance_weighted_kl(logprobs, reference_logprobs, data.behaviour_logprobs, cap)
        return kl_estimate(logprobs, reference_logprobs, estimator)

    def _policy_loss(
        self, data: MicroBatchData, logprobs: Tensor, proximal: Tensor | None, loss_factors: Tensor
    ) -> PolicyLoss:
        algorithm, advantages = self._algorithm, data.advantages
        old = data.behaviour_logprobs if proximal is None else proximal
        cap = self._cap(data) if proximal is None and algorithm.correction == "tis" else None
        low, high = self._clip(data, algorithm.clip_low), self._clip(data, algorithm.clip_high)
        match algorithm.loss:
            case "ppo_clip":
                return ppo_clip_loss(
                    logprobs, old, advantages, clip_low=low, clip_high=high, ratio_cap=cap,
                    dual_clip=algorithm.dual_clip or None, loss_factors=loss_factors,
                )  # fmt: skip
            case "gspo":
                return gspo_loss(
                    logprobs, old, advantages, data.sequence_index, clip_low=low, clip_high=high, ratio_cap=cap,
                    loss_factors=loss_factors,
                )  # fmt: skip
            case "cispo":
                return cispo_loss(logprobs, old, advantages, clip_low=None, clip_high=high, loss_factors=loss_factors)
            case "reinforce":
                has_ratio = algorithm.correction == "tis"
                return reinforce_loss(
                    logprobs, old, advantages, ratio_cap=cap, importance=has_ratio, loss_factors=loss_factors
                )
            case "topr":
                return topr_loss(logprobs, old, advantages, loss_factors=loss_factors)
        raise AssertionError(f"loss {algorithm.loss!r} is not known")

    def _cap(self, data: MicroBatchData) -> float | Tensor:
        cap = self._algorithm.tis_cap
        return age_cap(cap, data.policy_ages) if self._algorithm.age_schedule == "cap" else cap

    def _clip(self, data: MicroBatchData, clip: float) -> float | Tensor:
        return age_clip(clip, data.policy_ages) if self._algorithm.age_schedule == "clip" else clip
