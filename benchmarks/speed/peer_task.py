"""The task of the end-to-end comparison: prompts of one length, and a reward that costs nothing.

Both sides get the same prompts and the same reward; the peer's side has it in `trl_worker`.
"""

from __future__ import annotations

import random
from typing import Any

from asyncrl.tasks.base import Example
from benchmarks.speed.models import FIRST_CHARACTER


def prompt(index: int, tokens: int, vocab: int) -> str:
    """Prompt `index`: random characters, the last one always the same."""
    draw = random.Random(index)
    body = "".join(chr(FIRST_CHARACTER + draw.randrange(1, vocab - 2)) for _ in range(tokens - 1))
    return body + chr(FIRST_CHARACTER)


class Parity:
    """Reward 1 where the sum of the completion's characters is odd."""

    part_names = ("odd",)
    train_size = None

    def __init__(self, tokens: int = 32, vocab: int = 4096) -> None:
        self._tokens, self._vocab = tokens, vocab

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        return Example(prompt(index, self._tokens, self._vocab))

    def eval_examples(self, count: int) -> list[Example]:
        """See `Task.eval_examples`."""
        return [Example(prompt(-1 - index, self._tokens, self._vocab)) for index in range(count)]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """See `Task.reward`."""
        return {"odd": float(sum(map(ord, completion)) % 2)}
