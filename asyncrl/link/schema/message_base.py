"""The base of all messages, and the registry that finds a class by the code in a frame's header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar, dataclass_transform

from asyncrl.link.wire_types import Number

_REGISTRY: dict[int, type[Message]] = {}


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages. `wire_code` goes into the frame header."""

    wire_code: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class RunMessage(Message):
    """Base of the messages that belong to one run epoch: to one life of the learner. See GeneratorSession.receive."""

    run_epoch: Number


M = TypeVar("M", bound=Message)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message(code: int) -> Callable[[type[M]], type[M]]:
    """Class decorator: makes a frozen dataclass and registers it under `code`."""

    def register(cls: type[M]) -> type[M]:
        cls = dataclass(frozen=True, slots=True)(cls)
        cls.wire_code = code
        assert code not in _REGISTRY, f"message code {code} taken by {_REGISTRY[code].__name__}"
        _REGISTRY[code] = cls
        return cls

    return register


def message_types() -> dict[int, type[Message]]:
    """All message classes by code."""
    return dict(_REGISTRY)
