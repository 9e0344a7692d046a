"""The helper process: makes the task, and prompts of its examples, so that whatever a task does stays in here.

`pipe` says what comes and goes. The daemon kills the whole process group when an example takes too long. Nothing here
imports torch or vllm.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from asyncrl.errors import ModelError, TaskError
from asyncrl.host.pipes import private_pipes, read_frame, write_frame
from asyncrl.host.processes import tie_to_parent
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.tasks.base import Task, load_task
from asyncrl.tasks.pipe import (
    HeldOutMade,
    HelperSetup,
    HelperStage,
    HelperStarted,
    PromptMade,
    decode_setup,
    decode_wanted,
    encode,
)
from asyncrl.tasks.prompts import LeftOut, Prompt, PromptSource, guarded, in_one_line
from asyncrl.tasks.rendering import NoChatTemplate
from asyncrl.tasks.shuffle import example_index

MAX_LISTED = 1000  # records that a task left out of its data


def main() -> None:
    """Serves the daemon until that closes the pipe."""
    if not tie_to_parent():
        return
    jobs, results = private_pipes()
    _go_first_when_memory_is_short()
    frame = read_frame(jobs)
    if frame is None:
        return
    setup = decode_setup(frame)
    level = logging.ERROR if setup.is_restart else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    helper = _Helper(results, setup)
    if not helper.start():
        return
    while (frame := read_frame(jobs)) is not None:
        for ordinal in decode_wanted(frame).ordinals:
            helper.make(ordinal)


class _Helper:
    """The task and its prompts."""

    def __init__(self, results: int, setup: HelperSetup) -> None:
        self._results = results
        self._setup = setup
        self._owner = os.getpid()
        self._source: PromptSource | None = None
        self._train_size: int | None = None

    def start(self) -> bool:
        """Makes everything, and tells the daemon that it is there, or why not."""
        try:
            started = self._start()
        except (TaskError, ModelError) as error:
            started = HelperStarted(_printable(error), is_model_error=isinstance(error, ModelError))
        self._write(started)
        return not started.error

    def _start(self) -> HelperStarted:
        setup = self._setup
        self._say(f"making the task {setup.path}")
        task: Task = guarded(f"task.path={setup.path}", lambda: load_task(setup.path, dict(setup.args)))
        names = guarded("part_names", lambda: getattr(task, "part_names", None))
        part_names = None if names is None else [str(name) for name in names]
        if not setup.model_path:
            return HelperStarted(part_names=part_names)
        self._say("loading the tokenizer")
        tokenizer = load_tokenizer(setup.model_path)
        self._say("reading train_size")
        self._source = guarded(
            "train_size",
            lambda: PromptSource(
                task,
                tokenizer,
                setup.seed,
                setup.max_prompt_tokens,
                max_payload_bytes=setup.max_payload_bytes,
                num_rows=setup.num_rows,
            ),
        )
        self._train_size = self._source.train_size
        left_out = guarded("left_out", lambda: [in_one_line(what) for what in getattr(task, "left_out", ())])
        if len(left_out) > MAX_LISTED:
            left_out = [*left_out[:MAX_LISTED], f"and {len(left_out) - MAX_LISTED} more"]
        if setup.num_evals:
            self._say(f"making the held-out examples: eval_examples({setup.num_evals})")
            for place, made in enumerate(self._source.held_out(setup.num_evals)):
                if setup.is_restart:
                    continue  # the daemon has it; what it asks is what training examples are compared with
                self._write(HeldOutMade(ordinal=place, **self._fields(made, place)))
        return HelperStarted(train_size=self._train_size, part_names=part_names, left_out=left_out)

    def make(self, ordinal: int) -> None:
        """Makes one training prompt, and sends it or the reason why there is none."""
        assert self._source is not None, "it was started with a tokenizer"
        index = example_index(ordinal, self._setup.seed, self._train_size)
        try:
            made = self._source.make(ordinal)
        except NoChatTemplate as error:
            self._write(PromptMade(ordinal, index, reason=_printable(error), is_fatal=True))
            return
        self._write(PromptMade(ordinal=ordinal, **self._fields(made, index)))

    def _fields(self, made: Prompt | LeftOut, index: int) -> dict[str, Any]:
        if isinstance(made, LeftOut):
            return {"index": index, "reason": _printable(made.reason), "too_long": made.too_long}
        text = ""
        if self._setup.with_text:
            assert self._source is not None
            text = self._source.encoder.text_of(made.token_ids.tolist())
        token_ids, payload = made.token_ids.tobytes(), made.payload
        return {
            "index": index, "token_ids": token_ids, "payload": payload, "text": text, "user_text": made.user_text,
        }  # fmt: skip

    def _say(self, what: str) -> None:
        self._write(HelperStage(what))

    def _write(self, message: HelperStage | HelperStarted | PromptMade) -> None:
        if os.getpid() != self._owner:
            os._exit(1)  # a fork made in the task came back here; only the original may answer
        write_frame(self._results, encode(message))


def _printable(error: object) -> str:
    """A message that can travel; it may be of several lines."""
    text = str(error) or type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()[:4000]


def _go_first_when_memory_is_short() -> None:
    """If the host runs out of memory, this process goes before the daemon does."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)  # the daemon is gone
