"""Sums over the sequences of a flat micro-batch, read off at every token.

Tokens come flat, [N]; `sequence_index` [N] int64 says which sequence of the micro-batch a token belongs to, counted
from 0 without gaps. So there are never more than N sequences, and N slots serve as accumulators: asking for the
largest index instead would wait for the device. Tokens of a sequence may lie in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.errors import ShapeError


def sequence_sums(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Sum of a token's sequence, [N]. Carries the gradient of values. Raises ShapeError.

    Example: values (1, 2, 3), sequences (0, 0, 1): (3, 3, 3).
    """
    require_same_shape(values=values, sequence_index=sequence_index)
    return values.new_zeros(values.shape).index_add(0, sequence_index, values)[sequence_index]


def sequence_means(values: Tensor, sequence_index: Tensor) -> Tensor:
    """Mean of a token's sequence, [N]. Carries the gradient of values. Raises ShapeError.

    Example: values (1, 2, 3), sequences (0, 0, 1): (1.5, 1.5, 3).
    """
    sums = sequence_sums(values, sequence_index)
    return sums / sequence_sums(torch.ones_like(values), sequence_index)


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ShapeError, naming each tensor and its shape, unless all have one shape."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(f"these must share one shape [N]: {shapes}")
