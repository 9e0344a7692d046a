"""The real vLLM against transformers, with weights that come over real groups."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from asyncrl.errors import ChannelError, DeadlineExceeded, EngineError, NonFiniteError
from asyncrl.weights.channels.channel import ChannelSpec
from tests.conftest import END_TOKEN, MAX_LENGTH, VOCAB_SIZE, randomize, reference_logprobs

TOLERANCE = 1e-4  # float32 on both sides
PROMPT = [5, 9, 33, 71, 12, 64]


def assert_logprobs_are_those_of(model, prompt, completion, temperature=1.0):
    expected = reference_logprobs(model, prompt + completion.token_ids.tolist(), temperature)[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)


def random_prompt(length, seed):
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()


# -- sampling and scoring ------------------------------------------------------------------------------


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
        return [c.token_ids.tolist() for c in completions]

    first = sample((11, 12, 13, 14))
    assert sample((11, 12, 13, 14)) == first
    assert sample((14, 13, 12, 11)) == first[::-1]
    assert len({tuple(tokens) for tokens in first}) == 4


def test_seeds_survive_long_prompts_that_do_not_fit_into_one_step(engine):
    # 60 prompts of 180 tokens are more than a step takes, so some wait; none may be split (vLLM would die).
    async def many():
        prompts = [random_prompt(180, 100 + i) for i in range(60)]
        work = [engine.generate(p, num_rollouts=1, max_new_tokens=4, seeds=(i,)) for i, p in enumerate(prompts)]
        return await asyncio.gather(*work)

    assert len(engine.run(many())) == 60


def test_the_end_token_is_in_the_tokens_and_not_in_the_text(engine):
    completions = engine.run(engine.generate(PROMPT, num_rollouts=16, max_new_tokens=150))
    stopped = [c for c in completions if c.finish_reason == "stop"]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert stopped, "no completion ended by itself; the test needs another seed of the model"
    for completion in stopped:
        assert completion.token_ids[-1] == END_TOKEN and END_TOKEN not in completion.token_ids[:-1]
        assert len(completion.text) == np.count_nonzero(completion.token_ids >= 2)
        assert_logprobs_are_those_of(engine.model, PROMPT, completion)
    assert all(len(c.token_ids) == 150 for c in cut)


def test_the_end_of_each_sequence_is_told_before_the_end_of_the_group(engine):
    ended = []

    async def watched():
        request = asyncio.create_task(
            engine.generate(
                PROMPT, num_rollouts=6, max_new_tokens=170, on_sequence_end=lambda: ended.append(request.done())
            )
        )
        running = []
        while not request.done():
            running.append((len(ended), engine.engine.num_running))
            await asyncio.sleep(0.001)
        return running

    running = engine.run(watched())
    assert ended == [False] * 6
    # A sequence that ended is told of in the loop's next turn, so at a glance one may be neither running nor told.
    assert all(told + left <= 6 for told, left in running)
    assert len({told for told, left in running if left}) > 1, "all ended together: nothing was shown"


def test_an_aborted_request_fails_and_leaves_nothing_running(engine):
    async def abort_midway():
        task = asyncio.create_task(engine.generate(PROMPT, request_id="doomed", max_new_tokens=180, num_rollouts=8))
        while not engine.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        await engine.engine.abort("never seen")
        await engine.engine.abort("doomed")
        with pytest.raises(EngineError, match="doomed: aborted"):
            await task

    engine.run(abort_midway())
    assert engine.engine.num_running == 0
    assert len(engine.run(engine.generate(PROMPT))) == 2


def test_a_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(EngineError, match="refuses"):
        engine.run(engine.generate([5] * (MAX_LENGTH + 50)))


# -- weight sync ---------------------------------------------------------------------------------------


def test_a_swap_keeps_sequences_in_flight_and_every_token_has_its_version(engine):
    import copy

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
    (after,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=16))
    assert {span.version for span in after.version_spans} == {new}
    assert_logprobs_are_those_of(engine.model, PROMPT, after)


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
        while not engine.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        engine.engine.taint("the canary differs")
        with pytest.raises(EngineError, match="tainted"):
            await running
        with pytest.raises(EngineError, match="tainted"):
            await engine.generate(PROMPT)
        await engine.engine.probe(10.0)
        assert engine.engine.num_running == 0

    engine.run(taint_in_flight())
    assert engine.engine.tainted and engine.engine.version is None
    version = engine.run(engine.sync())
    assert engine.engine.version == version and not engine.engine.tainted
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1))
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


def test_a_sequence_not_begun_before_the_swap_begins_under_the_new_version(engine):
    prompt = random_prompt(100, 8)
    engine.run(engine.generate(prompt))  # its prefix is cached under the old version

    async def submit_into_a_pause():
        version = await engine.stage_next(23)
        llm = engine.engine._llm
        await llm.engine_core.pause_scheduler_async("keep", False)
        task = asyncio.create_task(engine.generate(prompt, num_rollouts=2, max_new_tokens=8))
        while len(llm.output_processor.request_states) < 2:
            await asyncio.sleep(0.001)
        await engine.engine.swap_weights(version, 20.0)
        return version, await task

    version, completions = engine.run(submit_into_a_pause())
    for completion in completions:
        assert [span.version for span in completion.version_spans] == [version]
        assert_logprobs_are_those_of(engine.model, prompt, completion)


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
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1))
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_swap_that_lacks_a_tensor_taints_the_engine_until_a_full_sync(engine, missing):
    async def swap_half():
        version = await engine.stage(only=lambda name: name != missing)
        running = asyncio.create_task(engine.generate(PROMPT, max_new_tokens=180))
        while not engine.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
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
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=24))
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


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
from asyncrl.weights.channels.channel import WeightChannel, ChannelSpec
group = WeightChannel.host(ChannelSpec.from_dict(json.loads(sys.argv[1])))
print(group.store_port, flush=True)
group.join()
group.broadcast([torch.zeros(65536, dtype=torch.uint8)], 20.0)
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize(("fault", "limit_s"), [("SIGKILL", 2.0), ("SIGSTOP", 5.0)])
def test_a_sender_lost_in_mid_transfer_is_an_error_in_time_and_generation_goes_on(engine, fault, limit_s):
    spec = ChannelSpec("127.0.0.1", 0, "lost", 0, 2, "gloo", 20.0)
    before = engine.engine.version
    command = [sys.executable, "-c", SENDER, json.dumps(spec.to_dict()), fault]
    sender = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    async def receive():
        import torch

        from asyncrl.weights.channels.channel import SnapshotBuffer

        port = int(await asyncio.to_thread(sender.stdout.readline))
        buffer = SnapshotBuffer([("a", torch.zeros(65536))], bucket_bytes=65536)
        generation = asyncio.create_task(engine.generate(PROMPT, num_rollouts=8, max_new_tokens=120))
        await engine.engine.join_channel(dataclasses.replace(spec, rank=1, store_port=port), 20.0)
        started = time.monotonic()
        with pytest.raises(ChannelError, match="broadcast of 262144 bytes") as lost:
            await engine.engine.stage_weights(buffer.manifest(99), 3.0)
        for words in (
            "staging version 99: worker 0 failed in phase stage, 65536 of 262144 bytes received",
            "the weight channel is left, nothing is staged, the weights in use are untouched",
        ):
            assert words in str(lost.value)
        elapsed_s = time.monotonic() - started
        return elapsed_s, await generation

    try:
        elapsed_s, completions = engine.run(receive())
    finally:
        sender.kill()
        sender.wait()
    assert elapsed_s < limit_s
    assert engine.engine.version == before and not engine.engine.tainted
    assert {span.version for c in completions for span in c.version_spans} == {before}
    assert engine.run(engine.sync()) == engine.engine.version, "the next sync must work"


def test_joining_a_group_that_never_forms_ends_at_its_deadline(engine):
    started = time.monotonic()
    with pytest.raises(ChannelError, match="worker 0 failed in phase join: .*forming weight channel.* untouched"):
        spec = ChannelSpec("127.0.0.1", 9, "nobody", 1, 2, "gloo", 1.0)
        engine.run(engine.engine.join_channel(spec, 1.0))
    assert time.monotonic() - started < 3.0
    engine.run(engine.sync())


# -- syncs that carry only what is trained -------------------------------------------------------------


def policy_with(model_dir, update):
    import torch

    from asyncrl.config import ModelConfig
    from asyncrl.trainer.engines.policy import load_policy

    return load_policy(ModelConfig(path=str(model_dir)), torch.device("cpu"), update=update)


def train_at_random(policy, seed):
    """New values for what is trained; B of an adapter is zero before, so that one leaves the initial policy."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def buffer_of(policy):
    from asyncrl.weights.channels.channel import SnapshotBuffer

    source = policy.sync_source()
    return SnapshotBuffer(source.named, 8192, adapted=source.adapted, patch=source.patch)


def partial_update(*names):
    from asyncrl.config import UpdateConfig

    return UpdateConfig(what="partial", names=list(names))


def lora_update(**changes):
    from asyncrl.config import UpdateConfig

    return UpdateConfig(what="lora", lora_rank=4, lora_alpha=8.0, **changes)


@pytest.fixture
def restored_engine(engine):
    """The session's engine, which gets the weights of its own model back at the end."""
    yield engine
    engine.run(engine.sync())


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(lambda: partial_update("model.layers.1.self_attn.q_proj.weight"), id="q_proj of a fused qkv"),
        pytest.param(lambda: partial_update("model.layers.1.*", "model.norm.weight"), id="a layer"),
        pytest.param(lambda: partial_update("lm_head.weight"), id="tied embeddings"),
        pytest.param(lambda: lora_update(), id="adapters"),
        pytest.param(lambda: lora_update(lora_sync="merged"), id="merged"),
        pytest.param(lambda: lora_update(lora_targets=["q_proj"]), id="adapters on q_proj"),
        pytest.param(lambda: lora_update(lora_targets=["q_proj"], lora_sync="merged"), id="merged q_proj"),
    ],
)
def test_a_sync_of_what_is_trained_alone_gives_the_learners_log_probs(restored_engine, tied_model_dir, update):
    engine = restored_engine
    policy = policy_with(tied_model_dir, update())
    buffer = buffer_of(policy)
    sequences = [random_prompt(40, 1), random_prompt(MAX_LENGTH, 2)]
    before = policy.score(sequences)
    for seed in (1, 2, 3):  # the second finds the base in place, and the engine has only what is trained to copy
        train_at_random(policy, seed)
        version = engine.run(engine.sync(buffer))
        assert engine.notes["swap"].apply == "direct"
        assert engine.engine.version == version and not engine.engine.tainted
        scores = engine.run(engine.engine.score(sequences, 20.0))
        for score, expected, old in zip(scores, policy.score(sequences), before, strict=True):
            np.testing.assert_allclose(score, expected, atol=TOLERANCE, rtol=0)
            assert np.abs(expected - old).max() > 100 * TOLERANCE, "training changed nothing: nothing was shown"
        (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=16))
        assert_logprobs_are_those_of(policy.model, PROMPT, completion)
    sent = sum(bucket.numel() for bucket in buffer.buckets())
    if policy.update.lora_sync == "adapter":
        trained = sum(parameter.nbytes for parameter in policy.trainable_parameters())
        assert trained <= sent < trained + 64 * len(policy.trainable_parameters())
    full = sum(tensor.nbytes for name, tensor in policy.named_sync_parameters() if name != "lm_head.weight")
    assert sent < full


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda patch: dataclasses.replace(patch, base=(*patch.base, ("model.layers.9.mlp.weight", 1))),
            "ModelError.* lacks 1 tensors that the learner does not send, model.layers.9.mlp.weight",
            id="missing",
        ),
        pytest.param(
            lambda patch: dataclasses.replace(patch, base=((patch.base[0][0], 1), *patch.base[1:])),
            "ModelError.* model.embed_tokens.weight has other values than in the learner's model",
            id="other values",
        ),
        pytest.param(
            lambda patch: dataclasses.replace(patch, scale=None),
            "ProtocolError.* the model has no tensor model.layers.0.self_attn.q_proj.lora_[AB].weight",
            id="unknown name",
        ),
        pytest.param(
            lambda patch: dataclasses.replace(patch, base=patch.base[:2]),
            "ProtocolError.* has an adapter and is not among the tensors that stay",
            id="adapter of nothing",
        ),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_before_the_swap_and_the_old_version_goes_on(
    engine, tied_model_dir, damage, message
):
    before = engine.engine.version
    buffer = buffer_of(policy_with(tied_model_dir, lora_update()))

    def tamper(manifest):
        return dataclasses.replace(manifest, patch=damage(manifest.patch))

    with pytest.raises(ChannelError, match=message):
        engine.run(engine.stage(buffer=buffer, tamper=tamper))
    with pytest.raises(EngineError, match="not staged"):
        engine.run(engine.engine.swap_weights(engine.next_version - 1, 10.0))
    assert engine.engine.version == before and not engine.engine.tainted
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1))
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


def test_a_sync_of_adapters_heals_a_tainted_engine_as_a_full_one_does(restored_engine, tied_model_dir):
    engine = restored_engine
    version = engine.run(engine.stage(only=lambda name: name != "lm_head.weight"))
    with pytest.raises(EngineError, match="does not carry"):
        engine.run(engine.engine.swap_weights(version, 20.0))
    assert engine.engine.tainted
    policy = policy_with(tied_model_dir, lora_update())
    train_at_random(policy, 3)
    engine.run(engine.sync(buffer_of(policy)))
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=16))
    assert_logprobs_are_those_of(policy.model, PROMPT, completion)


# -- an engine of its own: untied embeddings, and its end ----------------------------------------------


def test_an_engine_refuses_without_weights_syncs_untied_ones_exactly_and_is_found_out_when_hung_or_killed(
    untied_engine,
):
    under_test = untied_engine
    assert under_test.engine.version is None and not under_test.engine.tainted
    with pytest.raises(EngineError, match="no policy version"):
        under_test.run(under_test.generate(PROMPT))
    with pytest.raises(EngineError, match="no policy version"):
        under_test.run(under_test.engine.score([PROMPT], 5.0))
    under_test.run(under_test.engine.probe(10.0))

    for seed, apply in [(31, "reload"), (32, "direct"), (33, "direct"), (34, "direct")]:
        randomize(under_test.model, seed)
        under_test.run(under_test.sync())
        assert under_test.notes["swap"].apply == apply
        sequence = random_prompt(60, seed)
        (score,) = under_test.run(under_test.engine.score([sequence], 20.0))
        np.testing.assert_allclose(score, reference_logprobs(under_test.model, sequence), atol=TOLERANCE, rtol=0)

    (core,) = [child for child in psutil.Process().children() if child.pid in engine_pids(under_test)]
    core.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        under_test.run(under_test.engine.probe(1.0))
    assert time.monotonic() - started < 2.0
    core.send_signal(signal.SIGCONT)
    under_test.run(under_test.engine.probe(10.0))

    under_test.engine.check_alive()

    async def kill_midway():
        task = asyncio.create_task(under_test.generate(PROMPT, max_new_tokens=180))
        while not under_test.engine._llm.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.001)
        core.kill()
        with pytest.raises(EngineError, match="died"):
            await asyncio.wait_for(task, 10.0)
        with pytest.raises(EngineError, match="died"):
            await under_test.engine.probe(1.0)
        with pytest.raises(EngineError, match="died"):
            under_test.engine.check_alive()
        assert under_test.engine.version is None

    under_test.run(kill_midway())


def engine_pids(under_test):
    manager = under_test.engine._llm.engine_core.resources.engine_manager
    return {process.pid for process in manager.processes}


def test_a_process_of_the_engine_does_not_outlive_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from asyncrl.generator.engines.vllm.options import follow_parent\n"
        "def child():\n"
        "    follow_parent()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start()\n"
        "    print(process.pid, flush=True)\n"
        "    process.join()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    child = psutil.Process(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=10.0)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
