r"""Reward functions that say by their signature what they need, and those that are built in.

    rewards:
      exact: exact                                    # built in, by its name
      right: {kind: regex, pattern: "answer is (\d+)"}
      style: my_module:style                          # def style(completion, answer, topic): ...
      judge: {path: "my_module:judge", args: {strict: true}}

A function gets by name only what its signature asks for: `completion`, `prompt` (a text), `messages`, `answer`, columns
of the record, and all columns with `**columns`. It may be an `async def`; those of one completion run at once.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks.base import find_function
from asyncrl.tasks.data.answers import answer_texts, last_number
from asyncrl.tasks.data.results import as_number, awaited
from asyncrl.tasks.data.wording import nearest
from asyncrl.types import REWARD_PART_NAME, REWARD_PART_NAME_RULE

GIVEN = ("completion", "prompt", "messages", "answer")  # what a function may ask for beside columns
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NUMBERS = (float, int, bool, "float", "int", "bool")  # what an annotation says


# -- built in ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """1 where the completion, without blanks around it, is the answer, or one of a list of them."""

    def check(self, answer: object) -> None:
        """Raises TaskError with the reason for an answer that nothing can be compared with."""
        answer_texts(answer)

    def __call__(self, completion: str, answer: Any) -> float:
        """1 or 0, as the class says."""
        return float(completion.strip() in answer_texts(answer))


@dataclass(frozen=True)
class Number(Exact):
    """1 where the last number of the completion is the last one of the answer, or of one of a list of them."""

    def check(self, answer: object) -> None:
        """As that of `Exact`; each answer must hold a number."""
        if any(last_number(text) is None for text in answer_texts(answer)):
            raise TaskError(f"has no number in its answer: {str(answer)[-80:]!r}")

    def __call__(self, completion: str, answer: Any) -> float:
        """1 or 0, as the class says."""
        written = last_number(completion)
        return float(written is not None and written in [last_number(text) for text in answer_texts(answer)])


@dataclass(frozen=True)
class Regex(Exact):
    """1 where what the pattern's first group holds in its last match is the answer, or one of a list of them."""

    pattern: str

    def __post_init__(self) -> None:
        """Raises TaskError for a pattern that is none, or that has no group."""
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, TypeError) as error:
            raise TaskError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
        if not groups:
            raise TaskError(f"pattern={self.pattern!r} needs a group around what is compared, such as (.*)")

    def __call__(self, completion: str, answer: Any) -> float:
        """1 or 0, as the class says."""
        found = [match[1] for match in re.finditer(self.pattern, completion) if match[1] is not None]
        return float(bool(found) and found[-1].strip() in answer_texts(answer))


BUILT_IN: dict[str, Callable[..., Exact]] = {"exact": Exact, "number": Number, "regex": Regex}


# -- one function ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardFunction:
    """One entry of `rewards`: what is called, and which names it is given.

    needs: names without a default. takes: those with one, given where there is such a column. takes_all: `**columns`.
    """

    name: str
    call: Callable[..., Any]
    needs: frozenset[str]
    takes: frozenset[str] = frozenset()
    takes_all: bool = False
    args: Mapping[str, Any] = field(default_factory=dict)
    gives_number: bool = True  # for certain; else it may be several parts

    def columns(self, known: Collection[str]) -> set[str]:
        """The columns it is given, of those that records have. Raises TaskError where it needs another."""
        for name in sorted(self.needs - set(GIVEN) - set(known)):
            raise TaskError(
                f"task.args.rewards.{self.name} asks for {name}, which is neither given nor a column"
                f"{nearest(name, {*GIVEN, *known})}"
            )
        if self.takes_all:
            return set(known) - set(GIVEN)
        return (set(known) & (self.needs | self.takes)) - set(GIVEN)

    def asks_for(self, name: str) -> bool:
        """Whether it is to be given one of GIVEN."""
        return name in self.needs or name in self.takes

    def check_answer(self, answer: object) -> None:
        """Raises TaskError with the reason when there is no answer that it could compare with."""
        if answer is None and "answer" in self.needs:
            raise TaskError(
                f"has no answer, which the reward {self.name} asks for: name its column in task.args.answer, or let "
                "the chat messages end with the assistant's"
            )
        if isinstance(self.call, Exact):
            self.call.check(answer)

    def value(self, known: Mapping[str, Any]) -> Any:
        """What the function returns, given what is known: a number, named numbers, or a coroutine of either."""
        if missing := self.needs - known.keys():
            raise RewardError(f"{self.name} asks for {min(missing)}, which did not travel with the prompt")
        taken = self.needs | self.takes
        given = {name: value for name, value in known.items() if name in taken}
        if self.takes_all:
            given |= {name: value for name, value in known.items() if name not in GIVEN}
        return self.call(**{**given, **self.args})


def reward_functions(rewards: object) -> list[RewardFunction]:
    """The functions of `task.args.rewards`. Raises TaskError naming what is wrong with an entry."""
    if not isinstance(rewards, Mapping):
        raise TaskError(
            "task.args.rewards must name the parts of the reward, as {exact: exact} and {mine: my_module:fun} do, "
            f"or be {{}} where reward.parts alone makes the reward; not {rewards!r:.80}"
        )
    return [_function(name, spec) for name, spec in rewards.items()]


def _function(name: object, spec: object) -> RewardFunction:
    place = f"task.args.rewards.{name}"
    if not isinstance(name, str) or not REWARD_PART_NAME.fullmatch(name) or "/" in name:
        raise TaskError(f"{place}: a name has {REWARD_PART_NAME_RULE}: metrics are named after it")
    if isinstance(spec, str):
        spec = {"path": spec} if ":" in spec else {"kind": spec}
    if not isinstance(spec, Mapping) or ("kind" in spec) == ("path" in spec):
        raise TaskError(
            f"{place} must be one of {', '.join(BUILT_IN)}, or `module:function`, or a mapping with kind or path and "
            f"its arguments, not {spec!r:.100}"
        )
    return _built_in(place, name, spec) if "kind" in spec else _of_user(place, name, spec)


def _built_in(place: str, name: str, spec: Mapping[str, Any]) -> RewardFunction:
    kind = BUILT_IN.get(str(spec["kind"]))
    if kind is None:
        raise TaskError(
            f"{place}: there is no reward {spec['kind']!r:.60}{nearest(str(spec['kind']), BUILT_IN)}; "
            "a function of your own is `module:function`"
        )
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    try:
        call = kind(**arguments)
    except TypeError:
        wanted = "the argument pattern" if kind is Regex else "no arguments"
        raise TaskError(f"{place}: {spec['kind']} takes {wanted}, not {arguments}") from None
    except TaskError as error:
        raise TaskError(f"{place}: {error}") from None
    return RewardFunction(name, call, frozenset(("completion", "answer")))


def _of_user(place: str, name: str, spec: Mapping[str, Any]) -> RewardFunction:
    path, args = spec["path"], spec.get("args", {})
    if unknown := spec.keys() - {"path", "args"}:
        raise TaskError(f"{place} has {', '.join(map(str, sorted(unknown)))}; beside path there is args alone")
    if not isinstance(path, str) or not all(path.partition(":")):
        raise TaskError(f"{place}: path={path!r:.80} must be `module:function`")
    if not isinstance(args, Mapping):
        raise TaskError(f"{place}: args={args!r:.80} must be a mapping of arguments")
    call = find_function(place, path)
    try:
        signature = inspect.signature(call)
    except ValueError:
        raise TaskError(f"{place}: {path} has no signature to read; call it from a function of your own") from None
    parameters = signature.parameters.values()
    if positional := [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_ONLY]:
        raise TaskError(f"{place}: {path} takes {positional[0]} by position only, and arguments are given by name")
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    named = {each.name: each for each in parameters if each.kind in _BY_NAME}
    if not takes_all and (unknown := args.keys() - named.keys()):
        raise TaskError(f"{place}: {path} has no argument {min(unknown)}{nearest(str(min(unknown)), named)}")
    needs = {key for key, each in named.items() if each.default is inspect.Parameter.empty} - args.keys()
    takes = named.keys() - needs - args.keys()
    return RewardFunction(
        name, call, frozenset(needs), frozenset(takes), takes_all, dict(args), signature.return_annotation in _NUMBERS
    )


# -- all of them -------------------------------------------------------------------------------------------------------


def score(functions: Sequence[RewardFunction], known: Mapping[str, Any]) -> dict[str, float]:
    """The parts that the functions give; the coroutines among what they return run at once.

    Raises RewardError naming the function where one raises or returns anything but numbers.
    """
    values = [_named(function, partial(function.value, known)) for function in functions]
    waiting = [number for number, value in enumerate(values) if inspect.isawaitable(value)]
    if waiting:
        results = awaited(_all_of(values[number] for number in waiting))
        for number, result in zip(waiting, results, strict=True):
            values[number] = _named(functions[number], partial(_raised, result))
    parts: dict[str, float] = {}
    for function, value in zip(functions, values, strict=True):
        for name, part in _parts_of(function, value).items():
            if name in parts:
                raise RewardError(f"{function.name} gives the part {name}, and so does another of task.args.rewards")
            parts[name] = part
    return parts


async def _all_of(values: Iterable[Any]) -> list[Any]:
    """Their results, or what they raised instead: all end before the first of these is raised."""
    return await asyncio.gather(*values, return_exceptions=True)


def _raised(result: Any) -> Any:
    if isinstance(result, asyncio.CancelledError):
        raise RewardError("it was cancelled")
    if isinstance(result, BaseException):
        raise result
    return result


def _named(function: RewardFunction, call: Callable[[], Any]) -> Any:
    """What the call returns; what it raises is raised with the function's name."""
    try:
        return call()
    except RewardError as error:
        raise RewardError(f"{function.name}: {error}") from error
    except Exception as error:
        raise RewardError(f"{function.name} raised {type(error).__name__}: {error}") from error


def _parts_of(function: RewardFunction, value: object) -> dict[str, float]:
    number = as_number(value)
    if number is not None:
        return {function.name: number}
    parts = {name: as_number(each) for name, each in value.items()} if isinstance(value, Mapping) else {}
    found = {name: each for name, each in parts.items() if isinstance(name, str) and each is not None}
    if not parts or len(found) < len(parts):
        raise RewardError(f"{function.name} must return a number, or a dict of named numbers, not {value!r:.200}")
    return found
