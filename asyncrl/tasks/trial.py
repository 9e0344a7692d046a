"""A trial of a run's task before anything is started: a few prompts as they would be leased, made in the helper."""

from __future__ import annotations

import select
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from asyncrl.config import Config
from asyncrl.host.model_config import vocab_size
from asyncrl.host.model_folder import find_model
from asyncrl.tasks.helper import HelperLimits, TaskHelper
from asyncrl.tasks.pipe import HelperSetup, PromptMade
from asyncrl.types import TOKEN_DTYPE

MIN_FRAME_SHARE = 4  # a payload may fill a frame to one part in so many


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One prompt as it would be leased. text is what the model is given, special tokens included."""

    index: int  # the example's number in the task, or among the held-out ones
    text: str
    token_ids: np.ndarray  # int32 [P]
    payload_keys: tuple[str, ...]
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskTrial:
    """What a task gives. train_size is None where it is endless, part_names where the task does not say them.

    left_out says for each record or example that cannot be used which it is and why.
    """

    train_size: int | None
    part_names: tuple[str, ...] | None
    train: list[RenderedExample]
    held_out: list[RenderedExample]
    left_out: list[str]

    @property
    def largest_token_id(self) -> int:
        """Of all prompts made; -1 without any."""
        return max((int(example.token_ids.max()) for example in self.train + self.held_out), default=-1)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt made."""
        return max((len(example.token_ids) for example in self.train + self.held_out), default=0)


def helper_setup(config: Config, *, with_text: bool = False) -> HelperSetup:
    """How the helper of a run makes prompts. Raises ModelError when there is no such model."""
    model = find_model(config.model.path)
    return HelperSetup(
        path=config.task.path,
        args=config.task.args,
        model_path=str(model.folder),
        num_rows=vocab_size(model.config),
        seed=config.run.seed,
        max_prompt_tokens=config.model.max_length - config.sampling.max_new_tokens,
        max_payload_bytes=config.transport.max_frame_bytes // MIN_FRAME_SHARE,
        num_evals=config.eval.prompts,
        with_text=with_text,
    )


def trial(
    config: Config, count: int = 4, *, num_evals: int | None = None, limits: HelperLimits | None = None
) -> TaskTrial:
    """Makes the first `count` training prompts of a run and its held-out ones, and returns once they are there.

    num_evals: how many held-out ones, where that is not eval.prompts.

    Raises TaskError or ModelError, naming what is wrong, when task or tokenizer cannot be used, blocks or exits.
    """
    setup = helper_setup(config, with_text=True)
    if num_evals is not None:
        setup = replace(setup, num_evals=num_evals)
    with closing(TaskHelper(setup, limits)) as helper:
        helper.start(time.monotonic())
        helper.ask(range(count), time.monotonic())
        made = _wait(helper, count)
        assert helper.started is not None, "no prompt comes before the start"
        started = helper.started
        return TaskTrial(
            train_size=started.train_size,
            part_names=None if started.part_names is None else tuple(started.part_names),
            train=[_rendered(prompt) for prompt in made if not prompt.reason],
            held_out=[_rendered(prompt) for prompt in helper.held_out],
            left_out=[*started.left_out, *(f"training example {p.index}: {p.reason}" for p in made if p.reason)],
        )


def task_part_names(path: str, args: dict[str, object], limits: HelperLimits | None = None) -> tuple[str, ...] | None:
    """What a task says its reward parts are called, None when it does not. It is made in a helper and not used.

    Raises TaskError as `trial`.
    """
    setup = HelperSetup(path, args, "", None, 0, 1, 0)
    with closing(TaskHelper(setup, limits)) as helper:
        helper.start(time.monotonic())
        _wait(helper, 0)
        assert helper.started is not None
        names = helper.started.part_names
        return None if names is None else tuple(names)


def _wait(helper: TaskHelper, count: int) -> list[PromptMade]:
    """Returns once the helper has started and `count` prompts are made or left out."""
    made: list[PromptMade] = []
    while len(made) < count or helper.started is None:
        timeout_s = max(0.0, min(0.5, helper.next_deadline() - time.monotonic()))
        select.select([helper.fd], [], [], timeout_s)
        made += helper.take(time.monotonic())
    return made


def _rendered(made: PromptMade) -> RenderedExample:
    return RenderedExample(
        made.index, made.text, np.frombuffer(made.token_ids, TOKEN_DTYPE), tuple(made.payload), made.payload
    )
