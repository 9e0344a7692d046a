"""What tests of rollout engines compare with: log-probs of transformers, in one full forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncrl.generator.engines.base import Completion
from tests.conftest import VOCAB_SIZE, EngineUnderTest, reference_logprobs

TOLERANCE = 1e-4  # nats; float32 on both sides
ODD_WORKER = "tests.generator.engines.vllm.odd_worker.OddWorkerExtension"  # can be told to fail
PROMPT = [5, 9, 33, 71, 12, 64]


def assert_logprobs_are_those_of(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0):
    """Every token's log-prob is the one that `model` gives it."""
    expected = reference_logprobs(model, prompt + completion.token_ids.tolist(), temperature)[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)


def assert_samples_the_model(engine: EngineUnderTest, max_new_tokens: int = 16) -> None:
    """The engine samples from the weights of the learner's model, under its newest version alone."""
    (completion,) = engine.run(engine.generate(PROMPT, num_rollouts=1, max_new_tokens=max_new_tokens))
    assert {span.version for span in completion.version_spans} == {engine.engine.version}
    assert_logprobs_are_those_of(engine.model, PROMPT, completion)


def random_prompt(length: int, seed: int) -> list[int]:
    """Tokens without the two special ones."""
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()
