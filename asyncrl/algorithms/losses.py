"""Per-token losses become one number for the global batch; sums of micro-batches become those of the batch.

Completion tokens come flat, [N], as `trainer.packing` lays them out: there is no padding here and so no mask.
`policy_losses` makes the losses. `Sums` are detached tensors that add up over micro-batches (`merge_sums`) and ranks;
they leave the device once per step (`sums_to_floats`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.algorithms.corrections import MAX_LOG_RATIO
from asyncrl.algorithms.sequences import require_same_shape, sequence_sums
from asyncrl.errors import ConfigError

Sums = dict[str, Tensor]

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


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

    losses                     [N]
    sequence_index             [N] int64, which sequence of the micro-batch a token belongs to
    num_tokens, num_sequences  of the global batch: all micro-batches of all ranks
    max_tokens                 the constant that seq-mean-token-sum-norm divides by

    Masked tokens have loss 0 and still count in every denominator, as in AReaL: a mask never gives more weight to
    the tokens that stay.

    Example: losses (1, 2, 3), sequences (0, 0, 1), in one micro-batch: token-mean is 2, seq-mean-token-mean
    (1.5 + 3) / 2 = 2.25.

    Returns a scalar; 0 (with a graph) for N = 0.

    Raises ShapeError on differing shapes, ConfigError for an unknown mode.
    """
    require_same_shape(losses=losses, sequence_index=sequence_index)
    if mode == "token-mean":
        return losses.sum() / num_tokens
    if mode == "seq-mean-token-sum":
        return losses.sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        assert max_tokens, "seq-mean-token-sum-norm divides by max_tokens"
        return losses.sum() / (num_sequences * max_tokens)
    if mode == "seq-mean-token-mean":
        lengths = sequence_sums(torch.ones_like(losses), sequence_index)
        return (losses / lengths).sum() / num_sequences
    raise ConfigError(f"loss aggregation {mode!r} is not one of {', '.join(AGGREGATIONS)}")


def ratio_sums(log_ratios: Tensor, is_clipped: Tensor, *, is_capped: Tensor | None = None) -> Sums:
    """What is measured of the importance ratios of one micro-batch, whatever its loss.

    log_ratios  [N] without gradient: log pi - log mu
    is_clipped  [N] bool, as a policy loss returns it
    is_capped   [N] bool, where a cap truncated an importance weight; None: the loss has no cap

    The ratios summed here are those before the cap, held below e^20.

    Example: r = (1.5, 0.5, 4), the first two clipped, the last capped: tokens 3, ratio_sum 6, ratio_square_sum 18.5,
    ratio_max 4, clipped 2, capped 1.

    Returns scalars: tokens, ratio_sum, ratio_square_sum, ratio_max (absent for N = 0), clipped, log_ratio_sum,
    log_ratio_abs_sum, and capped with is_capped. NaN stays NaN. Raises ShapeError on differing shapes.
    """
    is_capped_too = {} if is_capped is None else {"is_capped": is_capped}
    require_same_shape(log_ratios=log_ratios, is_clipped=is_clipped, **is_capped_too)
    ratios = log_ratios.clamp(max=MAX_LOG_RATIO).exp()
    sums = {
        "tokens": ratios.new_full((), float(ratios.numel())),
        "ratio_sum": ratios.sum(),
        "ratio_square_sum": ratios.square().sum(),
        "clipped": is_clipped.sum(dtype=ratios.dtype),
        "log_ratio_sum": log_ratios.sum(),
        "log_ratio_abs_sum": log_ratios.abs().sum(),
    }
    if is_capped is not None:
        sums["capped"] = is_capped.sum(dtype=ratios.dtype)
    if ratios.numel():
        sums["ratio_max"] = ratios.max()
    return sums


def merge_sums(total: Sums, part: Sums) -> Sums:
    """The sums so far plus those of one micro-batch, elementwise, as a new dict; keys in `_max` keep the larger."""
    merged = dict(total)
    for name, value in part.items():
        if name not in merged:
            merged[name] = value
        elif name.endswith("_max"):
            merged[name] = torch.maximum(merged[name], value)
        else:
            merged[name] = merged[name] + value
    return merged


def sums_to_floats(sums: Sums) -> dict[str, float | list[float]]:
    """Scalars as floats and vectors as lists, with one transfer from the device for all of them."""
    if not sums:
        return {}
    flat = torch.cat([value.detach().double().reshape(-1) for value in sums.values()]).tolist()
    floats: dict[str, float | list[float]] = {}
    for name, value in sums.items():
        floats[name] = flat[: value.numel()] if value.dim() else flat[0]
        flat = flat[value.numel() :]
    return floats
