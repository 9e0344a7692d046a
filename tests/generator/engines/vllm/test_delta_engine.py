"""Deltas through a real engine: what it samples from afterwards is the learner's model."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncrl.errors import AsyncRLError
from tests.conftest import reference_logprobs
from tests.weights.delta_buffer import DeltaBuffer, change_some

PROMPT = list(range(10, 40))


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
