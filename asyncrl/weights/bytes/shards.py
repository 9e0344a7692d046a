"""Who of several trainer ranks sends which bytes: every rank what it holds, so that nothing is ever gathered.

FSDP2 splits a parameter along its first dimension, in chunks of equal size as far as they go: a rank holds one run of
rows, or none. Where there are replicas, several ranks hold the same rows, and each sends an equal part of them. What is
not split is sent by rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from asyncrl.errors import ShapeError
from asyncrl.link.weight_records import ALIGNMENT, Bucket, TensorEntry, WeightLayout, aligned
from asyncrl.weights.bytes.layout import Run, plan_buckets


def plan_shards(
    named: Sequence[tuple[str, torch.Tensor]], bucket_bytes: int, wire_dtype: torch.dtype | None, senders: int
) -> WeightLayout:
    """`plan_buckets` for several senders: of each DTensor a rank sends rows that it holds. Equal on every rank.

    Buckets of all senders take turns, so that none of them waits for another one's last.

    Raises:
        ShapeError: a tensor's dtype cannot be sent, or it is split in another way than along its rows.
    """
    layout = plan_buckets(named, bucket_bytes, wire_dtype)
    if senders == 1:
        return layout
    held: list[list[tuple[int, int]]] = [[] for _ in range(senders)]
    seen: set[int] = set()
    for (name, tensor), entry in zip(named, layout.tensors, strict=True):
        if entry.num_bytes and entry.offset not in seen:
            seen.add(entry.offset)
            for sender, start, stop in _shares(entry, _holders(name, tensor, senders)):
                held[sender].append((start, stop))
    step = bucket_bytes // ALIGNMENT * ALIGNMENT
    turns = zip_longest(*(_cut(sender, pieces, step) for sender, pieces in enumerate(held)))
    buckets = tuple(bucket for turn in turns for bucket in turn if bucket is not None)
    return replace(layout, ranges=(), shards=buckets)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of_rows(count: int, number: int, parts: int) -> tuple[int, int]:
    """(first, stop) of one of `parts` equal parts of `count` rows that as many ranks hold."""
    return count * number // parts, count * (number + 1) // parts


def rows_of(tensor: torch.Tensor, run: Run) -> slice:
    """Which of the rows that this rank holds of a tensor are those of `run`."""
    shape = run.entry.shape
    if not isinstance(tensor, DTensor) or not shape:
        return slice(None)
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row_bytes = run.entry.num_bytes // shape[0]
    first, stop = ((place - run.entry.offset) // row_bytes - offsets[0] for place in (run.start, run.stop))
    return slice(first, stop)


def _holders(name: str, tensor: torch.Tensor, senders: int) -> list[list[int]]:
    """For each slice of a tensor's rows, the senders that hold it; rank 0 alone of a tensor that is not split."""
    if not isinstance(tensor, DTensor):
        return [[0]]
    mesh = tensor.device_mesh
    split = [dim for dim, where in enumerate(tensor.placements) if not where.is_replicate()]
    if not split:
        return [[0]]
    if [tensor.placements[dim] for dim in split] != [Shard(0)] or mesh.size() != senders:
        raise ShapeError(
            f"tensor {name} is split as {tensor.placements} over {tuple(mesh.shape)} ranks; what can be sent is split "
            f"along its first dimension, by {senders} ranks"
        )
    holders: list[list[int]] = mesh.mesh.movedim(split[0], 0).reshape(mesh.size(split[0]), -1).tolist()
    return holders


def _shares(entry: TensorEntry, holders: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(rank, start, stop) of each rank that sends rows; the padding behind the tensor belongs to the last of them.

    holders  of each slice of rows, the ranks that hold it
    """
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = entry.num_bytes // rows
    chunk = -(-rows // len(holders))
    shares = []
    for index, ranks in enumerate(holders):
        first, count = min(index * chunk, rows), min(chunk, max(0, rows - index * chunk))
        for number, rank in enumerate(ranks):
            low, high = (first + row for row in part_of_rows(count, number, len(ranks)))
            if low < high:
                size = aligned(entry.num_bytes) if high == rows else high * row_bytes
                shares.append((rank, entry.offset + low * row_bytes, entry.offset + size))
    return shares


def _cut(sender: int, pieces: Sequence[tuple[int, int]], step: int) -> list[Bucket]:
    """Buckets of at most `step` bytes, a multiple of ALIGNMENT, each filled up before the next begins."""
    buckets: list[list[tuple[int, int]]] = []
    room = 0
    for start, stop in pieces:
        while start < stop:
            if not room:
                buckets.append([])
                room = step
            end = min(stop, start + room)
            own = buckets[-1]
            if own and own[-1][1] == start and (start - own[-1][0]) % ALIGNMENT == 0:
                own[-1] = (own[-1][0], end)  # it would lie there in any case
            else:
                own.append((start, end))
            room -= aligned(end - start)
            start = end
    return [Bucket.of(sender, own) for own in buckets]
