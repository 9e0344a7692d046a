"""Policy losses per token, and their aggregation over the global batch.

Completion tokens come flat, [N], as `replay.packing` lays them out: there is no padding here and so no mask.
Losses return one value per token together with `Sums`: detached scalars that add up over micro-batches
(`merge_sums`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import MAX_LOG_RATIO, log_importance_ratios, truncated_ratios
from asyncrl.errors import ConfigError, ShapeError

Sums = dict[str, Tensor]

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def ppo_clip_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    ratio_cap: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """PPO clipped surrogate (Schulman et al. 2017, eq. 7) with a truncated importance ratio, per token.

    With mu the policy that sampled the token, r = pi / mu and r_C = `truncated_ratios`(r, ratio_cap):

        loss = max(-r_C A, -clip(r_C, 1 - clip_low, 1 + clip_high) A)
        A < 0 and dual_clip = c:  loss = min(loss, -c A)                      (Ye et al. 2020, eq. 5)

    How clip and cap share the work, as the weight of A * d log pi in the gradient:

                 r < 1 - clip_low    inside    1 + clip_high < r <= C    r > C
        A > 0           r              r                 0                 0
        A < 0           0              r                 r                 C    (dual clip: 0 from c on)

    PPO's clip is one-sided: for A < 0 it leaves the ratio unbounded above, and one stale token can own the
    gradient. The cap (above 1 + clip_high as a rule) bounds it there only, and keeps the gradient.
    Taking the ratio against mu, not against the policy at the start of the step, makes the clip a trust
    region around what was sampled: with one optimizer step per batch the latter ratio is 1 and clips nothing.

    Decoupled PPO (Hilton et al. 2021, eq. 8) is the same function: give the proximal log-probs as
    `behaviour_logprobs` and sg(min(pi_prox / mu, C)) as `weights`, which multiply the loss.

    logprobs            [N] under the policy being trained; carries the gradient
    behaviour_logprobs  [N] recorded by the generator when it sampled the token
    advantages          [N]; clip_low, clip_high, float or [N]; weights [N] without gradient

    Example: A = (1, -1, -1), r = (1.5, 0.5, 4), clip 0.2 / 0.2, cap 2: loss = (-1.2, 0.8, 2).

    Returns (losses [N], sums). Sums: tokens, ratio_sum, ratio_square_sum, ratio_max, clipped (tokens whose
    gradient the clip switched off), capped, log_ratio_sum, log_ratio_abs_sum; ratios there are before the
    cap. Raises ShapeError on differing shapes. Looks at no value (that would wait for the device): NaN stays
    NaN; check inputs with `require_finite`.
    """
    _same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, advantages=advantages)
    log_ratios = log_importance_ratios(logprobs, behaviour_logprobs)
    ratios = truncated_ratios(log_ratios, ratio_cap)
    plain = -ratios * advantages
    clipped = -torch.clamp(ratios, 1.0 - clip_low, 1.0 + clip_high) * advantages
    losses = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip is not None:
        bound = -dual_clip * advantages
        is_bounded = (advantages < 0) & (bound < losses)
        losses = torch.where(is_bounded, bound, losses)
        is_clipped = is_clipped | is_bounded
    if weights is not None:
        _same_shape(logprobs=logprobs, weights=weights)
        losses = losses * weights
    return losses, _ratio_sums(log_ratios.detach(), is_clipped, ratio_cap)


def aggregate_loss(
    losses: Tensor,
    sequence_index: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    mode: str = "token-mean",
    max_tokens: int | None = None,
) -> Tensor:
    """Reduces per-token losses to this micro-batch's part of the global loss.

    Parts add up: over micro-batches and ranks, in any split that keeps sequences whole, their sum is the loss
    of the whole batch, because counts are those of the global batch.

        token-mean                sum over tokens / num_tokens                                    (DAPO)
        seq-mean-token-mean       sum over sequences of (its mean over tokens) / num_sequences    (GRPO, GSPO)
        seq-mean-token-sum        sum over tokens / num_sequences
        seq-mean-token-sum-norm   sum over tokens / (num_sequences * max_tokens)                  (Dr. GRPO)

    losses          [N]; sequence_index [N] int64, which sequence of the micro-batch a token belongs to
    num_tokens, num_sequences   of the global batch: all ranks, all micro-batches
    max_tokens      the constant length of the last mode

    Example: losses (1, 2, 3), sequences (0, 0, 1), alone: token-mean 2, seq-mean-token-mean (1.5 + 3) / 2 =
    2.25.

    Returns a scalar; 0 (with a graph) for N = 0. Raises ShapeError on differing shapes, ConfigError for an
    unknown mode.
    """
    _same_shape(losses=losses, sequence_index=sequence_index)
    if mode == "token-mean":
        return losses.sum() / num_tokens
    if mode == "seq-mean-token-sum":
        return losses.sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        assert max_tokens, "seq-mean-token-sum-norm divides by max_tokens"
        return losses.sum() / (num_sequences * max_tokens)
    if mode == "seq-mean-token-mean":
        lengths = torch.bincount(sequence_index)
        return (losses / lengths[sequence_index]).sum() / num_sequences
    raise ConfigError(f"loss aggregation {mode!r} is not one of {', '.join(AGGREGATIONS)}")


def merge_sums(total: Sums, part: Sums) -> Sums:
    """Adds the sums of one micro-batch to those so far; keys ending in `_max` keep the larger. Returns a new
    dict.
    """
    merged = dict(total)
    for name, value in part.items():
        if name not in merged:
            merged[name] = value
        elif name.endswith("_max"):
            merged[name] = torch.maximum(merged[name], value)
        else:
            merged[name] = merged[name] + value
    return merged


def _ratio_sums(log_ratios: Tensor, is_clipped: Tensor, ratio_cap: float | None) -> Sums:
    ratios = log_ratios.clamp(max=MAX_LOG_RATIO).exp()
    sums = {
        "tokens": ratios.new_tensor(float(ratios.numel())),
        "ratio_sum": ratios.sum(),
        "ratio_square_sum": ratios.square().sum(),
        "clipped": is_clipped.sum(dtype=ratios.dtype),
        "log_ratio_sum": log_ratios.sum(),
        "log_ratio_abs_sum": log_ratios.abs().sum(),
    }
    if ratio_cap is not None:
        sums["capped"] = (ratios > ratio_cap).sum(dtype=ratios.dtype)
    if ratios.numel():
        sums["ratio_max"] = ratios.max()
    return sums


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"these must share one shape [N]: {shapes}")
