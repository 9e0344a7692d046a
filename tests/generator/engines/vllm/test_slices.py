"""What a tensor-parallel worker loads, told in terms of the slices that it holds: the same elements."""

from __future__ import annotations

import pytest
import torch

from asyncrl.generator.engines.vllm.load_recorder import Loaded, View, Write
from asyncrl.generator.engines.vllm.slices import boxes_of, in_boxes
from asyncrl.weights.bytes.boxes import Box

SHAPE = (6, 4, 10)


def loaded_from(*parts):
    """A parameter that was loaded from these views of one tensor."""
    writes = [Write(View((1,), (1,), 0), View.within(part, 0)) for part in parts]
    return Loaded(torch.nn.Module(), "layer", "weight", torch.zeros(1), {"w": writes})


def whole():
    return torch.arange(240).view(SHAPE)


@pytest.mark.parametrize(
    ("cut", "box"),
    [
        (lambda w: [w[2:4]], Box(SHAPE, 0, 2, 4)),
        (lambda w: [w[:, :, 5:]], Box(SHAPE, 2, 5, 10)),
        (lambda w: [w[:, 1:3]], Box(SHAPE, 1, 1, 3)),
        (lambda w: [w[1:2], w[3:4]], Box(SHAPE, 0, 1, 4)),  # all that lies between comes, too
        (lambda w: [w[5]], Box(SHAPE, 0, 5, 6)),
        (lambda w: [w[2:4, :, 9:]], Box(SHAPE, 2, 9, 10)),  # one dimension is cut
        (lambda w: [w[:, :, 5:].transpose(0, 2)], Box(SHAPE, 2, 5, 10)),
        (lambda w: [w[2:4].reshape(-1)], Box(SHAPE, 0, 0, 6)),  # no slice: all of it
        (lambda w: [w[::2]], Box(SHAPE, 0, 0, 6)),
        (lambda w: [w[2:4], w.view(-1)[7:19]], Box(SHAPE, 0, 0, 6)),
        (lambda w: [], Box(SHAPE, 0, 0, 6)),
    ],
)
def test_a_box_has_all_that_is_loaded_and_views_of_it_are_the_same_elements(cut, box):
    tensor = whole()
    parts = cut(tensor)
    loaded = loaded_from(*parts)
    boxes = boxes_of({"w": SHAPE}, [loaded])
    assert boxes == {"w": box}
    held = tensor.narrow(box.dim, box.start, box.stop - box.start).contiguous()
    again = in_boxes(loaded, boxes)
    assert [write.part.of(held).tolist() for write in again.writes["w"]] == [part.tolist() for part in parts]


def test_tensors_without_dimensions_or_elements_have_no_boxes():
    assert boxes_of({"scale": ()}, []) is None
    assert boxes_of({"empty": (0, 4)}, []) is None
