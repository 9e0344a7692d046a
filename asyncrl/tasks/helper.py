"""Prompts ahead of need: a daemon's end of the helper process, which never waits for it.

The desk never runs a task's code. It asks for prompts by their ordinals, waits on `fd` among all else, and takes what
has come. An example that blocks, exits or kills its process costs that process, which is replaced, and is left out by
name.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from asyncrl.errors import ModelError, ProtocolError, TaskError
from asyncrl.host.guarded_process import GuardedProcess
from asyncrl.tasks.pipe import (
    FRAME_SLACK_BYTES,
    HeldOutMade,
    HelperMessage,
    HelperSetup,
    HelperStage,
    HelperStarted,
    PromptMade,
    PromptsWanted,
    decode_from_helper,
    encode,
)
from asyncrl.tasks.prompts import Prompt, check_held_out
from asyncrl.tasks.shuffle import example_index

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # between two signs of life while the task is made: reading a data set takes long
EXAMPLE_TIMEOUT_S = 30.0
MAX_DEATHS = 3  # helpers lost one after the other, without a prompt in between
MAX_LEFT_OUT = 16  # examples at fault: more than this, and more than a quarter of all, ends the run
MAX_LEFT_OUT_SHARE = 0.25
MAX_TOO_LONG = 1000  # examples in a row: then the limit does not fit the task
LISTED_TOO_LONG = 10  # by themselves, before they are only counted


@dataclass(frozen=True, slots=True)
class HelperLimits:
    """Seconds after which a helper that says nothing is killed: while it starts, and at one example."""

    start_s: float = START_TIMEOUT_S
    example_s: float = EXAMPLE_TIMEOUT_S


class TaskHelper:
    """The helper of one task. `started` is what it said once it was ready, None before."""

    def __init__(self, setup: HelperSetup, limits: HelperLimits | None = None) -> None:
        self.started: HelperStarted | None = None
        self.held_out: list[PromptMade] = []
        self.num_left_out = 0
        self.num_too_long = 0
        self._setup = setup
        self._limits = limits or HelperLimits()
        self._process = GuardedProcess(
            "asyncrl.tasks.helper_process", "the task", setup.max_payload_bytes + FRAME_SLACK_BYTES
        )
        self._stage = "starting"
        self._ready = False  # the present process is
        self._due_at = float("inf")
        self._asked: deque[int] = deque()  # ordinals, in the order in which they come
        self._num_made = 0
        self._too_long_in_a_row = 0
        self._deaths: list[str] = []  # since the last prompt
        self._listed: set[int] = set()
        self._evals: list[Prompt] | None = None
        self._failure: TaskError | ModelError | None = None

    @property
    def fd(self) -> int:
        """Readable when there is something to take."""
        return self._process.fd

    @property
    def num_asked(self) -> int:
        """Ordinals that were asked for and are still to come."""
        return len(self._asked)

    @property
    def evals(self) -> Sequence[Prompt] | None:
        """The held-out prompts that can be used; None until they are there."""
        return self._evals

    def describe(self) -> str:
        """What is waited for, in words for the log; empty when nothing is."""
        if not self._ready:
            return f"the task's process is {self._stage}"
        return f"the task's process makes {len(self._asked)} prompts" if self._asked else ""

    def start(self, now: float) -> None:
        """Starts the helper process. Times are monotonic seconds."""
        self._ready = False
        self._stage = "starting"
        self._due_at = now + self._limits.start_s
        self._process.start()
        self._process.send(encode(self._setup))

    def stop(self) -> None:
        """Ends the helper process: nothing comes any more, and `fd` is never readable again."""
        self._process.kill()
        self._ready = False
        self._due_at = float("inf")

    def close(self) -> None:
        """As `stop`, and gives `fd` back."""
        self._process.close()

    def next_deadline(self) -> float:
        """When `take` has something to do at the latest, in monotonic seconds; infinity when never."""
        return self._due_at

    def ask(self, ordinals: Iterable[int], now: float) -> None:
        """Wants these training prompts. Each comes out of `take` once for each time it is asked for."""
        if wanted := list(ordinals):
            if self._ready and not self._asked:
                self._due_at = now + self._limits.example_s
            self._asked += wanted
            if self._ready:
                self._process.send(encode(PromptsWanted(wanted)))

    def take(self, now: float) -> list[PromptMade]:
        """What has come since the last call, in the order in which it was asked for.

        Raises TaskError or ModelError when the task cannot be made, when its process is lost again and again, or when
        too many of its examples cannot be used: the message names them.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return self._take(now)
        except (TaskError, ModelError) as error:
            self._failure = error
            raise

    def _take(self, now: float) -> list[PromptMade]:
        made: list[PromptMade] = []
        try:
            for message in self._process.receive(decode_from_helper):
                self._handle(message, made, now)
        except ProtocolError as error:
            made += self._lost(str(error), now)
        else:
            if self._process.ended:
                made += self._lost(self._process.ending(), now)
            elif now >= self._due_at:
                limit_s = self._limits.example_s if self._ready else self._limits.start_s
                made += self._lost(f"took longer than {limit_s:g} s, and its process was killed", now)
        return made

    # -- what comes ------------------------------------------------------------------------------------------------

    def _handle(self, message: HelperMessage, made: list[PromptMade], now: float) -> None:
        match message:
            case HelperStage():
                self._stage = message.what
                self._due_at = now + self._limits.start_s
            case HelperStarted():
                self._on_started(message, now)
            case HeldOutMade():
                self.held_out.append(message)
                self._due_at = now + self._limits.start_s
            case PromptMade():
                if not self._asked or self._asked[0] != message.ordinal:
                    raise ProtocolError(f"the task's pipe carries prompt {message.ordinal}, which is not the next one")
                self._asked.popleft()
                self._deaths.clear()
                self._due_at = now + self._limits.example_s if self._asked else float("inf")
                self._count(message)
                made.append(message)

    def _on_started(self, started: HelperStarted, now: float) -> None:
        if started.error:
            raise (ModelError if started.is_model_error else TaskError)(started.error)
        if self.started is None:
            self.started = started
            self._say_start(started)
        self._ready = True
        self._due_at = float("inf")
        if self._asked:
            self._due_at = now + self._limits.example_s
            self._process.send(encode(PromptsWanted(list(self._asked))))

    def _say_start(self, started: HelperStarted) -> None:
        for what in started.left_out:
            log.warning("left out of the data: %s", what)
        for made in self.held_out:
            if made.reason:
                log.warning("held-out example %d is left out: %s", made.index, made.reason)
        check_held_out([made.made() for made in self.held_out], self._setup.max_prompt_tokens)
        self.held_out = [made for made in self.held_out if not made.reason]
        prompts = [made.made() for made in self.held_out]
        self._evals = [prompt for prompt in prompts if isinstance(prompt, Prompt)]

    # -- what is left out ------------------------------------------------------------------------------------------

    def _count(self, made: PromptMade) -> None:
        """Counts and lists what is left out. Raises TaskError when it is too much."""
        self._num_made += 1
        if made.is_fatal:
            raise TaskError(made.reason)
        if made.too_long:
            self._count_too_long(made)
            return
        self._too_long_in_a_row = 0
        if not made.reason:
            return
        self.num_left_out += 1
        if made.index not in self._listed:
            self._listed.add(made.index)
            log.warning("training example %d is left out: %s", made.index, made.reason)
        if self.num_left_out > MAX_LEFT_OUT and self.num_left_out > MAX_LEFT_OUT_SHARE * self._num_made:
            raise TaskError(
                f"{self.num_left_out} of {self._num_made} training examples cannot be used, more than "
                f"{MAX_LEFT_OUT_SHARE:.0%}; the last is number {made.index}: {made.reason}; correct the data or "
                "the task"
            )

    def _count_too_long(self, made: PromptMade) -> None:
        self.num_too_long += 1
        self._too_long_in_a_row += 1
        if self.num_too_long <= LISTED_TOO_LONG:
            log.warning("training example %d is left out: %s", made.index, made.reason)
        elif self.num_too_long & (self.num_too_long - 1) == 0:
            log.warning("%d of %d training examples were too long so far", self.num_too_long, self._num_made)
        assert self.started is not None
        size = self.started.train_size
        # Two epochs less one example hold each example once, wherever they begin.
        if self._too_long_in_a_row >= (MAX_TOO_LONG if size is None else min(MAX_TOO_LONG, 2 * size - 1)):
            raise TaskError(
                f"{self._too_long_in_a_row} training examples in a row, the last of them number {made.index}, are all "
                f"longer than {self._setup.max_prompt_tokens} tokens (model.max_length - sampling.max_new_tokens); "
                "raise model.max_length"
            )

    # -- a helper that is lost -------------------------------------------------------------------------------------

    def _lost(self, why: str, now: float) -> list[PromptMade]:
        """Replaces the process. What it was at is left out. Raises TaskError when that is no remedy."""
        self._process.kill()
        if not self._ready:
            raise TaskError(f"task.path={self._setup.path}: {why} ({self._stage})")
        lost: list[PromptMade] = []
        culprit = "no example was asked for"
        if self._asked:
            ordinal = self._asked.popleft()
            assert self.started is not None
            index = example_index(ordinal, self._setup.seed, self.started.train_size)
            culprit = f"training example {index}"
            lost.append(PromptMade(ordinal, index, reason=why))
        self._deaths.append(f"{culprit}: {why}")
        if len(self._deaths) >= MAX_DEATHS:
            raise TaskError(
                f"the task's process was lost {len(self._deaths)} times without making a prompt in between: "
                f"{'; '.join(self._deaths)}; correct the task"
            )
        for made in lost:
            self._count(made)
        self._setup = replace(self._setup, is_restart=True)
        self.start(now)
        return lost
