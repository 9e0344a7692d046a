"""A model small enough to trust, a tokenizer folder beside it, and groups made by sampling from a law."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.step import StepRunner
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan

VOCAB = 23


def tiny_model(*, tied: bool = True, seed: int = 0, vocab: int = VOCAB, hidden: int = 16, layers: int = 2):
    """A Qwen2 with random weights, large enough that log-probs differ between tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def tiny_policy(**kwargs) -> Policy:
    return Policy(tiny_model(**kwargs))


def policy_of(runner: StepRunner) -> Policy:
    return runner.engines.actor.policy


def critic_of(runner: StepRunner) -> Critic:
    """Of a critic with a trunk of its own."""
    return runner.engines.critic.critic


def save_tiny_model(folder: Path, **kwargs) -> Path:
    """A model folder as a user would have it; the tokenizer file only has to be there."""
    tiny_model(**kwargs).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    return folder


def make_rollout(tokens, logprobs=None, *, reward=0.0, spans=None) -> Rollout:
    tokens = np.asarray(tokens, dtype=np.int32)
    if logprobs is None:
        logprobs = np.full(len(tokens), -1.0)
    return Rollout(
        token_ids=tokens,
        behaviour_logprobs=np.asarray(logprobs, dtype=np.float32),
        version_spans=tuple(VersionSpan(*span) for span in (spans or [(0, len(tokens), 0)])),
        finish_reason=FinishReason.STOP,
        reward=float(reward),
    )


def make_group(ordinal: int, prompt, rollouts) -> Group:
    key = LeaseKey(LeaseKind.TRAIN, ordinal, 0)
    return Group(key, np.asarray(prompt, dtype=np.int32), list(rollouts))


def random_groups(
    num_groups: int,
    group_size: int,
    *,
    seed=0,
    prompt=(2, 8),
    completion=(1, 9),
    version=0,
    vocab=VOCAB,
    policy=None,
) -> list[Group]:
    """Groups of random tokens; behaviour log-probs are those of `policy`, else a bit off uniform."""
    rng = np.random.default_rng(seed)
    groups = []
    for ordinal in range(num_groups):
        prompt_ids = rng.integers(0, vocab, rng.integers(*prompt, endpoint=True))
        rollouts = []
        for _ in range(group_size):
            tokens = rng.integers(0, vocab, rng.integers(*completion, endpoint=True))
            if policy is None:
                logprobs = -np.log(vocab) + 0.3 * rng.standard_normal(len(tokens))
            else:
                logprobs = policy.score([[*prompt_ids, *tokens]])[0][len(prompt_ids) - 1 :]
            rollouts.append(
                make_rollout(tokens, logprobs, reward=rng.integers(0, 2), spans=[(0, len(tokens), version)])
            )
        groups.append(make_group(ordinal, prompt_ids, rollouts))
    return groups
