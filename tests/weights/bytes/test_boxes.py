"""Slices of tensors out of buckets: whatever the cuts, what is held is the slice of the tensor, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.link.weight_records import Bucket, TensorEntry, WeightLayout, aligned
from asyncrl.weights.bytes.boxes import Box, BoxLayout, fits
from asyncrl.weights.bytes.layout import bucket_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


@st.composite
def cases(draw):
    """Tensors, a box of each, and where buckets are cut: at multiples of an element, in several pieces or in one."""
    position, entries, boxes, cuts = 0, [], {}, set()
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        dim = draw(st.integers(0, len(shape) - 1))
        start = draw(st.integers(0, shape[dim] - 1))
        stop = draw(st.integers(start + 1, shape[dim]))
        entry = TensorEntry(f"t{index}", draw(st.sampled_from(sorted(DTYPES))), shape, position)
        entries.append(entry)
        boxes[entry.name] = Box(shape, dim, start, stop)
        steps = entry.num_bytes // entry.word_bytes
        cuts |= {entry.offset + entry.word_bytes * at for at in draw(st.sets(st.integers(0, steps), max_size=4))}
        position += aligned(entry.num_bytes)
    edges = sorted(cuts | {0, position})
    pieces = list(itertools.pairwise(edges))
    size = draw(st.integers(1, 3))
    groups = [tuple(pieces[at : at + size]) for at in range(0, len(pieces), size)]
    order = draw(st.permutations(groups))
    shards = tuple(Bucket.of(0, group) for group in order)
    return WeightLayout(position, tuple(entries), (), shards), boxes


@settings(max_examples=300, deadline=None)
@given(cases())
def test_what_is_held_is_the_slice_however_the_buckets_are_cut(case):
    layout, boxes = case
    flat = torch.randint(1, 255, (layout.total_bytes,), dtype=torch.uint8)
    held = BoxLayout(layout, boxes)
    buffer = torch.zeros(held.num_bytes + 64, dtype=torch.uint8)
    for bucket in layout.buckets:
        held.scatter(buffer, bucket, bucket_bytes(flat, bucket))
    found = dict(held.views(buffer))
    for entry in layout.tensors:
        whole = flat[entry.offset : entry.offset + entry.num_bytes].view(DTYPES[entry.dtype]).view(entry.shape)
        box = boxes[entry.name]
        expected = whole.narrow(box.dim, box.start, box.stop - box.start).contiguous()
        assert torch.equal(found[entry.name].contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert not buffer[held.num_bytes :].any(), "nothing is written beyond the boxes"


def test_tied_tensors_are_held_once_unless_their_boxes_differ():
    entries = [TensorEntry(name, "float32", (8, 4), 0) for name in ("embed", "head", "other")]
    layout = WeightLayout(128, tuple(entries), ((0, 128),))
    rows, columns = Box((8, 4), 0, 0, 4), Box((8, 4), 1, 2, 4)
    held = BoxLayout(layout, {"embed": rows, "head": rows, "other": columns})
    assert held.num_bytes == 128
    flat = torch.arange(32.0).view(torch.uint8)
    buffer = torch.zeros(128, dtype=torch.uint8)
    held.scatter(buffer, layout.buckets[0], flat)
    found = dict(held.views(buffer))
    assert found["embed"].data_ptr() == found["head"].data_ptr()
    assert torch.equal(found["embed"], torch.arange(16.0).view(4, 4))
    assert torch.equal(found["other"], torch.arange(32.0).view(8, 4)[:, 2:])


@pytest.mark.parametrize(("shape", "same"), [((8, 4), True), ((4, 8), False)])
def test_boxes_fit_a_layout_of_the_same_tensors(shape, same):
    layout = WeightLayout(128, (TensorEntry("embed", "float32", shape, 0),), ((0, 128),))
    assert fits({"embed": Box((8, 4), 0, 0, 4)}, layout) is same
    assert not fits({}, layout)
    assert not fits({"embed": Box((8, 4), 0, 0, 4), "more": Box((1,), 0, 0, 1)}, layout)
