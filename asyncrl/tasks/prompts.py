"""From the task's examples to prompts: the order of training, what is left out of it and why.

A training example that asks what a held-out one asks is trained on, for the task is to keep them apart, and said: the
tasks that come with asyncrl leave such examples out.

Only the helper process of the learner (`tasks.helper_process`) uses this, and studies that need no daemons: it runs the
task's code and imports transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from asyncrl.errors import TaskError
from asyncrl.tasks.base import Example, Task
from asyncrl.tasks.data.overlap import HeldOutPrompts
from asyncrl.tasks.payloads import plain_payload
from asyncrl.tasks.rendering import NoChatTemplate, PromptEncoder, last_user_text
from asyncrl.tasks.shuffle import example_index
from asyncrl.types import TOKEN_DTYPE

log = logging.getLogger(__name__)

MAX_REASON = 400  # characters
DEFAULT_PAYLOAD_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine takes it."""

    token_ids: np.ndarray  # int32 [P]
    payload: dict[str, Any]  # what the task's reward needs
    user_text: str = ""  # of chat messages, what the user says last


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An example that no prompt can be made of: its ordinal is settled without a group."""

    index: int  # the example's own number in the task
    reason: str
    too_long: bool = False  # else it is at fault


class PromptSource:
    """The training stream and the held-out prompts of a task, as token ids.

    Training: ordinal n is example n of an endless sequence of epochs, each a new shuffle of all examples. It is a pure
    function of (seed, n), so nothing but the ordinal needs saving. An endless task is taken in its own order.

    Too long (over max_prompt_tokens): never cut, because a cut prompt asks something else. Such an example is left out,
    and so is one that is at fault; their ordinals are skipped, so that the order is a shuffle of those that fit.
    max_payload_bytes bounds the texts of one payload. num_rows: of the model's embedding, where it is known.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        seed: int,
        max_prompt_tokens: int,
        *,
        max_payload_bytes: int = DEFAULT_PAYLOAD_BYTES,
        num_rows: int | None = None,
    ) -> None:
        if max_prompt_tokens < 1:
            raise TaskError(
                f"{max_prompt_tokens} tokens are left for a prompt: "
                f"model.max_length must be larger than sampling.max_new_tokens"
            )
        self._task = task
        self.encoder = PromptEncoder(tokenizer, num_rows)
        self._seed = seed
        self._max_prompt_tokens = max_prompt_tokens
        self._max_payload_bytes = max_payload_bytes
        self.train_size = _checked_size(task.train_size)
        self._held_out = HeldOutPrompts()
        self._shared: set[int] = set()  # training examples that ask what a held-out one asks

    def train(self, ordinal: int) -> Prompt:
        """Training prompt number `ordinal`, from 0 without end. Raises TaskError where that is left out."""
        made = self.make(ordinal)
        if isinstance(made, LeftOut):
            raise TaskError(f"training example {made.index} is left out: {made.reason}")
        return made

    def make(self, ordinal: int) -> Prompt | LeftOut:
        """As `train`, but says what is left out. Raises NoChatTemplate when that is so of all examples."""
        index = example_index(ordinal, self._seed, self.train_size)
        return self._make(index, lambda: self._compared(index, self._task.train_example(index)))

    def held_out(self, count: int) -> Iterator[Prompt | LeftOut]:
        """The first `count` held-out examples, one by one.

        Raises TaskError when the task cannot be asked for them or has none.
        """
        examples = guarded(f"eval_examples({count})", lambda: list(self._task.eval_examples(count)))
        if count and not examples:
            raise TaskError(
                f"the task has no held-out examples: eval_examples({count}) gave none; give it some (for a file of "
                "records: more records, or task.args.eval_path), or switch evaluation off with eval.prompts=0"
            )
        for index, example in enumerate(examples[:count]):
            if isinstance(example, Example):
                self._held_out.add(example.prompt, f"held-out example {index}")
            yield self._make(index, partial(_itself, example))

    def evals(self, count: int) -> list[Prompt]:
        """The held-out prompts that can be used, of the first `count`. Raises TaskError when there are none."""
        made = list(self.held_out(count)) if count else []
        check_held_out(made, self._max_prompt_tokens)
        return [prompt for prompt in made if isinstance(prompt, Prompt)]

    def _compared(self, index: int, example: object) -> object:
        """The training example, after a warning if it asks what a held-out one asks: each doubling of them is said."""
        whose = self._held_out.asked_by(example.prompt) if isinstance(example, Example) else None
        if whose is not None and index not in self._shared:
            self._shared.add(index)
            if (count := len(self._shared)) & (count - 1) == 0:
                log.warning(
                    "training example %d asks what %s asks (%d such examples so far): the evaluation does not show "
                    "what was learnt of that; make eval_examples give others",
                    index,
                    whose,
                    count,
                )
        return example

    def _make(self, index: int, example_of: Callable[[], object]) -> Prompt | LeftOut:
        try:
            example = guarded("", example_of)
            if not isinstance(example, Example):
                raise TaskError(f"it must be an Example, not {type(example).__name__}")
            payload = plain_payload(example.payload, self._max_payload_bytes)
            token_ids = self.encoder.encode(example.prompt, example.chat_template_args)
        except NoChatTemplate:
            raise
        except TaskError as error:
            return LeftOut(index, in_one_line(error))
        if len(token_ids) > self._max_prompt_tokens:
            limit = f"{self._max_prompt_tokens} (model.max_length - sampling.max_new_tokens)"
            return LeftOut(index, f"{len(token_ids)} tokens, over the limit of {limit}", too_long=True)
        return Prompt(np.array(token_ids, dtype=TOKEN_DTYPE), payload, last_user_text(example.prompt))


def _itself(example: object) -> object:
    return example


def check_held_out(made: list[Prompt | LeftOut], max_prompt_tokens: int) -> None:
    """Raises TaskError when held-out examples were made and none of them can be used."""
    left_out = [found for found in made if isinstance(found, LeftOut)]
    if not made or len(left_out) < len(made):
        return
    if all(found.too_long for found in left_out):
        raise TaskError(
            f"none of the {len(made)} held-out examples fits into {max_prompt_tokens} tokens; "
            f"raise model.max_length, or switch evaluation off with eval.prompts=0"
        )
    first = next(found for found in left_out if not found.too_long)
    raise TaskError(
        f"none of the {len(made)} held-out examples can be used; number {first.index}: {first.reason}; "
        "correct the data, or switch evaluation off with eval.prompts=0"
    )


def guarded(what: str, call: Callable[[], Any]) -> Any:
    """What the task's code returns. Raises TaskError for whatever that raises, an exit included.

    what: the call, for the message; empty where the message is about an example. A TaskError passes as it is.
    """
    try:
        return call()
    except TaskError:
        raise
    except SystemExit as error:
        raise TaskError(f"{what or 'making it'} called sys.exit({error.code!r:.40})") from None
    except Exception as error:
        raise TaskError(f"{what or 'making it'} raised {type(error).__name__}: {error}") from error


def in_one_line(error: object) -> str:
    """A message of foreign code, without control characters and not too long."""
    printable = "".join(char if char.isprintable() else " " for char in str(error))
    return " ".join(printable.split())[:MAX_REASON]


def _checked_size(size: object) -> int | None:
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise TaskError(f"the task has train_size={size!r:.60}; it must be at least 1, or None for endless")
    return int(size)
