"""A task whose rewards differ between the completions of a model with random weights, so that there is a gradient."""

from __future__ import annotations

from typing import Any

from asyncrl.tasks.base import Example


class Digits:
    """The reward is the share of low digits among all digits of a completion."""

    part_names = ("low",)
    train_size = None  # endless

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        return Example(f"{index}:", {})

    def eval_examples(self, count: int) -> list[Example]:
        """See `Task.eval_examples`."""
        return [Example(f"held out {index}:", {}) for index in range(count)]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """See `Task.reward`."""
        digits = [character for character in completion if character.isdecimal()]
        return {"low": sum(character < "5" for character in digits) / max(1, len(digits))}
