"""Which slices of each checkpoint tensor a tensor-parallel worker loads, and its record of a load in terms of them.

What `LoadRecorder` noted are views of whole tensors. A worker that stages its slices alone has *boxes* of them
(`weights.bytes.boxes`); here the same writes are told as views of the boxes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from asyncrl.generator.engines.vllm.load_recorder import Loaded, View, Write
from asyncrl.weights.bytes.boxes import Box

Shape = tuple[int, ...]


def boxes_of(shapes: Mapping[str, Shape], loaded: Iterable[Loaded]) -> dict[str, Box] | None:
    """The smallest box of each tensor that has all of it that is loaded; None where there is no saying.

    `shapes` are those of all tensors of the checkpoint, by name.
    """
    parts: dict[str, list[View]] = defaultdict(list)
    for each in loaded:
        for name, writes in each.writes.items():
            parts[name] += [write.part for write in writes if write.part is not None]
    if any(not shape or not math.prod(shape) for shape in shapes.values()):
        return None
    return {name: _box(shape, parts[name]) for name, shape in shapes.items()}


def in_boxes(loaded: Loaded, boxes: Mapping[str, Box]) -> Loaded:
    """The same parameter, loaded from what the boxes hold of its tensors."""
    writes: dict[str, list[Write]] = defaultdict(list)
    for name, own in loaded.writes.items():
        writes[name] = [replace(write, part=_in_box(write.part, boxes[name])) for write in own if write.part]
    return replace(loaded, writes=writes)


def _box(shape: Shape, parts: Iterable[View]) -> Box:
    """One dimension is cut, that in which most is left out; all of the tensor where a part is no plain slice of it."""
    ranges = [_ranges(part, shape) for part in parts]
    whole = Box(shape, 0, 0, shape[0])
    if not ranges or any(each is None for each in ranges):
        return whole
    best = whole
    for dim in range(len(shape)):
        start = min(each[dim][0] for each in ranges if each is not None)
        stop = max(each[dim][1] for each in ranges if each is not None)
        if (stop - start) * best.shape[best.dim] < (best.stop - best.start) * shape[dim]:
            best = Box(shape, dim, start, stop)
    return best


def _ranges(part: View, shape: Shape) -> list[tuple[int, int]] | None:
    """[start, stop) in each dimension of a contiguous tensor of `shape`; None if `part` is no slice of it."""
    dims = _dims(part, shape)
    if dims is None:
        return None
    ranges = [(index, index + 1) for index in _indices(part.offset, shape)]
    for size, dim in zip(part.size, dims, strict=True):
        if dim is not None:
            start = ranges[dim][0]
            if start + size > shape[dim] or ranges[dim][1] != start + 1:
                return None
            ranges[dim] = (start, start + size)
    return ranges


def _dims(part: View, shape: Shape) -> list[int | None] | None:
    """The dimension of the tensor that each dimension of `part` goes along; None for one of a single element."""
    along = {stride: dim for dim, stride in enumerate(_strides(shape)) if shape[dim] > 1}
    dims = [None if size == 1 else along.get(stride, -1) for size, stride in zip(part.size, part.stride, strict=True)]
    return None if -1 in dims else dims


def _in_box(part: View, box: Box) -> View:
    """`part` of the whole tensor as a part of what the box holds."""
    if box.held_shape == box.shape:
        return part
    dims = _dims(part, box.shape)
    assert dims is not None, "a tensor with such a part is held whole"
    strides = _strides(box.held_shape)
    indices = _indices(part.offset, box.shape)
    indices[box.dim] -= box.start
    stride = tuple(1 if dim is None else strides[dim] for dim in dims)
    return View(part.size, stride, sum(index * step for index, step in zip(indices, strides, strict=True)))


def _strides(shape: Shape) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _indices(offset: int, shape: Shape) -> list[int]:
    return [offset // stride % size for stride, size in zip(_strides(shape), shape, strict=True)]
