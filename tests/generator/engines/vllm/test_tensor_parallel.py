"""The real vLLM with two workers: each takes its shards out of the same bytes, and what they compute is the model."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncrl.errors import ChannelError, EngineError
from tests.conftest import randomize, reference_logprobs, start_engine
from tests.generator.engines.checks import ODD_WORKER, PROMPT, TOLERANCE, assert_samples_the_model, random_prompt
from tests.weights.delta_buffer import DeltaBuffer, change_some


@pytest.fixture(scope="module")
def two_workers(tied_model_dir, tmp_path_factory):
    """One engine for all tests of this module; its workers can be told to fail."""
    log_path = tmp_path_factory.mktemp("tp") / "vllm.log"
    under_test = start_engine(tied_model_dir, log_path, tensor_parallel_size=2, worker_extension=ODD_WORKER)
    under_test.run(under_test.sync())
    under_test.notes["first_apply"] = under_test.notes["swap"].apply
    yield under_test
    under_test.run(under_test.engine.close())
    under_test.runner.close()


def assert_it_is_the_model(engine):
    """Scores and what is sampled, by the weights the learner's model has now."""
    sequence = random_prompt(60, seed=engine.next_version)
    (score,) = engine.run(engine.engine.score([sequence], 20.0))
    np.testing.assert_allclose(score, reference_logprobs(engine.model, sequence), atol=TOLERANCE, rtol=0)
    assert_samples_the_model(engine, max_new_tokens=24)


def test_every_sync_reaches_both_workers_the_first_by_a_reload_and_the_next_in_place(two_workers):
    engine = two_workers
    assert engine.notes["first_apply"] == "reload"
    for seed in (1, 2, 3):
        before = reference_logprobs(engine.model, PROMPT)
        randomize(engine.model, seed)
        assert np.abs(reference_logprobs(engine.model, PROMPT) - before).max() > 100 * TOLERANCE
        version = engine.run(engine.sync())
        assert engine.notes["swap"].apply == "direct" and engine.engine.version == version
        assert_it_is_the_model(engine)


def test_both_workers_report_their_own_digests(two_workers):
    from asyncrl.weights.bytes.snapshot import SnapshotBuffer

    engine = two_workers
    buffer = SnapshotBuffer(engine.model.named_parameters(remove_duplicate=False), 64 * 1024)

    async def stage():
        reports = []
        real = engine.engine.stage_weights

        async def watched(manifest, timeout_s):
            reports.append((manifest, await real(manifest, timeout_s)))

        engine.engine.stage_weights = watched
        try:
            await engine.stage(buffer=buffer)
        finally:
            del engine.engine.stage_weights
        return reports[0]

    manifest, report = engine.run(stage())
    assert len(manifest.digests) > 1 and report.digests == [list(manifest.digests)] * 2


def test_a_swap_keeps_sequences_in_flight(two_workers):
    engine = two_workers

    async def swap_midway():
        old, synced = engine.engine.version, asyncio.Event()

        async def keep_busy(prompt):
            """One group after the other until the swap is over: however long it takes, some are in flight."""
            completions = []
            while not synced.is_set():
                completions += await engine.generate(prompt, num_rollouts=2, max_new_tokens=170)
            return completions

        busy = [asyncio.create_task(keep_busy([7 + i] * (9 + i))) for i in range(4)]
        randomize(engine.model, 11)
        new = await engine.sync()
        synced.set()
        return old, new, await asyncio.gather(*busy)

    old, new, groups = engine.run(swap_midway())
    spans = [tuple(span.version for span in completion.version_spans) for group in groups for completion in group]
    assert set(spans) <= {(old,), (old, new), (new,)} and (old, new) in spans
    assert_it_is_the_model(engine)


def test_a_chain_of_deltas_keeps_both_workers_right(two_workers):
    engine = two_workers
    engine.run(engine.sync())
    deltas = DeltaBuffer(engine)
    for seed in (5, 6):
        change_some(engine.model, seed)
        engine.run(engine.sync(deltas))
        assert deltas.delta.info.num_bytes < 0.2 * deltas._buffer.layout.total_bytes
        assert_it_is_the_model(engine)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_that_is_wrong_on_one_worker_is_found_and_the_worker_named(two_workers, rank):
    engine = two_workers
    engine.run(engine.sync())
    before = engine.engine.version
    weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.run(engine.engine._rpc("odd_damage_next_bytes", 5.0, rank))
    told = rf"worker {rank} failed in phase stage, .*: bucket 0 of version .* digest"
    with pytest.raises(ChannelError, match=told):
        engine.run(engine.stage_next(50 + rank))
    with pytest.raises(EngineError, match="not staged"):
        engine.run(engine.engine.swap_weights(engine.next_version - 1, 10.0))
    assert engine.engine.version == before and not engine.engine.tainted
    engine.model.load_state_dict(weights)
    assert_it_is_the_model(engine)
    randomize(engine.model, 60 + rank)
    engine.run(engine.sync())
    assert_it_is_the_model(engine)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_cannot_begin_is_named_and_no_answer_gets_out_of_step(two_workers, rank):
    engine = two_workers
    engine.run(engine.sync())
    engine.run(engine.engine._rpc("odd_refuse_next_stage", 5.0, rank))
    told = f"worker {rank} failed in phase stage.*: RuntimeError: can't start new thread; the weight channel is left"
    with pytest.raises(ChannelError, match=told):
        engine.run(engine.stage_next(80 + rank))
    assert engine.run(engine.engine._rpc("asyncrl_staged_version", 5.0)) == [None, None]
    randomize(engine.model, 90 + rank)
    engine.run(engine.sync())
    assert_it_is_the_model(engine)
