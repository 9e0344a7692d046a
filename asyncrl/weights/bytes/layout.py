"""How a set of named tensors lies in one flat buffer, and how the buffer is cut into buckets.

Both ends of a weight sync hold the same bytes: the learner copies its parameters into a staging buffer (`snapshot`),
receivers fill a buffer of their own bucket by bucket and compare digests (`digest`) before anything is loaded. Where
the learner's ranks hold a part of the policy each, nobody there has the flat buffer: every sender has one of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from asyncrl.errors import ShapeError
from asyncrl.link.weight_records import ALIGNMENT, DTYPE_BYTES, Bucket, TensorEntry, WeightLayout, aligned
from asyncrl.weights.bytes.memory import shared_buffer

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The dtype in which a tensor travels."""
    return _DTYPES[entry.dtype]


def new_buffer(
    layout: WeightLayout, device: torch.device | str = "cpu", *, shared: bool = False, sender: int | None = None
) -> torch.Tensor:
    """A uint8 staging buffer [layout.total_bytes], zeroed because the padding between tensors is part of the digests.

    `shared`: other processes of this machine can read it in place, see `weights.bytes.memory`. With a `sender` it is
    that one's own, [local_bytes(layout, sender)].
    """
    num_bytes = layout.total_bytes if sender is None else local_bytes(layout, sender)
    if shared:
        return shared_buffer(num_bytes, device)
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def tensor_views(layout: WeightLayout, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) over `buffer` without a copy, in layout order; ShapeError for a buffer of another size."""
    check_buffer(layout, buffer)
    for entry in layout.tensors:
        raw = buffer[entry.offset : entry.offset + entry.num_bytes]
        yield entry.name, raw.view(_DTYPES[entry.dtype]).view(entry.shape)


class Run(NamedTuple):
    """Bytes of one tensor that one sender holds: [start, stop) of the flat buffer, from `local` on in the sender's."""

    entry: TensorEntry
    start: int
    stop: int
    local: int


def runs_of(layout: WeightLayout, sender: int) -> Iterator[Run]:
    """What `sender` holds, tensor by tensor in layout order, tied tensors once.

    Its own buffer has its buckets one after the other, each from the next multiple of ALIGNMENT on; a single sender's
    is the flat buffer.
    """
    pieces, _ = _pieces_of(layout, sender)
    starts = [start for start, _, _ in pieces]
    seen: set[int] = set()
    for entry in layout.tensors:
        if not entry.num_bytes or entry.offset in seen:
            continue
        seen.add(entry.offset)
        first, end = entry.offset, entry.offset + entry.num_bytes
        for start, stop, local in pieces[max(0, bisect_right(starts, first) - 1) :]:
            if start >= end:
                break
            if (low := max(start, first)) < (high := min(stop, end)):
                yield Run(entry, low, high, local + low - start)


def local_bytes(layout: WeightLayout, sender: int) -> int:
    """Size of the buffer of `sender`."""
    return _pieces_of(layout, sender)[1]


def _pieces_of(layout: WeightLayout, sender: int) -> tuple[list[tuple[int, int, int]], int]:
    """(start, stop, local) of all that `sender` holds, joined where both sides go on; and the size of its buffer."""
    if layout.shards is None:
        return [(0, layout.total_bytes, 0)], layout.total_bytes
    cut: list[tuple[int, int, int]] = []
    end = 0
    for bucket in layout.shards:
        if bucket.sender == sender:
            cut += [(start, stop, end + place) for place, start, stop in bucket.places()]
            end += aligned(bucket.num_bytes)
    pieces: list[tuple[int, int, int]] = []
    for start, stop, local in sorted(cut):
        if pieces and pieces[-1][1] == start and pieces[-1][2] + start - pieces[-1][0] == local:
            pieces[-1] = (pieces[-1][0], stop, pieces[-1][2])
        else:
            pieces.append((start, stop, local))
    return pieces, end


def bucket_bytes(buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """A bucket as it travels, out of a buffer that holds the whole layout: uint8 [bucket.num_bytes].

    A view where the bucket is one piece, else a copy.
    """
    if len(bucket.pieces) == 1:
        ((start, stop),) = bucket.pieces
        return buffer[start:stop]
    raw = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=buffer.device)
    for place, start, stop in bucket.places():
        raw[place : place + stop - start] = buffer[start:stop]
    return raw


def scatter_bucket(buffer: torch.Tensor, bucket: Bucket, raw: torch.Tensor) -> None:
    """Puts a bucket that has come, uint8 [bucket.num_bytes], to its places in a buffer that holds the whole layout."""
    for place, start, stop in bucket.places():
        buffer[start:stop] = raw[place : place + stop - start]


def plan_buckets(
    named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, wire_dtype: torch.dtype | None = None
) -> WeightLayout:
    """Lay `named` tensors into one buffer and cut it into buckets of at most `bucket_bytes`.

    Give `model.named_parameters(remove_duplicate=False)`: a tied parameter comes under each of its names, is sent once,
    and is loaded under all of them. (vLLM keeps a packed copy of a tied head; leaving `lm_head.weight` out of a reload
    leaves that copy old, without an error.)

    Args:
        named: (name, tensor) in a fixed order; shapes are global shapes.
        bucket_bytes: upper bound of one broadcast; rounded down to a multiple of ALIGNMENT.
        wire_dtype: floating-point tensors travel in this dtype; None keeps each tensor's own.

    Raises:
        ShapeError: a tensor's dtype is none that can be sent.
    """
    assert bucket_bytes >= ALIGNMENT, bucket_bytes
    entries: list[TensorEntry] = []
    placed: dict[int, tuple[torch.Tensor, int]] = {}  # the tensor is kept, else its id may be given to another
    position = 0
    for name, tensor in named:
        dtype = wire_dtype if wire_dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        if dtype not in _DTYPE_NAMES:
            raise ShapeError(f"tensor {name}: dtype {dtype} cannot be sent; supported: {sorted(_DTYPES)}")
        known = placed.get(id(tensor))
        offset = position if known is None else known[1]
        entry = TensorEntry(name, _DTYPE_NAMES[dtype], tuple(tensor.shape), offset)
        entries.append(entry)
        if known is None:
            placed[id(tensor)] = (tensor, position)
            position += aligned(entry.num_bytes)
    assert position > 0, "no tensors to send"
    step = bucket_bytes // ALIGNMENT * ALIGNMENT
    buckets = tuple((start, min(start + step, position)) for start in range(0, position, step))
    return WeightLayout(position, tuple(entries), buckets)


def check_buffer(layout: WeightLayout, buffer: torch.Tensor) -> None:
    """Raises ShapeError when `buffer` is not uint8 [layout.total_bytes]."""
    if buffer.dtype != torch.uint8 or buffer.numel() != layout.total_bytes:
        raise ShapeError(
            f"staging buffer is {buffer.dtype} of {buffer.numel()} elements, "
            f"the layout needs uint8 of {layout.total_bytes}"
        )
