"""What a task is: prompts in, rewards out. Also how a task is found by its import path.

A task of your own is one class in a module that can be imported from where the daemons are started:

    # my_module.py
    from asyncrl.tasks.base import Example

    class Reverse:
        train_size = None  # endless: every index has an example

        def __init__(self, letters: int = 4):
            self.letters = letters

        def train_example(self, index: int) -> Example:
            word = "".join(chr(97 + (index // 26**place) % 26) for place in range(self.letters))
            return Example(prompt=f"{word} backwards is ", payload={"answer": word[::-1]})

        def eval_examples(self, count: int) -> list[Example]:
            return [Example(f"{'xyz'[i % 3] * self.letters} backwards is ", {"answer": "..."}) for i in range(count)]

        def reward(self, completion: str, payload: dict) -> dict[str, float]:
            return {"exact": float(completion.strip() == payload["answer"])}

and is used with `task.path=my_module:Reverse task.args.letters=6`. The learner asks for examples, the reward workers
of every generator for rewards: data files are needed beside the learner only, unless the constructor opens them.

A class may say in `part_names` what its parts are called, here `part_names = ("exact",)`: then a name in reward.weights
that is none of them is noticed at the start, and not only in the first reward.

A task that reads its data from files may leave out records that cannot be used, and name them in `left_out`, a list of
texts with place and reason each: the learner logs them at the start. Whatever is wrong with a single example later (it
raises, exits, blocks, is too long, or holds what cannot travel) leaves out that example and is logged with its number.

Nothing here imports torch, numpy or transformers: a reward worker must start fast.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks.data.results import as_number, awaited

_T = TypeVar("_T")

Messages = list[dict[str, str]]
TASK_MEMBERS = ("train_size", "train_example", "eval_examples", "reward")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, and what its reward needs.

    prompt is plain text, or chat messages (`{"role": ..., "content": ...}`) for the tokenizer's chat template.
    payload travels with the lease: texts, numbers, booleans, None, bytes, and lists and dicts of them, with texts for
    keys. Numbers of numpy are converted, tuples become lists, and anything else is refused by its key.
    chat_template_args are handed to the chat template, such as {"enable_thinking": False}.
    """

    prompt: str | Messages
    payload: dict[str, Any] = field(default_factory=dict)
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Prompts in, rewards out. Everything is a pure function of the arguments and the constructor's arguments."""

    @property
    def train_size(self) -> int | None:
        """Number of training examples; None = endless."""

    def train_example(self, index: int) -> Example:
        """Training example `index`, 0 <= index < train_size. The order is shuffled by the caller."""

    def eval_examples(self, count: int) -> list[Example]:
        """The first `count` held-out examples (fewer if there are fewer); none of them is ever trained on."""

    def reward(self, completion: str, payload: dict[str, Any]) -> dict[str, float]:
        """Named parts of the reward of one completion; the reward is their sum, weighted where reward.weights says so.

        To say "this cannot be scored", raise: the rollout is then counted as failed and never trained on. It may be
        an `async def`; completions of one worker are scored one after the other all the same.
        """


def load_task(path: str, args: dict[str, Any]) -> Task:
    """Makes the task that the import path `module:Class` names, with `args` for its constructor.

    Modules in the current directory can be imported. Raises TaskError, naming what is wrong: path, module, class, an
    argument, or a missing member.
    """
    module_name, separator, class_name = path.partition(":")
    if not (separator and module_name and class_name):
        raise TaskError(f"task.path={path!r} must be `module:Class`, for example asyncrl.tasks.gsm8k:Gsm8k")
    task_class = find_class("task.path", path)
    missing = [name for name in TASK_MEMBERS if not hasattr(task_class, name)]
    task: Task = _construct(path, task_class, args)
    # Instance attributes count too. Only what the class lacks is looked up: a property may read a data file.
    missing = [name for name in missing if not hasattr(task, name)]
    if missing:
        raise TaskError(
            f"task.path={path}: {task_class.__name__} has no {', '.join(missing)}; "
            f"a task has {', '.join(TASK_MEMBERS)} (see asyncrl.tasks.base)"
        )
    return task


def checked_reward(task: Task, completion: str, payload: dict[str, Any]) -> dict[str, float]:
    """The parts of the reward of one completion, each a finite float, and their sum too.

    None at all is for tasks that have part_names: reward.parts make the whole reward then. Raises RewardError when the
    task returned anything else; lets through what the task raises.
    """
    parts = awaited(task.reward(completion, payload))
    if parts == {} and hasattr(task, "part_names"):
        return {}
    checked = parts if _is_plain(parts) else _as_floats(parts)
    if not math.isfinite(sum(checked.values())):
        raise RewardError(f"reward parts must be finite, and so must their sum: {_shown(checked)}")
    return checked


def _is_plain(parts: object) -> bool:
    """Nothing to convert? The usual case, and cheaper than converting."""
    if type(parts) is not dict or not parts:
        return False
    return all(type(name) is str and type(value) is float for name, value in parts.items())


def _as_floats(parts: object) -> dict[str, float]:
    if not isinstance(parts, dict) or not parts:
        raise RewardError(f"reward must return a dict of named parts such as {{'exact': 1.0}}, not {_shown(parts)}")
    checked: dict[str, float] = {}
    for name, value in parts.items():
        number = as_number(value)
        if not isinstance(name, str) or number is None:
            raise RewardError(f"reward part {_shown(name)} must be a number under a string name, not {_shown(value)}")
        checked[str(name)] = number
    return checked


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def find_class(key: str, path: str) -> type:
    """The class that the import path `module:Class` names; `key` is what messages call it. Raises TaskError.

    Modules in the current directory can be imported.
    """
    return _find(key, path, "class", _is_class)


def find_function(key: str, path: str) -> Callable[..., Any]:
    """The function that the import path `module:function` names; as `find_class` otherwise."""
    return _find(key, path, "function", _is_function)


def _is_class(found: object) -> TypeGuard[type]:
    return isinstance(found, type)


def _is_function(found: object) -> TypeGuard[Callable[..., Any]]:
    return callable(found)


def _find(key: str, path: str, what: str, fits: Callable[[object], TypeGuard[_T]]) -> _T:
    module_name, _, name = path.partition(":")
    # Last, so that a stray file here cannot take the place of an installed module.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    module = _import(f"{key}={path}", module_name)
    found = getattr(module, name, None)
    if not fits(found):
        known = [other for other, value in vars(module).items() if fits(value)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TaskError(f"{key}={path}: module {module_name} has no {what} {name}{hint}")
    return found


def _import(setting: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TaskError(
                f"{setting}: there is no module {error.name}; it must be installed, on PYTHONPATH, or a file "
                f"in {os.getcwd()}"
            ) from None
        raise TaskError(f"{setting}: {module_name} needs the module {error.name}, install it") from error
    except Exception as error:
        raise TaskError(f"{setting}: importing {module_name} raised {type(error).__name__}: {error}") from error


def _check_texts(task_class: type, args: dict[str, Any]) -> None:
    """Raises TaskError for an argument that the constructor declares as text and YAML took for something else."""
    try:
        declared = inspect.signature(task_class, eval_str=True).parameters
    except (NameError, TypeError, AttributeError):
        return  # declared with names that are not there, which Python allows
    for name, value in args.items():
        is_text = name in declared and declared[name].annotation in (str, str | None)
        if is_text and not isinstance(value, str) and value is not None:
            raise TaskError(
                f"task.args.{name}={value!r} is text for {task_class.__name__}, and YAML reads it as "
                f"{type(value).__name__}; quote it, for example task.args.{name}=\"'1.10'\""
            )


def _construct(path: str, task_class: type, args: dict[str, Any]) -> Any:
    signature = inspect.signature(task_class)
    try:
        signature.bind(**args)
    except TypeError as error:
        accepted = ", ".join(map(str, signature.parameters.values())) or "no arguments"
        raise TaskError(f"task.args={args}: {error}; {task_class.__name__} takes {accepted}") from None
    _check_texts(task_class, args)
    try:
        return task_class(**args)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"task.args={args}: {path} raised {type(error).__name__}: {error}") from error
