"""Deltas through a real engine: what it samples from afterwards is the learner's model."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
from tests.conftest import reference_logprobs

from asyncrl.errors import AsyncRLError
from asyncrl.transport.weight_delta import encode_delta
from asyncrl.transport.weight_group import SnapshotBuffer

PROMPT = list(range(10, 40))


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


def assert_scores_are_those_of_the_model(engine):
    (scores,) = engine.run(engine.engine.score([PROMPT], 20.0))
    np.testing.assert_allclose(scores, reference_logprobs(engine.model, PROMPT), atol=1e-4)


def test_an_engine_follows_a_chain_of_deltas(engine):
    engine.run(engine.sync())
    deltas = DeltaBuffer(engine)
    for seed in range(3):
        before = reference_logprobs(engine.model, PROMPT)
        change_some(engine.model, seed)
        assert np.abs(reference_logprobs(engine.model, PROMPT) - before).max() > 0.1
        engine.run(engine.sync(deltas))
        assert deltas.delta.info.num_bytes < 0.2 * deltas._buffer.layout.total_bytes
        assert_scores_are_those_of_the_model(engine)


def test_an_engine_that_lacks_the_base_says_so_and_takes_the_whole_version(engine):
    engine.run(engine.sync())
    deltas = DeltaBuffer(engine)
    deltas._base_version -= 1
    change_some(engine.model, 9)
    with pytest.raises(AsyncRLError, match="it must be sent whole"):
        engine.run(asyncio.wait_for(engine.stage(buffer=deltas), 30.0))
    engine.run(engine.sync())
    assert_scores_are_those_of_the_model(engine)
