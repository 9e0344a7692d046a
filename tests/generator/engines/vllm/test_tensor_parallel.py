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


def staged_bytes(engine):
    return engine.run(engine.engine._rpc("asyncrl_staging_bytes", 5.0))


def test_each_worker_stages_its_slices_alone(two_workers):
    from asyncrl.weights.bytes.snapshot import SnapshotBuffer

    engine = two_workers
    buffer = SnapshotBuffer(engine.model.named_parameters(remove_duplicate=False), 64 * 1024)
    total = buffer.layout.total_bytes
    randomize(engine.model, 21)
    engine.run(engine.sync(buffer))
    assert engine.notes["swap"].apply == "direct"
    held = staged_bytes(engine)
    # Half, and the norms, which both need; the vocabulary of 100 is cut into 64 and 36.
    assert all(0.47 * total <= size <= 0.53 * total for size in held) and sum(held) >= total
    assert_it_is_the_model(engine)


def test_after_a_taint_all_of_a_version_is_staged_and_reloaded_and_then_slices_again(two_workers):
    engine = two_workers
    engine.run(engine.sync())
    assert engine.notes["swap"].apply == "direct"
    engine.engine.taint("for this test")
    randomize(engine.model, 22)
    engine.run(engine.sync())
    assert engine.notes["swap"].apply == "reload"
    assert_it_is_the_model(engine)
    randomize(engine.model, 23)
    engine.run(engine.sync())
    assert engine.notes["swap"].apply == "direct" and max(staged_bytes(engine)) > 0
    assert_it_is_the_model(engine)


def test_slices_that_are_staged_cannot_be_reloaded_and_the_next_version_comes_whole(two_workers):
    engine = two_workers
    engine.run(engine.sync())
    version = engine.run(engine.stage_next(24))
    engine.engine.taint("between staging and swap")
    with pytest.raises(EngineError, match="slices are staged, and a reload needs whole tensors"):
        engine.run(engine.engine.swap_weights(version, 20.0))
    assert engine.engine.tainted
    randomize(engine.model, 25)
    engine.run(engine.sync())
    assert engine.notes["swap"].apply == "reload"
    assert_it_is_the_model(engine)


def test_a_change_of_staged_slices_is_found_after_the_swap(two_workers):
    engine = two_workers
    engine.run(engine.sync())
    version = engine.run(engine.stage_next(26))
    engine.run(engine.engine._rpc("odd_change_slices", 5.0, 1))
    engine.run(engine.engine.swap_weights(version, 20.0))
    first, second = engine.run(engine.engine.check_weights(version, 20.0)).in_use
    assert first.differing == [] and any("changed since it was verified" in each for each in second.differing)
    engine.engine.taint("what one worker staged has changed")
    randomize(engine.model, 27)
    engine.run(engine.sync())
    assert_it_is_the_model(engine)


def test_no_delta_starts_from_slices(two_workers):
    engine = two_workers
    engine.run(engine.sync())
    engine.run(engine.sync())
    deltas = DeltaBuffer(engine)
    change_some(engine.model, 5)
    with pytest.raises(ChannelError, match="staging holds slices of version .*; it must be sent whole"):
        engine.run(engine.sync(deltas))
    engine.run(engine.sync())
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
