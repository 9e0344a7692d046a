"""Several tasks in one run, by weights.

    task:
      path: asyncrl.tasks.mix:Mix
      args:
        tasks:
          math: {path: "asyncrl.tasks.gsm8k:Gsm8k", args: {path: data/gsm8k.jsonl}, weight: 2}
          code: {path: "asyncrl.tasks.dataset:Dataset", args: {path: data/code.jsonl, rewards: {tests: my_tests:run}}}

Each third prompt is of code. Parts of the reward are named after their task, `math/exact`, so that every step and every
evaluation has the figures of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks.base import Example, Task, load_task
from asyncrl.tasks.data.order import Shares, epoch_index
from asyncrl.tasks.data.overlap import HeldOutPrompts
from asyncrl.tasks.data.results import awaited
from asyncrl.tasks.data.wording import nearest
from asyncrl.types import REWARD_PART_NAME, REWARD_PART_NAME_RULE

NAME_KEY = "task_name"  # of payloads: which task made the prompt
_KEYS = ("path", "args", "weight", "evals")


@dataclass(frozen=True, slots=True)
class _Member:
    """One task of a mix: its weight among the prompts, and how many held-out examples it gives if that is said."""

    name: str
    task: Task
    weight: float
    evals: int | None


class Mix:
    """Prompts of several tasks, in the proportions of their weights: in the first n prompts each has its share of n.

    tasks: name -> {path, args, weight (1), evals}, where path and args are those of a task. With weight 0 it is only
    evaluated. evals: its held-out examples in each evaluation; tasks without it divide the rest of eval.prompts
    equally. seed: of the order of each task, which is shuffled in epochs of its own. The mix itself is endless.

    What a held-out example of one task asks, no task trains on: once `eval_examples` was called, such an example is
    refused by `train_example`, and so is left out.
    """

    train_size = None
    part_names: tuple[str, ...] | None = None

    def __init__(self, tasks: Mapping[str, Any], *, seed: int = 0):
        if not isinstance(tasks, Mapping) or not tasks:
            raise TaskError(f"task.args.tasks must name tasks, each with its path, args and weight, not {tasks!r:.80}")
        self._members = [_member(name, spec) for name, spec in tasks.items()]
        self._by_name = {member.name: member for member in self._members}
        self._trained = [member for member in self._members if member.weight > 0]
        if not self._trained:
            raise TaskError("every task of task.args.tasks has weight 0: none is left to train on")
        self._shares = Shares([member.weight for member in self._trained])
        self._seed = seed
        self._held_out = HeldOutPrompts()
        names = [(member.name, getattr(member.task, "part_names", None)) for member in self._members]
        if all(parts is not None for _, parts in names):
            self.part_names = tuple(f"{name}/{part}" for name, parts in names for part in parts or ())

    def train_example(self, index: int) -> Example:
        """See `Task.train_example`."""
        who, number = self._shares.of(index)
        member, size = self._trained[who], self._sizes[who]
        place = number if size is None else epoch_index(number, size, "mix", self._seed, member.name)
        example = member.task.train_example(place)
        if (whose := self._held_out.asked_by(example.prompt)) is not None:
            raise TaskError(f"of the task {member.name}: it asks what {whose} asks, and is not trained on")
        return _marked(member, example)

    def eval_examples(self, count: int) -> list[Example]:
        """As many of each task as it says, and equal numbers of the others; see `Task.eval_examples`."""
        said = [member.evals for member in self._members]
        if (asked := sum(number or 0 for number in said)) > count:
            raise TaskError(
                f"the tasks of the mix ask for {asked} held-out examples, and eval.prompts={count}: raise "
                "that, or lower evals of a task"
            )
        found = [member.task.eval_examples(count if member.evals is None else member.evals) for member in self._members]
        counts = eval_counts(count, said, [len(examples) for examples in found])
        chosen = [
            (member, example)
            for member, examples, number in zip(self._members, found, counts, strict=True)
            for example in examples[:number]
        ]
        for member, example in chosen:
            self._held_out.add(example.prompt, f"a held-out example of the task {member.name}")
        return [_marked(member, example) for member, example in chosen]

    @property
    def left_out(self) -> list[str]:
        """What the tasks left out of their data, with the name of each."""
        return [f"{member.name}: {what}" for member in self._members for what in getattr(member.task, "left_out", ())]

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """The reward of the task that made the prompt, with its name before each part's."""
        member = self._by_name.get(payload.get(NAME_KEY, ""))
        if member is None:
            raise RewardError(f"the payload is of the task {payload.get(NAME_KEY)!r:.60}, which is none of the mix")
        own = {key: value for key, value in payload.items() if key != NAME_KEY}
        parts = awaited(member.task.reward(completion, own))
        if not isinstance(parts, Mapping):
            raise RewardError(f"{member.name}: reward must return a dict of named parts, not {parts!r:.200}")
        return {f"{member.name}/{part}": value for part, value in parts.items()}

    @cached_property
    def _sizes(self) -> list[int | None]:
        """Training examples of each task with a weight, None where they are endless."""
        sizes = [member.task.train_size for member in self._trained]
        for member, size in zip(self._trained, sizes, strict=True):
            if size is not None and size < 1:
                raise TaskError(f"the task {member.name} of the mix has train_size={size}: not 1 or more, nor None")
        return sizes


def eval_counts(count: int, said: Sequence[int | None], available: Sequence[int]) -> list[int]:
    """How many held-out examples each task gives: what is said of it, the others equal parts of what is left.

    Where one has fewer, the others give more.
    """
    counts = [0 if number is None else min(number, some) for number, some in zip(said, available, strict=True)]
    left = count - sum(number or 0 for number in said)
    others = sorted((who for who, number in enumerate(said) if number is None), key=lambda who: available[who])
    for place, who in enumerate(others):
        counts[who] = min(available[who], -(-left // (len(others) - place)))
        left -= counts[who]
    return counts


def _member(name: object, spec: object) -> _Member:
    """One entry of `tasks`. Raises TaskError naming what is wrong with it."""
    place = f"task.args.tasks.{name}"
    if not isinstance(name, str) or not REWARD_PART_NAME.fullmatch(name):
        raise TaskError(f"{place}: a name has {REWARD_PART_NAME_RULE}: metrics are named after it")
    if not isinstance(spec, Mapping) or not isinstance(spec.get("path"), str):
        raise TaskError(f"{place} must be a mapping with the path of a task, its args and weight, not {spec!r:.80}")
    if unknown := [str(key) for key in spec if key not in _KEYS]:
        raise TaskError(f"{place} has no {unknown[0]}{nearest(unknown[0], _KEYS)}")
    args = spec.get("args") or {}
    weight, evals = spec.get("weight", 1.0), spec.get("evals")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise TaskError(f"{place}: weight={weight!r:.60} must be a number, 0 or more")
    if evals is not None and (isinstance(evals, bool) or not isinstance(evals, int) or evals < 0):
        raise TaskError(f"{place}: evals={evals!r:.60} must be a number of held-out examples")
    if not isinstance(args, Mapping):
        raise TaskError(f"{place}: args={args!r:.80} must be a mapping of arguments")
    try:
        return _Member(name, load_task(spec["path"], dict(args)), float(weight), evals)
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from error


def _marked(member: _Member, example: Example) -> Example:
    """The example, with the name of its task in the payload."""
    if NAME_KEY in example.payload:
        raise TaskError(f"the payload of the task {member.name} has a {NAME_KEY} of its own, where its name must stand")
    return replace(example, payload={**example.payload, NAME_KEY: member.name})
