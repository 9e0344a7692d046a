"""Two layouts of completion tokens: flat [N], one sequence after the other, and padded [B, T].

Losses are sums over tokens and take them flat, as `trainer.packing` lays them out. Recursions over time (GAE, V-trace)
run over all sequences at once and take them padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.errors import ShapeError


def sequence_lengths(sequence_index: Tensor, num_sequences: int | None = None) -> Tensor:
    """Tokens of each sequence, int64 [B].

    sequence_index  [N] int64: 0 for the tokens of the first sequence, then 1, ... without a gap
    num_sequences   B, if the caller knows it: then it is checked

    Example: (0, 0, 1) -> (2, 1).

    Raises ShapeError where the index is not [N], does not start at 0, goes back, leaves out a sequence or does not end
    at the last sequence: then some sequence has no token, or its tokens do not lie together. Waits for the device.
    """
    if sequence_index.dim() != 1:
        raise ShapeError(f"sequence_index must be [N]; got {tuple(sequence_index.shape)}")
    if not sequence_index.numel():
        if num_sequences:
            raise ShapeError(f"0 tokens for {num_sequences} sequences; each needs at least one")
        return sequence_index.new_zeros(0)
    steps = sequence_index.diff()
    in_order = ((steps == 0) | (steps == 1)).all()
    first, last = int(sequence_index[0]), int(sequence_index[-1])
    if first != 0 or not bool(in_order) or num_sequences not in (None, last + 1):
        count = "the last of them" if num_sequences is None else str(num_sequences - 1)
        raise ShapeError(
            f"sequence_index must rise from 0 to {count} by 0 or 1 from token to token; it goes from {first} to {last}"
            f"{'' if bool(in_order) else ', with jumps'}. Each sequence needs at least one token, all side by side"
        )
    return torch.bincount(sequence_index)


def pad_sequences(flat: Tensor, sequence_index: Tensor, num_sequences: int | None = None) -> tuple[Tensor, Tensor]:
    """Flat tokens to one row per sequence; rows start at column 0 and are as wide as the longest sequence.

    flat                            [N] values of any dtype; keeps the gradient
    sequence_index, num_sequences   see `sequence_lengths`

    Example: (1, 2, 3) of sequences (0, 0, 1) -> rows (1, 2), (3, 0), mask (True, True), (True, False).

    Returns (padded [B, T], 0 outside the mask; mask [B, T] bool). `unpad_sequences` is the exact inverse.
    Raises ShapeError when shapes differ or the index is not as `sequence_lengths` wants it.
    """
    if flat.shape != sequence_index.shape:
        shapes = tuple(flat.shape), tuple(sequence_index.shape)
        raise ShapeError(f"flat and sequence_index must both be [N]; got {shapes}")
    lengths = sequence_lengths(sequence_index, num_sequences)
    width = int(lengths.max()) if lengths.numel() else 0
    mask = torch.arange(width, device=flat.device)[None, :] < lengths[:, None]
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), mask


def unpad_sequences(padded: Tensor, mask: Tensor) -> Tensor:
    """Rows back to flat tokens: the values inside the mask, row after row, [N]. Keeps the gradient.

    padded  [B, T]; mask [B, T] bool, as `pad_sequences` gives them

    Example: rows (1, 2), (3, 9) with mask (True, True), (True, False) -> (1, 2, 3).

    Raises ShapeError when the shapes of `padded` and `mask` differ or are not [B, T].
    """
    if padded.shape != mask.shape or padded.dim() != 2:
        raise ShapeError(f"padded and mask must both be [B, T]; got {tuple(padded.shape)} and {tuple(mask.shape)}")
    assert mask.dtype == torch.bool, mask.dtype  # a mask of 0 and 1 would be taken for indices
    return padded[mask]
