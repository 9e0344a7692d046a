"""The task of crash loops: prompt n is two characters, and no generator asks for its rewards."""

from __future__ import annotations

from asyncrl.tasks.base import Example
from benchmarks.speed.models import FIRST_CHARACTER

CHARACTERS = 100  # of the smallest model's alphabet


class StubTask:
    """Endless; the stubs' own rewards take the place of `reward`."""

    train_size = None

    def train_example(self, index: int) -> Example:
        """Two characters that tell the example's number."""
        numbers = index % CHARACTERS, index // CHARACTERS % CHARACTERS
        return Example("".join(chr(FIRST_CHARACTER + number) for number in numbers), {"index": index})

    def eval_examples(self, count: int) -> list[Example]:
        """The first ones."""
        return [self.train_example(index) for index in range(count)]

    def reward(self, completion: str, payload: dict[str, int]) -> dict[str, float]:
        """Not asked for."""
        return {"stub": 0.0}
