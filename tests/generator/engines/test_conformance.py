"""What any `RolloutEngine` must do (`generator/engines/base.py`), against transformers and with real weight channels.

A second engine adds one line to ENGINES and its two fixtures to tests/conftest.py. What only one engine has (how it
copies weights, the errors of its workers) is tested beside that engine. `FakeEngine` is not in the list: it holds no
weights, and so claims none of this.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest

from asyncrl.errors import ChannelError, DeadlineExceeded, EngineError, NonFiniteError
from asyncrl.generator.engines.base import RolloutEngine
from asyncrl.link.field_checks import to_plain
from asyncrl.link.weight_records import ChannelSpec
from tests.conftest import END_TOKEN, MAX_LENGTH, randomize, reference_logprobs
from tests.generator.engines.checks import (
    PROMPT,
    TOLERANCE,
    assert_logprobs_are_those_of,
    assert_samples_the_model,
    random_prompt,
)
from tests.waits import LATE_S


@dataclass(frozen=True)
class EngineFactory:
    """Names of the fixtures that start an engine, and what it tells about its swaps."""

    name: str
    session_fixture: str  # one engine with tied embeddings for the whole session
    own_fixture: str  # an engine with untied embeddings for one test, which may end it
    applies: tuple[str, ...]  # `SwapReport.apply` of the first swaps of an engine's life


vllm = EngineFactory("vllm", "tied_engine", "untied_engine", applies=("reload", "direct", "direct", "direct"))

ENGINES = [vllm]

SEEDS = tuple(range(16))


@pytest.fixture(params=ENGINES, ids=lambda factory: factory.name)
def engine(request):
    """The session's engine, healthy and at its newest weights, whatever the test before did."""
    return request.getfixturevalue(request.param.session_fixture).healthy()


@pytest.fixture
def ending_engine(engine):
    """The engine at weights, and with `SEEDS`, under which some completions end early, each after another token."""
    randomize(engine.model, 0)
    engine.run(engine.sync())
    return engine


# -- sampling and scoring ------------------------------------------------------------------------------


def test_it_has_every_member_of_the_protocol(engine):
    members = [name for name in vars(RolloutEngine) if not name.startswith("_")]
    assert {"generate", "swap_weights", "version"} <= set(members)
    assert [name for name in members if not hasattr(engine.engine, name)] == []


def test_scores_agree_with_transformers_also_at_full_length(engine):
    sequences = [random_prompt(40, 1), random_prompt(MAX_LENGTH, 2), random_prompt(2, 3)]
    scores = engine.run(engine.engine.score(sequences, 20.0))
    for sequence, score in zip(sequences, scores, strict=True):
        assert score.dtype == np.float32
        np.testing.assert_allclose(score, reference_logprobs(engine.model, sequence), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_sampled_from(engine, temperature):
    completions = engine.run(engine.generate(PROMPT, num_rollouts=4, max_new_tokens=24, temperature=temperature))
    assert len(completions) == 4
    for completion in completions:
        assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
        assert_logprobs_are_those_of(engine.model, PROMPT, completion, temperature)


def test_greedy_takes_the_likeliest_token_every_time(engine):
    import torch

    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=12, temperature=0.0))
    tokens = list(PROMPT)
    for token in completion.token_ids.tolist():
        with torch.no_grad():
            assert token == engine.model(torch.tensor([tokens])).logits[0, -1].argmax().item()
        tokens.append(token)
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


def test_equal_seeds_repeat_and_other_seeds_differ(engine):
    def sample(seeds):
        completions = engine.run(engine.generate(PROMPT, num_rollouts=4, max_new_tokens=32, seeds=seeds))
        return [completion.token_ids.tolist() for completion in completions]

    first = sample((11, 12, 13, 14))
    assert sample((11, 12, 13, 14)) == first
    assert sample((14, 13, 12, 11)) == first[::-1]
    assert len({tuple(tokens) for tokens in first}) == 4


def test_the_end_token_is_in_the_tokens_and_not_in_the_text(ending_engine):
    engine = ending_engine
    completions = engine.run(engine.generate(PROMPT, num_rollouts=len(SEEDS), max_new_tokens=150, seeds=SEEDS))
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    cut = [completion for completion in completions if completion.finish_reason == "length"]
    assert stopped, "no completion ended by itself; the test needs other seeds"
    for completion in stopped:
        assert completion.token_ids[-1] == END_TOKEN and END_TOKEN not in completion.token_ids[:-1]
        assert len(completion.text) == np.count_nonzero(completion.token_ids >= 2)
        assert_logprobs_are_those_of(engine.model, PROMPT, completion)
    assert all(len(completion.token_ids) == 150 for completion in cut)


def test_the_end_of_each_sequence_is_told_before_the_end_of_the_group(ending_engine):
    engine = ending_engine
    told = []  # at each end: whether the request was done, and how many sequences were running

    async def watched():
        request = asyncio.create_task(
            engine.generate(
                PROMPT,
                num_rollouts=len(SEEDS),
                max_new_tokens=170,
                seeds=SEEDS,
                on_sequence_end=lambda: told.append((request.done(), engine.engine.num_running)),
            )
        )
        await request

    engine.run(watched())
    assert [done for done, _ in told] == [False] * len(SEEDS)
    # Sequences that end in one step are all ended when the first of them is told of.
    assert all(running <= len(SEEDS) - 1 - index for index, (_, running) in enumerate(told))
    assert len({running for _, running in told}) > 2, "all ended together: nothing was shown"


def test_tokens_are_counted_when_their_completion_is_finished(engine):
    before = engine.engine.tokens_generated
    completions = engine.run(engine.generate(PROMPT, num_rollouts=3, max_new_tokens=12))
    assert engine.engine.tokens_generated - before == sum(len(completion.token_ids) for completion in completions)
    assert engine.engine.num_running == 0


def test_what_a_step_takes_is_told_after_steps_with_few_and_with_many_sequences(ending_engine):
    """Against the clock: a completion by itself takes so many steps, and a quarter of the steps are faster."""
    engine = ending_engine
    for _ in range(2):
        engine.run(engine.generate(PROMPT, num_rollouts=len(SEEDS), max_new_tokens=150, seeds=SEEDS))
    began = time.monotonic()
    (alone,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=150, temperature=0.0))
    step_ms = 1e3 * (time.monotonic() - began) / len(alone.token_ids)
    told = engine.engine.step_ms()
    assert set(told) == {"fixed", "sequence", "new_sequence"} and min(told.values()) >= 0
    assert 0 < told["fixed"] + told["sequence"] < 3 * step_ms


def test_an_aborted_request_fails_and_leaves_nothing_running(engine):
    async def abort_midway():
        task = asyncio.create_task(engine.generate(PROMPT, request_id="doomed", max_new_tokens=180, num_rollouts=8))
        await engine.until_begun()
        await engine.engine.abort("never seen")
        await engine.engine.abort("doomed")
        with pytest.raises(EngineError, match="doomed: aborted"):
            await task

    engine.run(abort_midway())
    assert engine.engine.num_running == 0
    assert len(engine.run(engine.generate(PROMPT))) == 2


def test_a_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(EngineError, match="too-long"):
        engine.run(engine.generate([5] * (MAX_LENGTH + 50), request_id="too-long"))
    assert engine.engine.num_running == 0


def test_a_deadline_names_what_was_waited_for_and_costs_nothing_else(engine):
    sequences = [random_prompt(MAX_LENGTH, seed) for seed in range(4)]
    with pytest.raises(DeadlineExceeded, match=r"scoring 4 sequences: .* within 0.001 s"):
        engine.run(engine.engine.score(sequences, 0.001))
    assert not engine.engine.tainted
    assert_samples_the_model(engine)


# -- weights -------------------------------------------------------------------------------------------


def test_a_swap_keeps_sequences_in_flight_and_every_token_has_its_version(engine):
    old_model = copy.deepcopy(engine.model)

    async def swap_midway():
        old = engine.engine.version
        synced = asyncio.Event()

        async def keep_busy(prompt):
            """Most sequences end early: new ones follow until the swap is over."""
            completions = []
            while not synced.is_set():
                completions += await engine.generate(prompt, num_rollouts=4, max_new_tokens=170)
            return completions

        busy = [asyncio.create_task(keep_busy(random_prompt(10, i))) for i in range(4)]
        randomize(engine.model, 21)
        new = await engine.sync()
        synced.set()
        return old, new, await asyncio.gather(*busy)

    old, new, groups = engine.run(swap_midway())
    crossed = 0
    for index, group in enumerate(groups):
        for completion in group:
            spans = completion.version_spans
            assert spans[0].start == 0 and spans[-1].stop == len(completion.token_ids)
            assert all(left.stop == right.start for left, right in zip(spans, spans[1:], strict=False))
            assert [span.version for span in spans] in ([old], [old, new], [new])
            if spans[0].version == new:
                continue  # begun after the swap
            crossed += len(spans) == 2
            # The first span must be the old weights to the letter; the second rests on old keys and values.
            first = dataclasses.replace(
                completion,
                token_ids=completion.token_ids[: spans[0].stop],
                logprobs=completion.logprobs[: spans[0].stop],
            )
            assert_logprobs_are_those_of(old_model, random_prompt(10, index), first)
    assert crossed > 0, "no sequence was in flight during the swap"
    assert engine.engine.version == new
    assert_samples_the_model(engine)


def test_what_is_staged_and_not_swapped_changes_nothing_and_leaving_drops_it(engine):
    old_model, before = copy.deepcopy(engine.model), engine.engine.version
    version = engine.run(engine.stage_next(41))
    assert engine.engine.version == before and not engine.engine.tainted
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=16))
    assert [span.version for span in completion.version_spans] == [before]
    assert_logprobs_are_those_of(old_model, PROMPT, completion)
    for _ in range(2):  # the second time there is nothing to leave
        engine.run(engine.engine.leave_channel())
    with pytest.raises(EngineError, match=f"version {version} is not staged"):
        engine.run(engine.engine.swap_weights(version, 10.0))
    assert engine.engine.version == before and not engine.engine.tainted
    engine.run(engine.sync())
    assert_samples_the_model(engine)


def test_a_cached_prefix_serves_its_own_version_only(engine):
    prompt = random_prompt(100, 7)  # three full blocks
    engine.run(engine.generate(prompt))
    engine.run(engine.generate(prompt))
    randomize(engine.model, 22)
    engine.run(engine.sync())
    for completion in engine.run(engine.generate(prompt, max_new_tokens=16)):
        assert_logprobs_are_those_of(engine.model, prompt, completion)


def test_a_prefix_cached_under_weights_that_were_found_wrong_is_not_used_when_their_version_comes_again(engine):
    prompt = random_prompt(100, 9)
    randomize(engine.model, 31)
    version = engine.run(engine.sync())
    engine.run(engine.generate(prompt))
    engine.run(engine.generate(prompt))
    engine.engine.taint("the canary differs")
    randomize(engine.model, 32)
    engine.next_version = version
    assert engine.run(engine.sync()) == version
    for completion in engine.run(engine.generate(prompt, max_new_tokens=16)):
        assert_logprobs_are_those_of(engine.model, prompt, completion)


def test_a_tainted_engine_fails_what_is_in_flight_and_samples_nothing_until_a_full_sync(engine):
    """Else a long sequence would go on into a later, good sync to the same version and carry its number throughout."""

    async def taint_in_flight():
        running = asyncio.create_task(engine.generate(PROMPT, num_rollouts=4, max_new_tokens=180))
        await engine.until_begun()
        engine.engine.taint("the canary differs")
        with pytest.raises(EngineError, match="tainted"):
            await running
        with pytest.raises(EngineError, match="tainted"):
            await engine.generate(PROMPT)
        with pytest.raises(EngineError, match="tainted"):
            await engine.engine.score([PROMPT], 10.0)
        await engine.engine.probe(10.0)
        assert engine.engine.num_running == 0

    engine.run(taint_in_flight())
    assert engine.engine.tainted and engine.engine.version is None
    version = engine.run(engine.sync())
    assert engine.engine.version == version and not engine.engine.tainted
    assert_samples_the_model(engine)


def test_a_wrong_digest_is_refused_and_the_old_version_goes_on(engine):
    before = engine.engine.version

    def damage(manifest):
        digests = list(manifest.digests)
        digests[1] ^= 1
        return dataclasses.replace(manifest, digests=tuple(digests))

    with pytest.raises(ChannelError, match="bucket 1 of version"):
        engine.run(engine.stage(tamper=damage))
    with pytest.raises(EngineError, match="not staged"):
        engine.run(engine.engine.swap_weights(engine.next_version - 1, 10.0))
    assert engine.engine.version == before and not engine.engine.tainted
    assert_samples_the_model(engine)


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_swap_that_lacks_a_tensor_taints_the_engine_until_a_full_sync(engine, missing):
    async def swap_half():
        version = await engine.stage(only=lambda name: name != missing)
        running = asyncio.create_task(engine.generate(PROMPT, max_new_tokens=180))
        await engine.until_begun()
        with pytest.raises(EngineError, match="does not carry"):
            await engine.engine.swap_weights(version, 20.0)
        with pytest.raises(EngineError, match="tainted"):
            await running

    engine.run(swap_half())
    assert engine.engine.tainted and engine.engine.version is None
    with pytest.raises(EngineError, match="tainted"):
        engine.run(engine.generate(PROMPT))
    engine.run(engine.engine.probe(10.0))
    version = engine.run(engine.sync())
    assert engine.engine.version == version and not engine.engine.tainted
    assert_samples_the_model(engine, max_new_tokens=24)


def test_weights_that_give_nan_are_an_error_and_not_a_number(engine):
    import torch

    with torch.no_grad():
        engine.model.model.norm.weight[3] = float("nan")
    engine.run(engine.sync())
    with pytest.raises(NonFiniteError):
        engine.run(engine.generate(PROMPT))
    with pytest.raises(NonFiniteError):
        engine.run(engine.engine.score([PROMPT], 10.0))
    randomize(engine.model, 24)
    engine.run(engine.sync())
    assert len(engine.run(engine.generate(PROMPT))) == 2


SENDER = """
import json, os, signal, sys, torch
from asyncrl.link.field_checks import from_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
channel = WeightChannel.host(from_plain(ChannelSpec, json.loads(sys.argv[1])))
print(channel.store_port, flush=True)
channel.join()
channel.broadcast([torch.zeros(65536, dtype=torch.uint8)], 20.0)
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize(("fault", "timeout_s", "limit_s"), [("SIGKILL", 30.0, LATE_S), ("SIGSTOP", 3.0, 3.0 + LATE_S)])
def test_a_sender_lost_in_mid_transfer_is_an_error_in_time_and_generation_goes_on(engine, fault, timeout_s, limit_s):
    """A death is seen; a sender that stands still is waited for until the deadline."""
    spec = ChannelSpec("127.0.0.1", 0, "lost", 0, 2, "gloo", 20.0)
    before = engine.engine.version
    command = [sys.executable, "-c", SENDER, json.dumps(to_plain(spec)), fault]
    sender = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    async def receive():
        import torch

        from asyncrl.weights.bytes.snapshot import SnapshotBuffer

        port = int(await asyncio.to_thread(sender.stdout.readline))
        buffer = SnapshotBuffer([("a", torch.zeros(65536))], bucket_bytes=65536)
        generation = asyncio.create_task(engine.generate(PROMPT, num_rollouts=8, max_new_tokens=120))
        await engine.engine.join_channel(dataclasses.replace(spec, rank=1, store_port=port), 20.0)
        started = time.monotonic()
        with pytest.raises(ChannelError, match="broadcast of 262144 bytes") as lost:
            await engine.engine.stage_weights(buffer.manifest(99), timeout_s)
        elapsed_s = time.monotonic() - started
        assert "staging version 99: worker 0 failed in phase stage, 65536 of 262144 bytes received" in str(lost.value)
        assert "the weight channel is left, nothing is staged, the weights in use are untouched" in str(lost.value)
        return elapsed_s, await generation

    try:
        elapsed_s, completions = engine.run(receive())
    finally:
        sender.kill()
        sender.wait()
    assert elapsed_s < limit_s
    assert engine.engine.version == before and not engine.engine.tainted
    assert {span.version for completion in completions for span in completion.version_spans} == {before}
    assert engine.run(engine.sync()) == engine.engine.version, "the next sync must work"


def test_joining_a_channel_that_never_forms_ends_at_its_deadline(engine):
    started = time.monotonic()
    spec = ChannelSpec("127.0.0.1", 9, "nobody", 1, 2, "gloo", 1.0)
    with pytest.raises(ChannelError, match="worker 0 failed in phase join: .*forming weight channel.* untouched"):
        engine.run(engine.engine.join_channel(spec, 1.0))
    assert time.monotonic() - started < 1.0 + LATE_S
    engine.run(engine.sync())


# -- the life of an engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ENGINES, ids=lambda factory: factory.name)
def test_an_engine_refuses_without_weights_syncs_untied_ones_exactly_and_is_found_out_when_hung_or_killed(
    factory, request
):
    under_test = request.getfixturevalue(factory.own_fixture)
    engine = under_test.engine
    assert engine.version is None and not engine.tainted
    assert (engine.num_running, engine.tokens_generated) == (0, 0)
    with pytest.raises(EngineError, match="no policy version"):
        under_test.run(under_test.generate(PROMPT))
    with pytest.raises(EngineError, match="no policy version"):
        under_test.run(engine.score([PROMPT], 5.0))
    under_test.run(engine.probe(10.0))

    for seed, apply in enumerate(factory.applies, start=31):
        randomize(under_test.model, seed)
        under_test.run(under_test.sync())
        assert under_test.notes["swap"].apply == apply
        sequence = random_prompt(60, seed)
        (score,) = under_test.run(engine.score([sequence], 20.0))
        np.testing.assert_allclose(score, reference_logprobs(under_test.model, sequence), atol=TOLERANCE, rtol=0)

    (process,) = under_test.processes()
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="probe"):
        under_test.run(engine.probe(1.0))
    assert time.monotonic() - started < 1.0 + LATE_S
    process.send_signal(signal.SIGCONT)
    under_test.run(engine.probe(10.0))
    engine.check_alive()

    async def kill_midway():
        task = asyncio.create_task(under_test.generate(PROMPT, max_new_tokens=180))
        await under_test.until_begun()
        process.kill()
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(task, 10.0)
        with pytest.raises(EngineError, match="died"):
            await engine.probe(1.0)
        with pytest.raises(EngineError, match="died"):
            engine.check_alive()
        assert engine.version is None
        for _ in range(2):  # the second time there is nothing to end
            await engine.close()
        with pytest.raises(EngineError):
            await under_test.generate(PROMPT)

    under_test.run(kill_midway())
