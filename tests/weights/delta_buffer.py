"""Snapshots that go out as deltas, and changes small enough for them."""

from __future__ import annotations

import dataclasses

import torch

from asyncrl.weights.bytes.delta import encode_delta
from asyncrl.weights.bytes.snapshot import SnapshotBuffer


class DeltaBuffer:
    """A snapshot buffer that sends what changed since the snapshot before."""

    def __init__(self, engine):
        self._buffer = SnapshotBuffer(engine.model.named_parameters(remove_duplicate=False), 64 * 1024)
        self._buffer.snapshot()
        self._base_version = engine.next_version - 1

    def snapshot(self):
        before = self._buffer.flat.clone()
        self._buffer.snapshot()
        self.delta = encode_delta(self._buffer.layout, before, self._buffer.flat, self._base_version)

    def manifest(self, version):
        self._base_version = version
        return dataclasses.replace(self._buffer.manifest(version), delta=self.delta.info)

    def buckets(self):
        return self.delta.payload.split(self._buffer.layout.bucket_bytes)


def change_some(model, seed):
    """Far more than a step would, in few places: a weight that stays old shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.02
            parameter[chosen] += 0.5
