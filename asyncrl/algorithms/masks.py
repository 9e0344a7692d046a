"""Which tokens stay in the loss. Each mask is bool [N], True = stays; combine masks with `&`.

    log_ratios      [N] without gradient: log pi - log mu
    sequence_index  [N] int64, see `sequences`

A token whose log-ratio is NaN or infinite never stays, nor does its sequence where sequences are judged. That hides no
broken number: a NaN in the losses survives a factor of 0.

All raise ShapeError when shapes differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.algorithms.reducer import OneRank, Reducer
from asyncrl.algorithms.sequences import require_same_shape, sequence_means


def band_mask(log_ratios: Tensor, low: float, high: float) -> Tensor:
    """Tokens whose ratio lies in [low, high] (IcePop, Ring-1T 2025; masked importance sampling).

    This only masks: the ratio that IcePop multiplies the other tokens by is the part of the loss or the correction.

    low, high  ratios, 0 <= low <= high; both ends belong to the band

    Example: r = (0.4, 1, 6) in [0.5, 5]: (False, True, False).
    """
    assert 0.0 <= low <= high, (low, high)
    log_low = math.log(low) if low > 0.0 else -math.inf
    return (log_ratios >= log_low) & (log_ratios <= math.log(high)) & torch.isfinite(log_ratios)


def sequence_band_mask(log_ratios: Tensor, sequence_index: Tensor, low: float, high: float) -> Tensor:
    """Sequences whose geometric mean ratio lies in [low, high] (seq-mask-tis of NeMo RL; Liu, Li et al. 2025).

    The geometric mean, not the product: a product over 2,000 tokens leaves any band by rounding noise alone.

    Example: sequences (0, 0, 1), r = (0.1, 10, 6) in [0.5, 5]: geometric means (1, 1, 6): (True, True, False),
    where `band_mask` would keep none.
    """
    return band_mask(sequence_means(log_ratios, sequence_index), low, high)


def opsm_mask(log_ratios: Tensor, sequence_index: Tensor, advantages: Tensor, delta: float) -> Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2 2025, section 3.1): bad sequences the policy has left behind go.

        stays:  A >= 0  or  mean over the sequence of (log mu - log pi) <= delta

    advantages  [N]; where tokens of a sequence have their own, each is judged by its own sign
    delta       nats per token

    Example: sequences (0, 0, 1), log-ratios (-1, -1, -1), A = (-1, 1, -1), delta 0.5: (False, True, False).
    """
    require_same_shape(log_ratios=log_ratios, sequence_index=sequence_index, advantages=advantages)
    mean_log_ratios = sequence_means(log_ratios, sequence_index)
    return ((advantages >= 0) | (-mean_log_ratios <= delta)) & torch.isfinite(mean_log_ratios)


def second_moment_mask(log_ratios: Tensor, threshold: float, *, ranks: Reducer | None = None) -> Tensor:
    """M2PO (Zheng et al. 2025, 2510.01161): the largest log-ratios go, until the second moment of the rest is small.

        stays:  the most tokens, smallest (log r)^2 first, whose mean of (log r)^2 is <= threshold

    log_ratios  [N] of ALL tokens of the batch, not of one micro-batch: which tokens go depends on the others
    threshold   nats squared; 0.04 in the paper
    ranks       who holds the other tokens of the batch. None: nobody

    Tokens of equal (log r)^2 stay or go together, so that the order of tokens does not matter: where the bound falls
    among equals, all of them go. Where every (log r)^2 is above the threshold nothing stays; AReaL keeps one token
    then, and its bound is `<`. Sorts in float64.

    Example: log r = (0.1, -0.2, 0.5), threshold 0.04: the squares (0.01, 0.04, 0.25) average 0.1; without the
    largest 0.025: (True, True, False).
    """
    squares = log_ratios.double().square()
    squares = torch.where(torch.isfinite(squares), squares, torch.inf)
    ascending = (ranks or OneRank()).gather(squares)[0].sort().values
    means = ascending.cumsum(0) / torch.arange(1, len(ascending) + 1, device=squares.device)
    # Means of ever larger values rise: those within the budget are a prefix, and the first value behind it
    # is the smallest that goes.
    kept = (means <= threshold).sum().reshape(1)
    smallest_that_goes = torch.cat([ascending, ascending.new_full((1,), torch.inf)]).index_select(0, kept)
    return squares < smallest_that_goes
