"""The range of a message field: the rules that stand in its annotation, and the check that each of them is.

    Annotated[int, Within(0, 9)]        a number from 0 to 9; NaN and infinity are never within
    Annotated[list[X], AtMost(9)]       a list, tuple, map, text or bytes of at most 9 items, characters or bytes
    Annotated[str, Printed(9)]          a text for people: cut to 9 characters where it is sent, and made printable
                                        where it is received, so that no log or terminal obeys it
    Annotated[str, Line(1, 9)]          a text of 1 to 9 printable characters; others are refused
    Annotated[LeaseKey, Fields(...)]    a record whose class can bear no rules: they are given here by field

Rules are checked on both ways. What they refuse is never built: `schema.field_checks` looks at the length of a list
before it looks at its first item.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from asyncrl.host.printing import printable


class BrokenRule(Exception):
    """A value is not what its rule allows: `rule` in words, to follow "must be"."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Within:
    """A number in [low, high]."""

    low: float
    high: float

    def check(self, value: float) -> None:
        """Raises BrokenRule."""
        if not self.low <= value <= self.high:
            raise BrokenRule(f"from {self.low} to {self.high}")


@dataclass(frozen=True, slots=True)
class AtMost:
    """At most so many items, characters or bytes."""

    most: int

    def check(self, value: Sized) -> None:
        """Raises BrokenRule."""
        if len(value) > self.most:
            raise BrokenRule(f"of at most {self.most}")


@dataclass(frozen=True, slots=True)
class Line:
    """A text of `least` to `most` printable characters; `spaces` says whether a space is one of them."""

    least: int
    most: int
    spaces: bool = True

    def check(self, value: str) -> None:
        """Raises BrokenRule."""
        fits = self.least <= len(value) <= self.most and value.isprintable()
        if not fits or not (self.spaces or " " not in value):
            spaces = "" if self.spaces else " without a space"
            raise BrokenRule(f"{self.least} to {self.most} printable characters{spaces}")


@dataclass(frozen=True, slots=True)
class Printed:
    """A text of at most `most` characters for people."""

    most: int

    def sent(self, value: str) -> str:
        """The text, cut to what may be sent."""
        return value if len(value) <= self.most else value[: self.most - 1] + "…"

    def received(self, value: str) -> str:
        """The text without anything that a terminal would obey. Raises BrokenRule when it is too long."""
        if len(value) > self.most:
            raise BrokenRule(f"of at most {self.most} characters")
        return printable(value)


@dataclass(frozen=True, slots=True)
class Fields:
    """The annotations of a record's fields, by name, in place of its own."""

    hints: tuple[tuple[str, Any], ...]


Rule = Within | AtMost | Line | Printed
