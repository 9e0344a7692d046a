"""Ranks that share the tokens of a micro-batch: Ulysses (arXiv:2309.14509), around the attention of packed rows.

Each rank computes a slice of the T inputs in every layer. For attention alone, all of them exchange: slices of tokens
with all heads become all tokens with a part of the heads, and back.

    [T / ranks, heads, D]  ── all-to-all ──▶  [T, heads / ranks, D]  attention  ── all-to-all ──▶  [T / ranks, heads, D]

A model is given its slice of inputs and positions, and the layout of all rows; what it says of the completion tokens
that are predicted from its slice is put together to what all ranks say of all tokens: see `OwnSlice`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.host.model_config import heads_problem
from asyncrl.trainer.engines.device_rows import DeviceRows, to_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T, Hq, D], k and v [T, Hkv, D] → [T, Hq, D]


def slice_lengths(num_inputs: int, ranks: int) -> list[int]:
    """Inputs of each rank: as equal as can be, nothing padded. Example: 7 over 3 → 3, 2, 2."""
    return [num_inputs // ranks + (rank < num_inputs % ranks) for rank in range(ranks)]


def slice_of(num_inputs: int, rank: int, ranks: int) -> slice:
    """Where a rank's inputs are among all of them."""
    lengths = slice_lengths(num_inputs, ranks)
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def check_sequence_parallel(config: Any, ranks: int, key: str, *, is_packed: bool) -> None:
    """Raises ConfigError unless this many ranks can share rows of a model; `config` is its own, `key` what names it."""
    if ranks == 1:
        return
    problem = None
    if not is_packed:
        problem = "its rows cannot be packed, and only packed ones are cut into slices; set it to 1"
    elif grown := {kind for kind in _rope_types(config) if kind == "longrope" or "dynamic" in kind}:
        problem = (
            f"its rotary angles ({', '.join(sorted(grown))}) follow the longest row that a rank sees, and ranks see "
            "different slices; set it to 1"
        )
    else:
        heads = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        if isinstance(heads, int) and isinstance(keys, int):  # else each layer has its own; the first pass refuses
            problem = heads_problem(heads, keys, ranks)
    if problem:
        raise ConfigError(f"learner.sequence_parallel={ranks} with {key}: {problem}")


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary scaling, of all layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(value.get("rope_type", "default")) for value in each}


class OwnSlice:
    """What this rank computes of rows that its sequence group shares, and how all parts become whole."""

    def __init__(self, whole: DeviceRows, group: Any) -> None:
        """`group` are the ranks that have the same rows, this one among them."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        whole = _long_enough(whole, ranks)
        lengths = slice_lengths(whole.num_inputs, ranks)
        inputs = slice_of(whole.num_inputs, rank, ranks)
        predictor, device = whole.predictor_on_host, whole.input_ids.device
        # Which rank computes each token; a slice may have none.
        owner = np.searchsorted(np.cumsum(lengths), predictor, side="right")
        counts = np.bincount(owner, minlength=ranks)
        by_owner = np.argsort(owner, kind="stable")
        within = np.empty_like(owner)
        within[by_owner] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._group = group
        self._longest = int(counts.max())
        self._places = to_device(owner * self._longest + within, device)  # of each token, in parts of equal length
        self._tokens = to_device(np.flatnonzero(owner == rank), device)  # of this rank, among all
        own_predictor = predictor[owner == rank] - inputs.start
        self.rows = DeviceRows(  # its inputs, and the tokens that are predicted from them
            input_ids=whole.input_ids[inputs],
            predictor=to_device(own_predictor, device),
            token_ids=whole.token_ids.index_select(0, self._tokens),
            layout=dataclasses.replace(whole.layout, sequence_group=group, own=inputs),
            predictor_on_host=own_predictor,
        )

    def whole(self, part: Tensor) -> Tensor:
        """[N] of all ranks from the part [own N] of each. A collective.

        Its backward pass is none: every rank has the gradient of all N, and goes on with that of its own.
        """
        put_together: Tensor = _Whole.apply(part, self._tokens, self._places, self._longest, self._group)  # type: ignore[no-untyped-call]
        return put_together


def _long_enough(rows: DeviceRows, ranks: int) -> DeviceRows:
    """The rows, with one more of inputs that nothing is predicted from where there is not one input for each rank.

    Models do not compute an empty slice.
    """
    missing = ranks - rows.num_inputs
    if missing <= 0:
        return rows
    layout = rows.layout
    zeros = rows.input_ids.new_zeros(missing)
    return dataclasses.replace(
        rows,
        input_ids=torch.cat([rows.input_ids, zeros]),
        layout=dataclasses.replace(
            layout,
            lengths=(*layout.lengths, missing),
            position_ids=torch.cat([layout.position_ids, torch.arange(missing, device=zeros.device)]),
            segment_ids=None if layout.segment_ids is None else torch.cat([layout.segment_ids, zeros]),
            starts=torch.cat([layout.starts, layout.starts[-1:] + missing]),
            pieces=None if layout.pieces is None else (*layout.pieces, (missing,)),
        ),
    )


class _Whole(torch.autograd.Function):
    """See `OwnSlice.whole`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tensor, places: Tensor, longest: int, group: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        padded = part.new_zeros(longest)
        padded[: len(part)] = part
        parts = part.new_empty(dist.get_world_size(group), longest)
        dist.all_gather(list(parts), padded, group=group)
        return parts.flatten().index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None, None, None


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
    if problem := heads_problem(query_heads, key_heads, ranks):
        raise ValueError(problem)
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
