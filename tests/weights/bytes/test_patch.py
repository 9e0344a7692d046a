"""Manifests that carry part of a policy, and the folding of adapters against the plain formula."""

from __future__ import annotations

import msgpack
import pytest
import torch

from asyncrl.errors import ProtocolError
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import Patch, WeightManifest
from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.bytes.patch import AdaptedWeight, fold_adapter
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.tolerances import assert_near

pytestmark = pytest.mark.numeric

PATCH = Patch((("a.weight", -(2**63)), ("b.weight", 2**63 - 1)), (("c.weight", "a.weight"),), 2.0)


def test_an_adapter_folds_into_its_weight_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    lora_a, lora_b = torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0], [3.0]])
    assert fold_adapter(weight, lora_a, lora_b, 0.5).tolist() == [[2.0, 12.0], [4.5, 19.0]]
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_is_done_in_float32_whatever_comes(dtype):
    weight, lora_a, lora_b = (torch.randn(shape).to(dtype) for shape in ((30, 20), (4, 20), (30, 4)))
    expected = weight.double() + 1.5 * lora_b.double() @ lora_a.double()
    folded = fold_adapter(weight, lora_a, lora_b, 1.5)
    assert folded.dtype == torch.float32
    assert_near(folded, expected, steps=16)


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_a_snapshot_merges_the_adapted_tensors_as_they_are_at_that_moment_and_copies_the_others(wire_dtype):
    weight, lora_a, lora_b, other = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2), torch.randn(7)
    adapted = AdaptedWeight(weight, lora_a, lora_b, 2.0)
    named = [("other", other), ("x.weight", weight)]
    buffer = SnapshotBuffer(named, 128, wire_dtype, adapted={"x.weight": adapted}, patch=PATCH)
    for _ in range(2):
        buffer.snapshot()
        views = dict(tensor_views(buffer.layout, buffer.flat))
        merged = fold_adapter(weight, lora_a, lora_b, 2.0).to(wire_dtype or torch.float32)
        assert torch.equal(views["x.weight"], merged)
        assert torch.equal(views["other"], other.to(wire_dtype or torch.float32))
        lora_b.add_(1.0)


def test_a_manifest_takes_its_patch_over_the_wire_and_has_none_when_it_is_whole():
    buffer = SnapshotBuffer([("x", torch.ones(3))], 128, patch=PATCH)
    manifest = buffer.manifest(4)
    assert manifest.patch == PATCH
    assert from_plain(WeightManifest, msgpack.unpackb(msgpack.packb(to_plain(manifest)))) == manifest
    whole = SnapshotBuffer([("x", torch.ones(3))], 128).manifest(4)
    assert "patch" not in to_plain(whole)
    assert from_plain(WeightManifest, to_plain(whole)).patch is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("base"),
        lambda data: data.update(base=[["a"]]),
        lambda data: data.update(base=[["a", "one"]]),
        lambda data: data.update(tied=5),
        lambda data: data.update(scale="much"),
    ],
)
def test_a_malformed_patch_is_a_protocol_error(damage):
    data = to_plain(SnapshotBuffer([("x", torch.ones(3))], 128, patch=PATCH).manifest(4))
    damage(data["patch"])
    with pytest.raises(ProtocolError, match="WeightManifest.patch"):
        from_plain(WeightManifest, data)


def test_a_patch_that_is_no_mapping_is_a_protocol_error():
    data = to_plain(SnapshotBuffer([("x", torch.ones(3))], 128).manifest(4)) | {"patch": None}
    with pytest.raises(ProtocolError, match="WeightManifest.patch"):
        from_plain(WeightManifest, data)
