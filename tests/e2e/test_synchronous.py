"""With max_age=0 the two daemons compute what a plain loop computes: sample, score, step, load the weights, repeat.

The plain loop below uses the engine alone from the package. Its loss is written out in full, one rollout at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.desk.generators import ORDINAL_SEED_STRIDE, RUN_SEED_STRIDE
from asyncrl.host.tokenizer import load_tokenizer
from tests.e2e.daemons import START_S, STEP_S, Run
from tests.e2e.letters_task import Letters
from tests.tolerances import slack

STEPS, GROUPS, ROLLOUTS, MAX_NEW = 5, 4, 4, 12
SEED, LR, CLIP_LOW, CLIP_HIGH, CAP, GRAD_CLIP = 7, 5e-4, 0.2, 0.28, 2.0, 1.0


@pytest.fixture(scope="module")
def run(module_run: Run) -> Run:
    """Five steps by the two daemons."""
    module_run.configure(
        run={"steps": STEPS, "seed": SEED},
        sampling={"group_size": ROLLOUTS, "max_new_tokens": MAX_NEW, "repeatable": True},
        learner={"groups_per_step": GROUPS, "lr": LR, "grad_clip": GRAD_CLIP},
        algorithm={"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "tis_cap": CAP},
        staleness={"max_age": 0},
        eval={"prompts": 0},
    )
    learner, generator = module_run.learner(), module_run.generator()
    module_run.wait_for_version(1, learner, generator, timeout_s=START_S)
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    return module_run


@pytest.fixture(scope="module")
def plain(run: Run, tied_engine, tied_model_dir) -> dict:
    """The same five steps by the loop; returns losses, gradient norms, mean rewards and the trained model."""
    model = tied_engine.model
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(tied_model_dir, dtype=torch.float32).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    task, tokenizer = Letters(), load_tokenizer(str(tied_model_dir))
    figures: dict = {"loss": [], "grad_norm": [], "reward_mean": []}
    for step in range(STEPS):
        tied_engine.run(tied_engine.sync())
        rollouts = []
        for ordinal in range(step * GROUPS, (step + 1) * GROUPS):
            example = task.train_example(ordinal)
            prompt = tokenizer(example.prompt)["input_ids"]
            first = SEED * RUN_SEED_STRIDE + ordinal * ORDINAL_SEED_STRIDE
            seeds = tuple(first + index for index in range(ROLLOUTS))
            completions = tied_engine.run(
                tied_engine.generate(prompt, num_rollouts=ROLLOUTS, max_new_tokens=MAX_NEW, seeds=seeds)
            )
            rewards = [sum(task.reward(completion.text, example.payload).values()) for completion in completions]
            advantages = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)
            rollouts += zip([prompt] * ROLLOUTS, completions, advantages, rewards, strict=True)
        num_tokens = sum(len(completion.token_ids) for _, completion, _, _ in rollouts)
        optimizer.zero_grad()
        losses = [rollout_loss(model, *rollout[:3]) / num_tokens for rollout in rollouts]
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        figures["loss"].append(sum(loss.item() for loss in losses))
        figures["grad_norm"].append(norm.item())
        figures["reward_mean"].append(float(np.mean([reward for *_, reward in rollouts])))
    tied_engine.run(tied_engine.sync())  # the engine is shared: whoever comes next expects it at the model's weights
    return figures | {"model": model}


def rollout_loss(model, prompt: list[int], completion, advantage: float) -> torch.Tensor:
    """Sum over the tokens of one rollout: the larger of -r A and -clip(r) A, r the ratio to the sampling policy."""
    tokens = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    logprobs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(1, tokens[0, len(prompt) :, None])[:, 0]
    ratio = torch.exp(chosen - torch.from_numpy(completion.logprobs)).clamp(max=CAP)
    return torch.maximum(-ratio * advantage, -ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage).sum()


def recorded(run: Run, name: str) -> list[float]:
    return [record[name] for record in run.records("step")]


def test_the_same_completions_were_sampled(run, plain):
    np.testing.assert_allclose(recorded(run, "reward_mean"), plain["reward_mean"], atol=1e-9)
    assert len(set(plain["reward_mean"])) == STEPS


def test_losses_are_the_same_up_to_rounding(run, plain):
    assert np.abs(plain["loss"]).max() > 1e-3
    rounding = slack(1.0, steps=32)  # the terms, ratio times advantage, are about 1
    np.testing.assert_allclose(recorded(run, "loss"), plain["loss"], rtol=0, atol=rounding)


def test_gradient_norms_are_the_same(run, plain):
    np.testing.assert_allclose(recorded(run, "grad_norm"), plain["grad_norm"], rtol=1e-4)


def test_the_trained_models_agree(run, plain):
    exported = AutoModelForCausalLM.from_pretrained(run.run_dir / "export", dtype=torch.float32)
    tokens = torch.arange(2, 60)[None]
    with torch.no_grad():
        ours, theirs = (model(tokens).logits.log_softmax(-1) for model in (exported, plain["model"]))
    assert (ours - theirs).abs().max() < 1e-4


def test_every_token_was_of_the_newest_policy(run):
    assert recorded(run, "policy_age_max") == [0] * STEPS
    assert all(gap < 1e-4 for gap in recorded(run, "logprob_gap_age0"))
