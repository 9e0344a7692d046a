"""Kinds of reward parts that the reward worker computes itself: lengths, form, and a function of the user's own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from asyncrl.errors import ConfigError, RewardError, TaskError
from asyncrl.rewards.base import Part, Sample
from asyncrl.tasks.base import find_function
from asyncrl.tasks.data.results import as_number, awaited
from asyncrl.tasks.shaping import has_form, length_penalty, overlong_penalty


@dataclass(frozen=True)
class Overlong(Part):
    """0 up to max_tokens - margin tokens, from there linearly down to -1 at max_tokens (`shaping.overlong_penalty`)."""

    kind: ClassVar[str] = "overlong"

    max_tokens: int
    margin: int

    def check(self) -> None:
        """Raises ConfigError for bounds that no length can have."""
        _as_config_error(overlong_penalty, 0, self.max_tokens, self.margin)

    def value(self, sample: Sample) -> float:
        """A penalty from -1 to 0."""
        return overlong_penalty(_tokens(sample), self.max_tokens, self.margin)


@dataclass(frozen=True)
class Length(Part):
    """0 for no tokens, linearly down to -1 at max_tokens (`shaping.length_penalty`)."""

    kind: ClassVar[str] = "length"

    max_tokens: int

    def check(self) -> None:
        """Raises ConfigError for a bound that no length can have."""
        _as_config_error(length_penalty, 0, self.max_tokens)

    def value(self, sample: Sample) -> float:
        """A penalty from -1 to 0."""
        return length_penalty(_tokens(sample), self.max_tokens)


@dataclass(frozen=True)
class Format(Part):
    """1 when the whole completion, without blanks at its ends, matches the regular expression `pattern`; else 0."""

    kind: ClassVar[str] = "format"

    pattern: str

    def check(self) -> None:
        """Raises ConfigError when `pattern` is no regular expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern={self.pattern!r} is no regular expression: {error}") from None

    def value(self, sample: Sample) -> float:
        """1.0 or 0.0."""
        return has_form(sample.completion, self.pattern)


@dataclass(frozen=True)
class UserRule(Part):
    """The value that a function of the user's own returns: `function(completion, payload, **args)`.

    path: `module:function`; modules in the current directory can be imported. args: the function's keyword arguments.
    To say "this cannot be scored", the function raises. It may be an `async def`.
    """

    kind: ClassVar[str] = "rule"

    path: str
    args: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ConfigError unless `path` names a module and a function."""
        module, separator, function = self.path.partition(":")
        if not (module and separator and function):
            raise ConfigError(f"path={self.path!r} must be `module:function`")

    def prepare(self) -> None:
        """Imports the function. Raises ConfigError when there is none, or when it does not take what it is given."""
        function = self._function
        try:
            inspect.signature(function).bind("completion", {}, **self.args)
        except TypeError as error:
            raise ConfigError(
                f"{self.path} is called as function(completion, payload, **args) with args={self.args}: {error}"
            ) from None
        except ValueError:
            return  # written in C, without a signature: the first reward shows it

    @cached_property
    def _function(self) -> Callable[..., Any]:
        try:
            return find_function("path", self.path)
        except TaskError as error:
            raise ConfigError(str(error)) from None

    def value(self, sample: Sample) -> float:
        """What the function returns. Raises RewardError when that is no number."""
        value = awaited(self._function(sample.completion, sample.payload, **self.args))
        number = as_number(value)
        if number is None:
            raise RewardError(f"{self.path} must return a number, not {value!r:.200}")
        return number


def _tokens(sample: Sample) -> int:
    """Length of the completion in tokens. Raises RewardError when it is not known."""
    if sample.num_tokens is None:
        raise RewardError("the number of tokens of this completion is not known")
    return sample.num_tokens


def _as_config_error(function: Callable[..., float], *arguments: float) -> None:
    try:
        function(*arguments)
    except ValueError as error:
        raise ConfigError(str(error).replace("max_length", "max_tokens")) from None
