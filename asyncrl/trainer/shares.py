"""The shares of a plan: which rank trains on which micro-batches, and how a share travels. Numpy only.

    plan of the whole batch (rank 0)  →  deal  →  one plan for each rank  →  bytes  →  the same plan on its rank

Every rank gets the same number of micro-batches, because each forward and backward pass is one collective of all of
them. Where there are too few, dummies fill up: one token without weight. All counts stay those of the whole batch.
Ranks of one sequence group get the same share.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from asyncrl.trainer.packing import MicroBatch, plain_rows
from asyncrl.trainer.plan import BatchPlan, MiniBatch

T = TypeVar("T")


def deal(plan: BatchPlan, num_ranks: int) -> list[BatchPlan]:
    """The plan of each rank. Those of one rank are `plan` itself.

    Within each mini-batch, micro-batches go from the largest to the smallest to the rank that has the least so far; a
    rank that has its number of them gets no more.
    """
    if num_ranks == 1:
        return [plan]
    shares: list[list[MiniBatch]] = [[] for _ in range(num_ranks)]
    for mini_batch in plan.mini_batches:
        for own, parts in zip(shares, _dealt(mini_batch.micro_batches, num_ranks), strict=True):
            own.append(dataclasses.replace(mini_batch, micro_batches=parts))
    return [dataclasses.replace(plan, mini_batches=own) for own in shares]


def _dealt(micro_batches: Sequence[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    room = -(-len(micro_batches) // num_ranks)
    costs = [_cost(micro_batch) for micro_batch in micro_batches]
    indices: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min(
            (rank for rank in range(num_ranks) if len(indices[rank]) < room), key=lambda rank: (loads[rank], rank)
        )
        indices[rank].append(index)
        loads[rank] += costs[index]
    return [
        # In the order of cost: passes of one turn are then about as long on all ranks, which wait for each other.
        [micro_batches[index] for index in own] + [dummy()] * (room - len(own))
        for own in indices
    ]


def _cost(micro_batch: MicroBatch) -> float:
    """What a micro-batch costs, in tokens: its inputs, and its attention, which grows with the square of lengths.

    With the widths and depths in use, attention costs as much as the rest at some 16,000 tokens.
    """
    lengths = micro_batch.rows.lengths.astype(np.float64)
    return float(micro_batch.rows.num_inputs + np.square(lengths).sum() / 16_384)


def dummy() -> MicroBatch:
    """A micro-batch of one token that takes part in the passes and counts nowhere."""
    return MicroBatch(
        rows=plain_rows([(0, 0)]),
        sequence_index=np.zeros(1, dtype=np.int64),
        rollout_index=np.zeros(1, dtype=np.int64),
        behaviour_logprobs=np.zeros(1, dtype=np.float32),
        policy_ages=np.zeros(1, dtype=np.int64),
        is_dummy=True,
    )


def pack_share(plan: BatchPlan) -> bytes:
    """A plan as bytes: msgpack of its fields in their order, arrays as dtype, shape and content."""
    packed: bytes = msgpack.packb(_plain(plan), use_bin_type=True)
    return packed


def unpack_share(data: bytes) -> BatchPlan:
    """The plan that `pack_share` made into `data`."""
    plain = msgpack.unpackb(data, raw=False, max_bin_len=2**32 - 1)
    plan = _built(BatchPlan, plain)
    assert isinstance(plan, BatchPlan)
    return plan


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), np.ascontiguousarray(value).tobytes()]
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value


def _built(kind: Any, plain: Any) -> Any:
    """A value of the type `kind` from what `_plain` made of it."""
    if isinstance(kind, types.UnionType):  # X | None
        if plain is None:
            return None
        kind = next(option for option in get_args(kind) if option is not types.NoneType)
    if kind is np.ndarray:
        dtype, shape, content = plain
        return np.frombuffer(content, dtype=dtype).reshape(shape).copy()
    if get_origin(kind) is list:
        return [_built(get_args(kind)[0], element) for element in plain]
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        hints = _hints(make)
        fields = dataclasses.fields(make)
        return make(*(_built(hints[field.name], part) for field, part in zip(fields, plain, strict=True)))
    return plain


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
