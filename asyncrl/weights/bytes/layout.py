"""How a set of named tensors lies in one flat buffer, how the buffer is cut into buckets, and what proves it
arrived.

Both sides of a weight sync hold the same bytes: the learner copies its parameters into a staging buffer
(`snapshot`), generators receive the buffer bucket by bucket and compare `digest`s before anything is loaded.
Needs torch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy

import torch

from asyncrl.errors import ShapeError
from asyncrl.link.weight_records import ALIGNMENT, DTYPE_BYTES, Patch, TensorEntry, WeightLayout, WeightManifest
from asyncrl.weights.bytes.memory import shared_buffer
from asyncrl.weights.bytes.patch import AdaptedWeight

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def new_buffer(
    layout: WeightLayout, device: torch.device | str = "cpu", pin_memory: bool = False, *, shared: bool = False
) -> torch.Tensor:
    """A zeroed uint8 staging buffer [total_bytes]: padding between tensors is part of the digests.

    `shared`: other processes of this machine can read it in place, see `weights.bytes.memory`.
    """
    if shared:
        return shared_buffer(layout.total_bytes, device)
    return torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device, pin_memory=pin_memory)


def tensor_views(layout: WeightLayout, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) over `buffer` without a copy, in layout order."""
    _check_buffer(layout, buffer)
    for entry in layout.tensors:
        raw = buffer[entry.offset : entry.offset + entry.num_bytes]
        yield entry.name, raw.view(_DTYPES[entry.dtype]).view(entry.shape)


def plan_buckets(
    named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, wire_dtype: torch.dtype | None = None
) -> WeightLayout:
    """Lay `named` tensors into one buffer and cut it into buckets of at most `bucket_bytes`.

    Give `model.named_parameters(remove_duplicate=False)`: a tied parameter comes under each of its names, is
    sent once, and is loaded under all of them. (vLLM keeps a packed copy of a tied head; leaving
    `lm_head.weight` out of a reload leaves that copy old, without an error.)

    Args:
        named: (name, tensor) in a fixed order; shapes are global shapes.
        bucket_bytes: upper bound of one broadcast; rounded down to a multiple of 64.
        wire_dtype: floating-point tensors travel in this dtype; None keeps each tensor's own.
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


def snapshot(
    named: Iterable[tuple[str, torch.Tensor]],
    layout: WeightLayout,
    buffer: torch.Tensor,
    adapted: Mapping[str, AdaptedWeight] | None = None,
) -> None:
    """Copy `named` tensors into `buffer`, casting to the layout's dtypes. Tied tensors are copied once.

    Args:
        named: the same names in the same order as given to `plan_buckets`; fully gathered tensors.
        buffer: uint8 [total_bytes], from `new_buffer`.
        adapted: names whose adapter is merged into the copy.

    Raises:
        ShapeError: names, order or shapes differ from the layout.
    """
    _Copies(named, layout, buffer, adapted or {}).run()


class _Copies:
    """What a snapshot copies and where to, worked out once: with many small tensors that takes longer than copying."""

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        layout: WeightLayout,
        buffer: torch.Tensor,
        adapted: Mapping[str, AdaptedWeight],
    ) -> None:
        given = list(named)
        if [name for name, _ in given] != [entry.name for entry in layout.tensors]:
            raise ShapeError("snapshot: the tensors given are not those of the layout; make a new layout")
        self._views: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._merged: list[tuple[torch.Tensor, AdaptedWeight]] = []
        # A GPU at either end returns before its copies are done.
        self._gpu = next((one.device for one in (buffer, given[0][1]) if one.is_cuda), None)
        placed: set[int] = set()
        for (name, tensor), (_, view), entry in zip(given, tensor_views(layout, buffer), layout.tensors, strict=True):
            if tuple(tensor.shape) != entry.shape:
                raise ShapeError(f"snapshot: {name} has shape {tuple(tensor.shape)}, the layout says {entry.shape}")
            if not entry.num_bytes or entry.offset in placed:
                continue
            placed.add(entry.offset)
            if name in adapted:
                self._merged.append((view, adapted[name]))
            else:
                self._views.append(view)
                self._sources.append(tensor)

    @torch.no_grad()
    def run(self) -> None:
        if self._views:
            torch._foreach_copy_(self._views, self._sources, non_blocking=True)
        for view, weight in self._merged:
            view.copy_(weight.merged(), non_blocking=True)
        if self._gpu is not None:
            # The optimizer changes the source as soon as this returns. This stream alone: another one may hold a
            # broadcast that hangs, and the training must not wait for that.
            torch.cuda.current_stream(self._gpu).synchronize()


class SnapshotBuffer:
    """The learner's staging buffer: a copy of its parameters that stays as it is while training goes on.

    Args:
        named: (name, tensor) pairs, read again at every snapshot; see `plan_buckets` on tied parameters.
        bucket_bytes: upper bound of one broadcast.
        wire_dtype: floating-point tensors travel in this dtype; None keeps each tensor's own.
        adapted, patch: see `SyncSource`.
        shared: in memory that the ipc backend sends from without a copy.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        bucket_bytes: int,
        wire_dtype: torch.dtype | None = None,
        *,
        adapted: Mapping[str, AdaptedWeight] | None = None,
        patch: Patch | None = None,
        shared: bool = False,
    ) -> None:
        self._named = list(named)
        self._shared = shared
        self._adapted = adapted
        self._patch = patch
        self.layout = plan_buckets(self._named, bucket_bytes, wire_dtype)
        self._allocate(self._named[0][1].device)

    def twin(self) -> SnapshotBuffer:
        """Another buffer for snapshots of the same parameters."""
        twin = copy(self)
        twin._allocate(self.flat.device)
        return twin

    def _allocate(self, device: torch.device) -> None:
        self.flat = new_buffer(self.layout, device, shared=self._shared)
        self._copies = _Copies(self._named, self.layout, self.flat, self._adapted or {})

    def snapshot(self) -> None:
        """Copy the parameters as they are now. Not while the buffer is being sent."""
        self._copies.run()

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the snapshot without a copy."""
        return tensor_views(self.layout, self.flat)

    def manifest(self, version: int) -> WeightManifest:
        """What receivers compare with; reads the whole buffer."""
        return WeightManifest(version, self.layout, digest_buckets(self.layout, self.flat), self._patch)

    def buckets(self) -> Iterator[torch.Tensor]:
        """The buffer in the pieces that are broadcast, in order, without a copy."""
        for start, stop in self.layout.buckets:
            yield self.flat[start:stop]


def digest_buckets(layout: WeightLayout, buffer: torch.Tensor) -> tuple[int, ...]:
    """`digest` of every bucket of a staging buffer."""
    _check_buffer(layout, buffer)
    return tuple(digest(buffer[start:stop]) for start, stop in layout.buckets)


_MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio
_CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 22}  # the scratch of a chunk stays in the L2 cache of a core


@torch.no_grad()
def digest(flat: torch.Tensor) -> int:
    """64-bit digest of a tensor's bytes: equal on every device, other if one word changes or two are swapped.

    With the bytes as little-endian 64-bit words x_i, modulo 2**64 and with an arithmetic shift,

        digest = n_bytes + sum_i (x_i ^ (x_i >> 32)) * (2 i + 1) * 0x9E3779B97F4A7C15

    Every factor is odd, so a change of one word always changes the sum. The fold brings a word's high half
    into its low bits: without it, words that differ in high bits only (a float 1 against a 0) could swap
    places unseen. It guards against faults, not against an adversary: the weight plane must be private.

    Args:
        flat: contiguous tensor of any dtype.

    Returns:
        A signed 64-bit integer.
    """
    assert flat.is_contiguous(), "digest needs contiguous memory"
    raw = flat.reshape(-1).view(torch.uint8)
    num_bytes = raw.numel()
    tail = num_bytes % 8
    words = raw[: num_bytes - tail].view(torch.int64)
    chunk = _CHUNK_WORDS.get(flat.device.type, 1 << 15)
    total = _digest_words(words, chunk)
    if tail:
        last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        last[:tail] = raw[num_bytes - tail :]
        index = words.numel()
        word = last.view(torch.int64).item()
        total += (word ^ (word >> 32)) * (2 * index + 1) * _MULTIPLIER
    return _signed64(total + num_bytes)


def _digest_words(words: torch.Tensor, chunk: int) -> int:
    if not words.numel():
        return 0
    chunk = min(chunk, words.numel())
    factors = torch.arange(chunk, dtype=torch.int64, device=words.device)
    factors.mul_(2).add_(1).mul_(_signed64(_MULTIPLIER))
    stride = _signed64(2 * chunk * _MULTIPLIER)  # what every factor grows by from one chunk to the next
    scratch = torch.empty_like(factors)
    sums = []
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk]
        out = scratch[: part.numel()]
        torch.bitwise_right_shift(part, 32, out=out)
        out.bitwise_xor_(part).mul_(factors[: part.numel()])
        sums.append(out.sum())  # int64 addition wraps, so order and device do not matter
        factors.add_(stride)
    return int(torch.stack(sums).sum().item())


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _check_buffer(layout: WeightLayout, buffer: torch.Tensor) -> None:
    if buffer.dtype != torch.uint8 or buffer.numel() != layout.total_bytes:
        raise ShapeError(
            f"staging buffer is {buffer.dtype} of {buffer.numel()} elements, "
            f"the layout needs uint8 of {layout.total_bytes}"
        )
