"""Tasks whose examples misbehave by their index, as `faults` says."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from asyncrl.tasks.base import Example
from asyncrl.tasks.gsm8k import Gsm8k


def _surrogate(index: int) -> Example:
    return Example("1 \ud83d 2", {})


def _raise(index: int) -> Example:
    raise ValueError(f"record {index} is broken")


def _lookup(index: int) -> Example:
    return Example("q", {"answer": {}["gold"]})


def _exit(index: int) -> Example:
    sys.exit(0)


def _hard_exit(index: int) -> Example:
    os._exit(0)


def _killed(index: int) -> Example:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _block(index: int) -> Example:
    time.sleep(3600)
    raise AssertionError


def _swallow_everything(index: int) -> Example:
    while True:
        try:
            time.sleep(3600)
        except BaseException:  # noqa: BLE001 - as foreign code may
            continue


def _write_to_all_pipes(index: int) -> Example:
    for fd in range(1, 10):
        try:
            os.write(fd, b"\xc1" * 64)
        except OSError:
            continue
    return Example("q", {})


def _fork(index: int) -> Example:
    os.fork()
    return Example(f"{index}", {"index": index})


def _recurse(index: int) -> Example:
    return _recurse(index)


FAULTS: dict[str, Any] = {
    "surrogate": _surrogate,
    "raise": _raise,
    "lookup": _lookup,
    "exit": _exit,
    "hard_exit": _hard_exit,
    "killed": _killed,
    "block": _block,
    "swallow": _swallow_everything,
    "pipes": _write_to_all_pipes,
    "fork": _fork,
    "recurse": _recurse,
    "empty": lambda index: Example("", {}),
    "blank": lambda index: Example(" \n", {}),
    "none": lambda index: None,
    "text": lambda index: "a text",
    "number": lambda index: Example(7, {}),
    "bytes": lambda index: Example(b"q", {}),
    "no_messages": lambda index: Example([], {}),
    "no_role": lambda index: Example([{"content": "q"}], {}),
    "no_content": lambda index: Example([{"role": "user", "content": None}], {}),
    "content_parts": lambda index: Example([{"role": "user", "content": [{"type": "text", "text": "q"}]}], {}),
    "empty_question": lambda index: Example([{"role": "user", "content": " "}], {}),
    "system": lambda index: Example([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], {}),
    "payload_set": lambda index: Example("q", {"answer": {1}}),
    "payload_none": lambda index: Example("q", None),
    "unknown_token": lambda index: Example("<extra>", {}),
    "long": lambda index: Example("q" * 500, {}),
}


class Unruly:
    """Example n is the text n, unless `faults`, a dict of index (as text) or "all" → fault, says otherwise.

    constructor, eval_fault, reward_fault: faults of these. marks: folder where each process that is about to misbehave
    leaves a file, named by its process id; empty = none.
    """

    part_names = ("exact",)

    def __init__(
        self,
        size: int = 40,
        faults: dict[str, str] | None = None,
        constructor: str = "",
        evals: int = 2,
        eval_fault: str = "",
        reward_fault: str = "",
        marks: str = "",
    ):
        self.train_size = size
        self._faults = faults or {}
        self._evals = evals
        self._eval_fault = eval_fault
        self._reward_fault = reward_fault
        self._marks = marks
        self._misbehave(constructor)

    def _misbehave(self, fault: str, index: int = 0) -> Any:
        """What the fault returns, if it does; None without one."""
        if fault and self._marks:
            Path(self._marks, str(os.getpid())).touch()
        return FAULTS[fault](index) if fault else None

    def train_example(self, index: int) -> Example:
        fault = self._faults.get(str(index), self._faults.get("all", ""))
        return self._misbehave(fault, index) if fault else Example(f"{index}", {"index": index})

    def eval_examples(self, count: int) -> list[Example]:
        self._misbehave(self._eval_fault)
        return [Example(f"eval {index}", {"index": index}) for index in range(min(count, self._evals))]

    def reward(self, completion: str, payload: dict) -> dict[str, float]:
        self._misbehave(self._reward_fault)
        return {"exact": 0.5 + (len(completion) % 7) / 14}


class UnrulyFile(Gsm8k):
    """Records of a file, of which some lines are bad by themselves, and some that are not misbehave as examples."""

    part_names = ("exact",)

    def __init__(self, path: str, eval_path: str, faults: dict[str, str]):
        super().__init__(path, eval_path)
        self._faults = faults

    def train_example(self, index: int) -> Example:
        fault = self._faults.get(str(index), "")
        return FAULTS[fault](index) if fault else super().train_example(index)

    def reward(self, completion: str, payload: dict) -> dict[str, float]:
        return {"exact": (len(set(completion)) % 5) / 4}
