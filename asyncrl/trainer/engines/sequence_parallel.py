"""Ranks that share the tokens of a micro-batch: Ulysses (arXiv:2309.14509), around the attention of packed rows.

Each rank computes a slice of the T inputs in every layer. For attention alone, all of them exchange: slices of tokens
with all heads become all tokens with a part of the heads, and back.

    [T / ranks, heads, D]  ── all-to-all ──▶  [T, heads / ranks, D]  attention  ── all-to-all ──▶  [T / ranks, heads, D]

No configuration uses this yet: a model is given its slice of `input_ids` and `position_ids`, and a `RowLayout` of all
rows with `sequence_group`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, Hq, D], k and v [T, Hkv, D] → [T, Hq, D]


def slice_lengths(num_inputs: int, ranks: int) -> list[int]:
    """Inputs of each rank: as equal as can be, nothing padded. Example: 7 over 3 → 3, 2, 2."""
    return [num_inputs // ranks + (rank < num_inputs % ranks) for rank in range(ranks)]


def slice_of(num_inputs: int, rank: int, ranks: int) -> slice:
    """Where a rank's inputs are among all of them."""
    lengths = slice_lengths(num_inputs, ranks)
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def attend_in_parallel(q: Tensor, k: Tensor, v: Tensor, attend: Attend, num_inputs: int, group: Any) -> Tensor:
    """Attention of this rank's tokens to all tokens, [own tokens, Hq, D]. A collective, and so is its backward pass.

    q           [own tokens, Hq, D]; k, v [own tokens, Hkv, D]
    attend      what one process does with some of the heads of all tokens
    num_inputs  T, of all ranks, which hold `slice_lengths` of them

    Where there are fewer key heads than ranks, each is given to several. Raises ValueError where heads do not divide.
    """
    ranks = dist.get_world_size(group)
    lengths = slice_lengths(num_inputs, ranks)
    query_heads, key_heads = q.shape[1], k.shape[1]
    if query_heads % ranks or (key_heads % ranks and ranks % key_heads):
        raise ValueError(
            f"{query_heads} heads of queries and {key_heads} of keys cannot be dealt to {ranks} ranks: their number "
            "must divide the first, and divide the second or be divided by it; let fewer ranks share a sequence"
        )
    if key_heads < ranks:
        k, v = (tensor.repeat_interleave(ranks // key_heads, dim=1) for tensor in (k, v))
    output = attend(*(_heads_apart(tensor, lengths, group) for tensor in (q, k, v)))
    return _heads_together(output, lengths, group)


def _heads_apart(tensor: Tensor, lengths: list[int], group: Any) -> Tensor:
    """[own tokens, heads, D] → [T, heads / ranks, D]."""
    ranks, rank = len(lengths), dist.get_rank(group)
    own, heads, width = tensor.shape
    parts = tensor.view(own, ranks, heads // ranks, width).transpose(0, 1).reshape(ranks * own, -1, width)
    return _all_to_all(parts, [lengths[rank]] * ranks, lengths, group)


def _heads_together(tensor: Tensor, lengths: list[int], group: Any) -> Tensor:
    """[T, heads / ranks, D] → [own tokens, heads, D]."""
    ranks, own = len(lengths), lengths[dist.get_rank(group)]
    parts = _all_to_all(tensor.contiguous(), lengths, [own] * ranks, group)
    return parts.view(ranks, own, *parts.shape[1:]).transpose(0, 1).reshape(own, -1, parts.shape[-1])


def _all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(tensor, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
    """The first dimension is cut into `sent` parts, one for each rank; what came from each lies one after the other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.back = (received, sent, group)
        output = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(output, tensor.contiguous(), received, sent, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.forward(ctx, grad, *ctx.back), None, None, None
