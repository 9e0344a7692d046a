"""Column arithmetic, made from a seed: nothing to download, and small enough for a model of under a million parameters.

A prompt is `47+58=`. What counts is the number after the last `=` of the completion, so a model may write its working
first. The model that `bin/warmup arithmetic` makes works column by column from the right, carry included:
`47+58=15,10=105` (7+8 is 15, 4+5+1 is 10).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example
from asyncrl.tasks.shuffle import shuffled_index

CHARACTERS = "0123456789+-=,"  # all that prompts and worked answers are made of
MAX_HELD_OUT = 512
HELD_OUT_SHARE = 8  # one in so many at most


class Problem(NamedTuple):
    """left operation right; the result is never negative."""

    left: int
    operation: str
    right: int

    @property
    def text(self) -> str:
        """The prompt, such as `47+58=`."""
        return f"{self.left}{self.operation}{self.right}="

    @property
    def answer(self) -> int:
        """The right number."""
        return self.left + self.right if self.operation == "+" else self.left - self.right


class Arithmetic:
    """Sums and differences of two numbers. Part of the reward: `exact`, 1 for the right number, else 0.

    digits: of every operand, 1 to 9. operations: "+", "-" or "+-". seed: which problems are held out.
    All problems are walked without repetition; the held-out ones are never trained on.
    """

    part_names = ("exact",)

    def __init__(self, digits: int = 2, operations: str = "+", seed: int = 0):
        if not 1 <= digits <= 9:
            raise TaskError(f"task.args.digits={digits} must be from 1 to 9")
        if not operations or set(operations) - set("+-") or len(set(operations)) < len(operations):
            raise TaskError(f"task.args.operations={operations!r} must be '+', '-' or '+-'")
        self._seed = seed
        self._lowest = 10 ** (digits - 1)
        self._numbers = 10**digits - self._lowest
        # A difference is never negative, so its pairs are those with left >= right: a triangle of the square.
        self._sums = self._numbers**2 if "+" in operations else 0
        self._size = self._sums + (self._numbers * (self._numbers + 1) // 2 if "-" in operations else 0)
        self._held_out = min(MAX_HELD_OUT, self._size // HELD_OUT_SHARE)

    @property
    def train_size(self) -> int:
        """All problems but those held out."""
        return self._size - self._held_out

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`. Raises IndexError beyond `train_size`."""
        if not 0 <= index < self.train_size:
            raise IndexError(f"training example {index} of {self.train_size}")
        return _example(self.train_problem(index))

    def eval_examples(self, count: int) -> list[Example]:
        """See `Task.eval_examples`."""
        return [_example(problem) for problem in self.held_out_problems(count)]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """`exact` compares what stands after the last `=` with the payload's answer, to the letter."""
        written = completion.rpartition("=")[2].strip()
        return {"exact": 1.0 if written == payload["answer"] else 0.0}

    def train_problem(self, index: int) -> Problem:
        """The problem of training example `index`."""
        return self._problem(self._held_out + index)

    def held_out_problems(self, count: int) -> list[Problem]:
        """The first `count` problems that are never trained on, or all of them."""
        return [self._problem(rank) for rank in range(min(count, self._held_out))]

    def _problem(self, rank: int) -> Problem:
        """Problems in a seeded order: the first ranks are held out, the others are for training."""
        index = shuffled_index(rank, self._size, "arithmetic", self._seed)
        if index < self._sums:
            left, right = divmod(index, self._numbers)
            return Problem(self._lowest + left, "+", self._lowest + right)
        index -= self._sums
        left = (math.isqrt(8 * index + 1) - 1) // 2  # rows of a triangle: 1, 2, 3, ... pairs
        return Problem(self._lowest + left, "-", self._lowest + index - left * (left + 1) // 2)


def worked_answer(problem: Problem, forget: Callable[[], bool] | None = None) -> str:
    """The working, column by column from the right, `=` and the answer: `15,10=105` for 47+58.

    `forget` is asked at each carry (or borrow) whether to lose it: `15,9=95`. Without it nothing is lost.
    """
    sign = 1 if problem.operation == "+" else -1
    left, right = problem.left, problem.right
    carry = 0
    columns = []
    while left or right:
        columns.append(left % 10 + sign * (right % 10) + carry)
        carry = columns[-1] // 10
        if carry and forget is not None and forget():
            carry = 0
        left, right = left // 10, right // 10
    digits = "".join(str(column % 10) for column in reversed(columns))
    answer = str(carry) + digits if carry else digits.lstrip("0") or "0"
    return ",".join(map(str, columns)) + "=" + answer


def _example(problem: Problem) -> Example:
    return Example(problem.text, {"answer": str(problem.answer)})
