"""A task of the user's own, found by its import path: letters are good. Some prompts have a reward that misbehaves.

Every reward that is computed is at least 0.1, so a zero in a batch could only be a failure that became a number.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from asyncrl.tasks.base import Example

RAISES, NOT_A_NUMBER, HANGS_ONCE, EXITS_ONCE = 1, 2, 3, 4  # training examples that misbehave when `faults` is set
LEAST_REWARD = 0.1


class Letters:
    """delay_s: seconds each reward takes. faults: folder for the marks of faults that happen once; empty = none.

    flat_every: each prompt whose number is a multiple of it gets the same reward whatever comes; 0 = none does.
    scored: file that the number of each scored training prompt is appended to, a line per completion; empty = none.
    """

    def __init__(self, delay_s: float = 0.0, faults: str = "", flat_every: int = 0, scored: str = ""):
        self._delay_s = delay_s
        self._faults = faults
        self._flat_every = flat_every
        self._scored = scored

    train_size = None  # endless, in order: example n is the prompt of ordinal n

    def train_example(self, index: int) -> Example:
        return Example(f"train{index}:", {"index": index})

    def eval_examples(self, count: int) -> list[Example]:
        return [Example(f"eval{index}:", {"index": -1}) for index in range(count)]

    def reward(self, completion: str, payload: dict) -> dict[str, float]:
        time.sleep(self._delay_s)
        if self._faults and payload["index"] == RAISES:
            raise ValueError("this prompt cannot be scored")
        if self._faults and payload["index"] == NOT_A_NUMBER:
            return {"letters": math.nan}
        if self._faults and payload["index"] == HANGS_ONCE and self._first("hang"):
            time.sleep(3600)
        if self._faults and payload["index"] == EXITS_ONCE and self._first("exit"):
            os._exit(7)
        if self._scored and payload["index"] >= 0:
            with open(self._scored, "a") as lines:
                lines.write(f"{payload['index']}\n")
        if self._flat_every and payload["index"] % self._flat_every == 0:
            return {"base": LEAST_REWARD}
        letters = sum(character.isalpha() for character in completion)
        return {"base": LEAST_REWARD, "letters": letters / max(1, len(completion))}

    def _first(self, what: str) -> bool:
        """True once, over all reward processes."""
        try:
            Path(self._faults, what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
