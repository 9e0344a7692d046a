"""Copies of parameters in staging buffers: what is in them, and that buffers and parameters stay apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.bytes.patch import AdaptedWeight
from asyncrl.weights.bytes.snapshot import SnapshotBuffer

pytestmark = pytest.mark.numeric


def parameters():
    """Many small tensors of several types, one of them tied, one empty, one adapted."""
    generator = torch.Generator().manual_seed(0)
    named = [
        (f"bias.{index}", torch.nn.Parameter(torch.randn(index % 5 + 1, generator=generator))) for index in range(40)
    ]
    named.append(("counts", torch.nn.Parameter(torch.arange(9), requires_grad=False)))
    named.append(("half", torch.nn.Parameter(torch.randn(3, 7, generator=generator).half())))
    named.append(("none", torch.nn.Parameter(torch.empty(0, 4))))
    named.append(("x.weight", torch.nn.Parameter(torch.randn(5, 3, generator=generator))))
    return [*named, ("tied", named[3][1])]


def one_by_one(named, adapted, wire_dtype):
    """The slow, obvious reference."""
    copies = {}
    for name, tensor in named:
        value = adapted[name].merged() if name in adapted else tensor.detach().clone()
        copies[name] = value.to(wire_dtype) if wire_dtype and value.dtype.is_floating_point else value
    return copies


def assert_holds(buffer, copies):
    views = dict(buffer.views())
    assert list(views) == list(copies)
    for name, copy in copies.items():
        assert views[name].dtype == copy.dtype and torch.equal(views[name], copy), name


def test_every_buffer_keeps_the_parameters_as_they_were_at_its_snapshot():
    for wire_dtype in (None, torch.bfloat16):
        named = parameters()
        weight = dict(named)["x.weight"]
        adapted = {"x.weight": AdaptedWeight(weight.detach(), torch.randn(2, 3), torch.randn(5, 2), 0.5)}
        buffers = [SnapshotBuffer(named, 256, wire_dtype, adapted=adapted)]
        buffers += [buffers[0].twin(), buffers[0].twin()]
        taken = []
        for buffer in buffers:
            buffer.snapshot()
            taken.append(one_by_one(named, adapted, wire_dtype))
            with torch.no_grad():
                for _, parameter in named[:-1]:
                    parameter.add_(1)
        for buffer, copies in zip(buffers, taken, strict=True):
            assert_holds(buffer, copies)
        assert len({buffer.flat.data_ptr() for buffer in buffers}) == 3
        buffers[0].snapshot()
        assert_holds(buffers[0], one_by_one(named, adapted, wire_dtype))
        assert_holds(buffers[1], taken[1])


def test_on_a_gpu_the_training_waits_for_its_own_stream_and_for_no_other(monkeypatch):
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("the stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waited.append(str(device)) or stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append("all streams"))
    buffer = SnapshotBuffer(parameters(), 256)
    buffer.snapshot()
    assert waited == [], "nothing on a CPU"
    buffer._copies._gpu = torch.device("cuda", 3)
    buffer.snapshot()
    assert waited == ["cuda:3", "the stream"]


def test_a_snapshot_takes_no_part_in_the_gradient():
    parameter = torch.nn.Parameter(torch.ones(4))
    buffer = SnapshotBuffer([("x", parameter)], 64)
    buffer.snapshot()
    (view,) = dict(buffer.views()).values()
    assert not view.requires_grad and not buffer.flat.requires_grad
    (parameter * 2.0).sum().backward()
    assert parameter.grad.tolist() == [2.0] * 4


def tied_parameters():
    shared = torch.nn.Parameter(torch.randn(10, 7))
    return [
        ("embed.weight", shared),
        ("norm.weight", torch.nn.Parameter(torch.randn(7))),
        ("mlp.weight", torch.nn.Parameter(torch.randn(7, 33))),
        ("lm_head.weight", shared),
    ]


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [64, 200, 1 << 20])
def test_a_snapshot_comes_out_of_its_buffer_under_every_name(bucket_bytes, wire_dtype):
    named = tied_parameters()
    buffer = SnapshotBuffer(named, bucket_bytes, wire_dtype)
    buffer.snapshot()
    received = torch.cat(list(buffer.buckets()))  # what a receiver ends up with
    assert all(bucket.numel() <= bucket_bytes for bucket in buffer.buckets())
    views = dict(tensor_views(buffer.layout, received))
    assert list(views) == [name for name, _ in named]
    for name, parameter in named:
        expected = parameter.detach().to(wire_dtype or parameter.dtype)
        torch.testing.assert_close(views[name], expected, atol=0, rtol=0)
    offsets = {entry.name: entry.offset for entry in buffer.layout.tensors}
    assert offsets["embed.weight"] == offsets["lm_head.weight"], "a tied parameter travels once"


def test_a_snapshot_does_not_follow_the_parameters():
    named = tied_parameters()
    buffer = SnapshotBuffer(named, 128)
    buffer.snapshot()
    manifest = buffer.manifest(3)
    with torch.no_grad():
        named[2][1].add_(1.0)
    assert buffer.manifest(3) == manifest
    buffer.snapshot()
    assert buffer.manifest(3).digests != manifest.digests
