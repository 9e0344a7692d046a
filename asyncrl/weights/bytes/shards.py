"""Who of several trainer ranks sends which bytes: every rank what it holds, so that nothing is ever gathered.

FSDP2 splits a parameter along its first dimension, in chunks of equal size as far as they go: a rank holds one run of
rows, or none. What is not split is sent by rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch.distributed.tensor import DTensor, Shard

from asyncrl.errors import ShapeError
from asyncrl.link.weight_records import ALIGNMENT, Bucket, TensorEntry, WeightLayout, aligned
from asyncrl.weights.bytes.layout import plan_buckets


def plan_shards(
    named: Sequence[tuple[str, torch.Tensor]], bucket_bytes: int, wire_dtype: torch.dtype | None, senders: int
) -> WeightLayout:
    """`plan_buckets` for several senders: rank s sends the rows that it holds of each DTensor. Equal on every rank.

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
            for sender, start, stop in _shares(entry, senders if _is_split(name, tensor, senders) else 1):
                held[sender].append((start, stop))
    step = bucket_bytes // ALIGNMENT * ALIGNMENT
    turns = zip_longest(*(_cut(sender, pieces, step) for sender, pieces in enumerate(held)))
    buckets = tuple(bucket for turn in turns for bucket in turn if bucket is not None)
    return replace(layout, ranges=(), shards=buckets)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_split(name: str, tensor: torch.Tensor, senders: int) -> bool:
    """Whether the senders hold rows of `tensor` each; else every one of them holds all of it."""
    if not isinstance(tensor, DTensor):
        return False
    mesh = tensor.device_mesh
    split = [(where, mesh.size(dim)) for dim, where in enumerate(tensor.placements) if not where.is_replicate()]
    if split not in ([], [(Shard(0), senders)]):
        raise ShapeError(
            f"tensor {name} is split as {tensor.placements} over {tuple(mesh.shape)} ranks; what can be sent is split "
            f"along its first dimension over {senders}"
        )
    return bool(split)


def _shares(entry: TensorEntry, ranks: int) -> list[tuple[int, int, int]]:
    """(rank, start, stop) of each rank that holds rows; the padding behind the tensor belongs to the last of them."""
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = entry.num_bytes // rows
    chunk = -(-rows // ranks)
    shares = []
    for rank in range(ranks):
        low, high = min(rank * chunk, rows), min((rank + 1) * chunk, rows)
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
