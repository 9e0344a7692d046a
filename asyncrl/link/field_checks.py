"""Run-time checks of message fields, made once per class from the annotations of the dataclass."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from asyncrl.link.messages import Message


class Mismatch(Exception):
    """`got` breaks `rule` at `where` inside a field."""

    def __init__(self, rule: str, got: Any) -> None:
        super().__init__(rule)
        self.rule, self.got, self.where = rule, got, ""


Check = Callable[[Any], Any]  # returns the value, converted where the rule allows it, or raises Mismatch


@dataclasses.dataclass(frozen=True)
class PlannedField:
    name: str
    check: Check


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one message class is checked. The first `required` fields have no default."""

    name: str
    fields: tuple[PlannedField, ...]
    required: int


@functools.cache
def plan_of(cls: type[Message]) -> Plan:
    """The plan of a message class."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    missing = dataclasses.MISSING
    required = sum(field.default is missing and field.default_factory is missing for field in fields)
    planned = tuple(PlannedField(field.name, _check_for(hints[field.name])) for field in fields)
    return Plan(cls.__name__, planned, required)


def shown(value: Any) -> str:
    """A value for an error message, never long."""
    if isinstance(value, (list, dict, bytes, memoryview)):
        return f"{type(value).__name__} of length {len(value)}"
    return f"{value!r:.60}"


def _check_for(hint: Any) -> Check:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _anything
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is types.UnionType:
        (inner,) = (_check_for(arg) for arg in args if arg is not types.NoneType)
        return functools.partial(_optional, inner)
    if origin is list:
        return functools.partial(_list, _check_for(args[0]))
    if origin is dict:
        assert args[0] is str, f"maps have string keys, not {hint}"
        # A metric may be NaN: to refuse the message would hide the failure that it reports.
        return functools.partial(_dict, _number if args[1] is float else _check_for(args[1]))
    raise AssertionError(f"no check for the annotation {hint}")


def _anything(value: Any) -> Any:
    return value


def _optional(inner: Check, value: Any) -> Any:
    return None if value is None else inner(value)


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise Mismatch("an integer", value)


def _number(value: Any) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # msgpack integers have 64 bits at most: no overflow
    raise Mismatch("a number", value)


def _finite(value: Any) -> float:
    value = _number(value)
    if math.isfinite(value):
        return value
    raise Mismatch("a finite number", value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Mismatch("true or false", value)


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise Mismatch("a string", value)


def _bytes(value: Any) -> bytes | memoryview:
    if isinstance(value, (bytes, memoryview)):
        return value
    raise Mismatch("bytes", value)


_SCALARS: dict[Any, Check] = {int: _int, float: _finite, bool: _bool, str: _str, bytes: _bytes}


def _list(inner: Check, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Mismatch("a list", value)
    return value if inner is _anything else _each(inner, enumerate(value), [None] * len(value))


def _dict(inner: Check, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatch("a map", value)
    for name in value:
        if not isinstance(name, str):
            raise Mismatch("a map with string keys", name)
    return value if inner is _anything else _each(inner, value.items(), {})


def _each(inner: Check, items: Iterable[tuple[Any, Any]], checked: Any) -> Any:
    for place, item in items:
        try:
            checked[place] = inner(item)
        except Mismatch as bad:
            bad.where = f"[{place!r:.40}]{bad.where}"
            raise
    return checked
