"""What tests of rollout engines compare with: log-probs of transformers, in one full forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncrl.generator.engines.base import Completion
from tests.conftest import VOCAB_SIZE, reference_logprobs

TOLERANCE = 1e-4  # nats; float32 on both sides
ODD_WORKER = "tests.generator.engines.vllm.odd_worker.OddWorkerExtension"  # can be told to fail
PROMPT = [5, 9, 33, 71, 12, 64]


def assert_logprobs_are_those_of(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0):
    """Every token's log-prob is the one that `model` gives it."""
    expected = reference_logprobs(model, prompt + completion.token_ids.tolist(), temperature)[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE, rtol=0)


def random_prompt(length: int, seed: int) -> list[int]:
    """Tokens without the two special ones."""
    return np.random.default_rng(seed).integers(2, VOCAB_SIZE, length).tolist()
