"""How a set of named tensors lies in one flat buffer, and how the buffer is cut into buckets.

Both ends of a weight sync hold the same bytes: the learner copies its parameters into a staging buffer (`snapshot`),
receivers fill a buffer of their own bucket by bucket and compare digests (`digest`) before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from asyncrl.errors import ShapeError
from asyncrl.link.weight_records import ALIGNMENT, DTYPE_BYTES, TensorEntry, WeightLayout
from asyncrl.weights.bytes.memory import shared_buffer

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def new_buffer(layout: WeightLayout, device: torch.device | str = "cpu", *, shared: bool = False) -> torch.Tensor:
    """A uint8 staging buffer [layout.total_bytes], zeroed because the padding between tensors is part of the digests.

    `shared`: other processes of this machine can read it in place, see `weights.bytes.memory`.
    """
    if shared:
        return shared_buffer(layout.total_bytes, device)
    return torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)


def tensor_views(layout: WeightLayout, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) over `buffer` without a copy, in layout order; ShapeError for a buffer of another size."""
    check_buffer(layout, buffer)
    for entry in layout.tensors:
        raw = buffer[entry.offset : entry.offset + entry.num_bytes]
        yield entry.name, raw.view(_DTYPES[entry.dtype]).view(entry.shape)


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
            position += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
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
