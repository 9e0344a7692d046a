"""The part of each tensor that one receiver needs, in a buffer of its own: a tensor-parallel worker holds its slices.

A box is one range of one dimension: rows for layers that are split by outputs, columns for those split by inputs. The
tensor is seen as [outer, dim, inner], of which [:, start:stop, :] is held, contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from asyncrl.link.weight_records import Bucket, TensorEntry, WeightLayout, aligned
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import torch_dtype


@dataclass(frozen=True, slots=True)
class Box:
    """The range [start, stop) of dimension `dim` of a tensor of `shape`."""

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of what is held."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def outer(self) -> int:
        """Runs that are held, each a contiguous part of the tensor."""
        return math.prod(self.shape[: self.dim])

    @property
    def run(self) -> tuple[int, int, int]:
        """(elements from one run's beginning to the next one's, first element of a run that is held, their number)."""
        inner = math.prod(self.shape[self.dim + 1 :])
        return self.shape[self.dim] * inner, self.start * inner, (self.stop - self.start) * inner


@dataclass(frozen=True, slots=True)
class _Held:
    entry: TensorEntry
    box: Box
    place: int  # bytes, in the receiver's buffer


class BoxLayout:
    """Where the boxes of one layout's tensors lie in a receiver's buffer. Tied tensors share their bytes.

    `boxes` are by name, of all tensors of the layout that are needed; `fits` tells whether they are.
    """

    def __init__(self, layout: WeightLayout, boxes: Mapping[str, Box]) -> None:
        self._held: list[_Held] = []
        placed: dict[tuple[int, Box], int] = {}
        position = 0
        for entry in layout.tensors:
            if (box := boxes.get(entry.name)) is None:
                continue
            place = placed.setdefault((entry.offset, box), position)
            if place == position:
                position += aligned(math.prod(box.held_shape) * entry.word_bytes)
            self._held.append(_Held(entry, box, place))
        self.num_bytes = position
        self._by_offset = sorted({held.place: held for held in self._held}.values(), key=lambda held: held.entry.offset)

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, what is held of the tensor) over a buffer, uint8 [num_bytes] or more, without a copy."""
        for held in self._held:
            raw = buffer[held.place : held.place + math.prod(held.box.held_shape) * held.entry.word_bytes]
            yield held.entry.name, raw.view(torch_dtype(held.entry)).view(held.box.held_shape)

    def digests(self, buffer: torch.Tensor) -> dict[str, int]:
        """That of what is held of each tensor."""
        return {name: digest(view) for name, view in self.views(buffer)}

    def scatter(self, buffer: torch.Tensor, bucket: Bucket, raw: torch.Tensor) -> None:
        """Takes out of a bucket that has come, uint8 [bucket.num_bytes], what is held of it."""
        for place, start, stop in bucket.places():
            for held in self._by_offset:
                low, high = max(start, held.entry.offset), min(stop, held.entry.offset + held.entry.num_bytes)
                if low < high:
                    _take(held, buffer, low - held.entry.offset, raw[place + low - start : place + high - start])


def fits(boxes: Mapping[str, Box], layout: WeightLayout) -> bool:
    """Whether a layout has just the tensors that the boxes were made for."""
    return {entry.name: entry.shape for entry in layout.tensors} == {name: box.shape for name, box in boxes.items()}


def _take(held: _Held, buffer: torch.Tensor, start: int, raw: torch.Tensor) -> None:
    """`raw` are the bytes of the tensor from byte `start` on: what of them is in the box goes to its place."""
    word = held.entry.word_bytes
    dtype = torch_dtype(held.entry)
    size = math.prod(held.box.held_shape)
    target = buffer[held.place : held.place + size * word].view(dtype).view(held.box.outer, -1)
    source = raw.view(dtype) if raw.data_ptr() % word == 0 else raw.clone().view(dtype)
    stride, first, count = held.box.run
    begin, end = start // word, (start + raw.numel()) // word  # elements of the tensor
    run = begin // stride
    if begin % stride:  # the rest of a run that an earlier bucket began
        _take_of_run(target[run], source, begin - run * stride, first, count)
        run += 1
    whole = end // stride - run
    if whole > 0:
        middle = source[run * stride - begin : (run + whole) * stride - begin].view(whole, stride)
        target[run : run + whole].copy_(middle[:, first : first + count])
        run += whole
    if run * stride < end and run * stride >= begin:  # the beginning of a run that a later bucket ends
        _take_of_run(target[run], source[run * stride - begin :], 0, first, count)


def _take_of_run(target: torch.Tensor, source: torch.Tensor, at: int, first: int, count: int) -> None:
    """`source` is a part of a run from element `at` on, and may go beyond its end; [first, first + count) is held."""
    low, high = max(at, first), min(at + source.numel(), first + count)
    if low < high:
        target[low - first : high - first].copy_(source[low - at : high - at])
