"""From the task's examples to token ids: the tokenizer, the order of training, and what is too long.

The desk uses this, so torch must not come in: transformers' own auto classes import it, hence the plain fast class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example, Task
from asyncrl.tasks.shuffle import shuffled_index
from asyncrl.types import TOKEN_DTYPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# So many over-long prompts in a row mean that the limit does not fit the task, not that a prompt stands out.
MAX_TRIES = 100
CACHED_PROMPTS = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine takes it."""

    token_ids: np.ndarray  # int32 [P]
    payload: dict[str, Any]  # what the task's reward needs


class PromptSource:
    """The training stream and the held-out prompts of a task, as token ids.

    Training: ordinal n is example n of an endless sequence of epochs, each a new shuffle of all examples. It is a pure
    function of (seed, n), so nothing but the ordinal needs saving. An endless task is taken in its own order.

    Too long (over max_prompt_tokens): never cut, because a cut prompt asks something else. In training, the next
    example that fits in the task's own order takes the place; held-out prompts are left out. Both are logged.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerFast, seed: int, max_prompt_tokens: int):
        if max_prompt_tokens < 1:
            raise TaskError(
                f"{max_prompt_tokens} tokens are left for a prompt: "
                f"model.max_length must be larger than sampling.max_new_tokens"
            )
        self._task = task
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_prompt_tokens = max_prompt_tokens
        self._train_size = task.train_size
        # A prompt is needed when it is leased and again when its group comes back.
        self._cached = functools.lru_cache(CACHED_PROMPTS)(self._train)
        if self._train_size is not None and self._train_size < 1:
            raise TaskError(f"the task has train_size={self._train_size}; it must be at least 1, or None for endless")

    def train(self, ordinal: int) -> Prompt:
        """Training prompt number `ordinal`, from 0 without end.

        Raises TaskError when the task gives no example, or MAX_TRIES in a row that are too long.
        """
        return self._cached(ordinal)

    def _train(self, ordinal: int) -> Prompt:
        first = self._example_index(ordinal)
        for distance in range(MAX_TRIES):
            index = first + distance if self._train_size is None else (first + distance) % self._train_size
            token_ids, payload = self._tokenize(self._task.train_example(index))
            if len(token_ids) <= self._max_prompt_tokens:
                return Prompt(np.array(token_ids, dtype=TOKEN_DTYPE), payload)
            log.warning(
                "training example %d has %d tokens, over the limit of %d; taking the next",
                index,
                len(token_ids),
                self._max_prompt_tokens,
            )
        raise TaskError(
            f"training examples {first} to {first + MAX_TRIES - 1} are all longer than {self._max_prompt_tokens} "
            f"tokens (model.max_length - sampling.max_new_tokens); raise model.max_length"
        )

    def evals(self, count: int) -> list[Prompt]:
        """The held-out prompts that fit, of the first `count`. Raises TaskError when there are none."""
        examples = self._task.eval_examples(count)
        tokenized = [self._tokenize(example) for example in examples]
        prompts = [
            Prompt(np.array(token_ids, dtype=TOKEN_DTYPE), payload)
            for token_ids, payload in tokenized
            if len(token_ids) <= self._max_prompt_tokens
        ]
        if count and not prompts:
            raise TaskError(
                f"none of the {len(examples)} held-out examples fits into {self._max_prompt_tokens} tokens; "
                f"raise model.max_length, or switch evaluation off with eval.prompts=0"
            )
        if len(prompts) < len(examples):
            log.warning(
                "%d of %d held-out prompts are too long and left out", len(examples) - len(prompts), len(examples)
            )
        return prompts

    def _example_index(self, ordinal: int) -> int:
        if self._train_size is None:
            return ordinal
        epoch, place = divmod(ordinal, self._train_size)
        return shuffled_index(place, self._train_size, "epoch", self._seed, epoch)

    def _tokenize(self, example: Example) -> tuple[Sequence[int], dict[str, Any]]:
        if isinstance(example.prompt, str):
            token_ids = self._tokenizer(example.prompt)["input_ids"]
        elif self._tokenizer.chat_template is None:
            raise TaskError(
                "the task's prompts are chat messages, but the tokenizer has no chat template; use a chat model"
            )
        else:
            token_ids = self._tokenizer.apply_chat_template(
                example.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if not token_ids:
            raise TaskError(f"an example's prompt has no tokens: {example.prompt!r}")
        return token_ids, example.payload
