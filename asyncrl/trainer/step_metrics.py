"""The figures of one step, from the groups themselves and from sums over the tokens that had a gradient.

Keys whose quantity was not measured in a step are absent, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from asyncrl.algorithms.corrections import effective_sample_share
from asyncrl.algorithms.health import health_metrics
from asyncrl.algorithms.losses import Sums, merge_sums, sums_to_floats
from asyncrl.algorithms.value_targets import explained_variance_from_sums
from asyncrl.trainer.engines.base import Gradients
from asyncrl.trainer.plan import BatchPlan
from asyncrl.types import Group


def batch_metrics(groups: Sequence[Group], is_flat: np.ndarray, version: int) -> dict[str, float]:
    """What the groups say by themselves.

    reward_mean, reward_std, completion_tokens_mean, policy_age_mean, policy_age_max, tokens_trained, rollouts_trained,
    groups_trained, groups_zero_variance. `is_flat` is bool [G]: groups whose rewards are all equal.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
    spans = [span for rollout in rollouts for span in rollout.version_spans]
    span_tokens = np.array([span.stop - span.start for span in spans])
    ages = np.array([version - span.version for span in spans])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "completion_tokens_mean": float(np.mean([rollout.num_tokens for rollout in rollouts])),
        "policy_age_mean": float((ages * span_tokens).sum() / span_tokens.sum()),
        "policy_age_max": float(ages.max()),
        "tokens_trained": float(span_tokens.sum()),
        "rollouts_trained": float(len(rollouts)),
        "groups_trained": float(len(groups)),
        "groups_zero_variance": float(is_flat.sum()),
    }


def layout_metrics(plan: BatchPlan) -> dict[str, float]:
    """What the forward passes of one epoch cost: micro_batches, model_inputs, tokens_without_gradient."""
    rows = [micro_batch.rows for mini_batch in plan.mini_batches for micro_batch in mini_batch.micro_batches]
    return {
        "micro_batches": float(len(rows)),
        "model_inputs": float(sum(batch.num_inputs for batch in rows)),
        "tokens_without_gradient": float(plan.num_tokens - sum(batch.num_tokens for batch in rows)),
    }


def pass_metrics(passes: Iterable[tuple[int, float]]) -> dict[str, float]:
    """From the inputs and seconds of each pass of this rank: what a line through them is found by.

    passes, pass_inputs, pass_inputs_squared, pass_s, pass_inputs_s (the sum of inputs x seconds).
    """
    known = list(passes)
    return {
        "passes": float(len(known)),
        "pass_inputs": float(sum(inputs for inputs, _ in known)),
        "pass_inputs_squared": float(sum(inputs * inputs for inputs, _ in known)),
        "pass_s": math.fsum(seconds for _, seconds in known),
        "pass_inputs_s": math.fsum(inputs * seconds for inputs, seconds in known),
    }


def update_metrics(updates: Sequence[Gradients]) -> dict[str, float]:
    """What the updates of a step measured.

    Keys are those of `token_metrics`, grad_norm and critic_grad_norm (before clipping, mean over the updates; absent
    where that model was not trained).
    """
    sums: Sums = {}
    for update in updates:
        sums = merge_sums(sums, update.sums)
    metrics = token_metrics(sums, len(updates))
    norms = {
        "grad_norm": [update.policy_norm for update in updates if update.policy_norm is not None],
        "critic_grad_norm": [update.critic_norm for update in updates if update.critic_norm is not None],
    }
    return metrics | {name: sum(values) / len(values) for name, values in norms.items() if values}


def token_metrics(sums: Sums, num_updates: int) -> dict[str, float]:
    """Means over the tokens that had a gradient, over all updates of the step.

    policy_loss, loss, kl_reference, kl_behaviour (mean log mu - log pi), entropy, clip_fraction, cap_fraction,
    masked_share, ratio_mean, ratio_max, ess_share, logprob_gap (mean |log pi - log mu|), logprob_gap_age0 (the same
    where the policy age is 0: engine mismatch alone), `age/BUCKET/NAME` of `algorithms.health`; with a critic
    value_loss, value_mean, value_clip_fraction and explained_variance.
    """
    if not sums:
        return {"loss": 0.0, "policy_loss": 0.0}
    values = sums_to_floats(sums)
    flat = {name: value for name, value in values.items() if isinstance(value, float)}
    tokens = flat["tokens"]
    total, squares = torch.tensor(flat["ratio_sum"]).double(), torch.tensor(flat["ratio_square_sum"]).double()
    ess = effective_sample_share(total, squares, int(tokens))
    metrics = {
        "loss": flat["loss"] / num_updates,
        "policy_loss": flat["policy_loss"] / num_updates,
        "entropy": flat["entropy_sum"] / tokens,
        "kl_behaviour": -flat["log_ratio_sum"] / tokens,
        "logprob_gap": flat["log_ratio_abs_sum"] / tokens,
        "clip_fraction": flat["clipped"] / tokens,
        "ratio_mean": flat["ratio_sum"] / tokens,
        "ratio_max": flat["ratio_max"],
        "ess_share": float(ess),
    }
    if "capped" in flat:
        metrics["cap_fraction"] = flat["capped"] / tokens
    if "kl_reference_sum" in flat:
        metrics["kl_reference"] = flat["kl_reference_sum"] / tokens
    if flat["tokens_age0"]:
        metrics["logprob_gap_age0"] = flat["gap_age0_sum"] / flat["tokens_age0"]
    if "value_tokens" in flat:
        metrics |= _critic_metrics(flat)
    return metrics | health_metrics({name: value for name, value in values.items() if isinstance(value, list)})


def _critic_metrics(flat: dict[str, float]) -> dict[str, float]:
    tokens = flat["value_tokens"]
    metrics = {
        "value_mean": flat["value_sum"] / tokens,
        "value_loss": flat["value_error_square_sum"] / (2 * tokens),
        "value_clip_fraction": flat["value_clipped"] / tokens,
    }
    explained = explained_variance_from_sums(flat)
    if math.isfinite(explained):
        metrics["explained_variance"] = explained
    return metrics
