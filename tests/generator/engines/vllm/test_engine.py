"""What the vLLM engine is tested for besides `test_conformance`: its scheduler, partial syncs, its processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from asyncrl.errors import ChannelError, EngineError
from tests.conftest import MAX_LENGTH
from tests.generator.engines.checks import PROMPT, TOLERANCE, assert_logprobs_are_those_of, random_prompt

# -- sampling and scoring ------------------------------------------------------------------------------


def test_seeds_survive_long_prompts_that_do_not_fit_into_one_step(engine):
    # 60 prompts of 180 tokens are more than a step takes, so some wait; none may be split (vLLM would die).
    async def many():
        prompts = [random_prompt(180, 100 + i) for i in range(60)]
        work = [engine.generate(p, num_rollouts=1, max_new_tokens=4, seeds=(i,)) for i, p in enumerate(prompts)]
        return await asyncio.gather(*work)

    assert len(engine.run(many())) == 60


# -- weight sync ---------------------------------------------------------------------------------------


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
    from asyncrl.weights.bytes.snapshot import SnapshotBuffer

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
        pytest.param(lora_update, id="adapters"),
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
