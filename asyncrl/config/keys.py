"""The catalogue of configuration keys, read off the sections of `asyncrl.config.schema.Config`.

Standard library only: `--help` is made from it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from asyncrl.config import Config
from asyncrl.config.declaration import Bounds, IfChanged

TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    list[int]: "list of integers",
    list[float]: "list of numbers",
    list[str]: "list of texts",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key as it is declared."""

    name: str  # dotted, as written on the command line
    section: str
    sentence: str
    type: Any
    default: Any
    bounds: Bounds
    if_changed: IfChanged  # what becomes of a run that is resumed with another value
    shared: bool  # learner and generator must have the same value

    @property
    def rule(self) -> str:
        """What values are allowed, in words; empty when every value of the type is."""
        bounds = self.bounds
        words = (("at least", bounds.minimum), ("above", bounds.above), ("at most", bounds.maximum))
        parts = [f"{word} {bound}" for word, bound in words if bound is not None]
        if bounds.choices:
            parts.append("one of " + ", ".join(bounds.choices))
        return " and ".join(parts)

    @property
    def type_name(self) -> str:
        """The type in words."""
        return TYPE_NAMES.get(self.type, "mapping")

    @property
    def type_and_rule(self) -> str:
        """The type in words, and what values of it are allowed."""
        return f"{self.type_name}, {self.rule}" if self.rule else self.type_name

    def refusal(self, name: str, value: object, place: str, rule: str) -> str:
        """The message for a value that breaks `rule`: with value, place, rule, default and sentence.

        name is this key's, or that of an entry of this open mapping. place, such as " (command line)", may be empty.
        """
        return f"{name}={value}{place}: must be {rule}. The default is {self.shown_default}: {self.sentence}"

    @property
    def shown_default(self) -> str:
        """The default as a user would write it."""
        return shown(self.default)

    @property
    def is_open(self) -> bool:
        """Whether the value is a mapping whose own keys are free, as task.args is."""
        return typing.get_origin(self.type) is dict


def sections() -> dict[str, str]:
    """Name of each section → the sentence that describes it, in the order of the file."""
    return {name: (section.__doc__ or "").strip() for name, section in typing.get_type_hints(Config).items()}


@cache
def keys() -> tuple[Key, ...]:
    """Every configuration key, in the order of the file."""
    found: list[Key] = []
    for section, section_type in typing.get_type_hints(Config).items():
        types = typing.get_type_hints(section_type)
        defaults = section_type()
        found.extend(
            Key(
                name=f"{section}.{entry.name}",
                section=section,
                sentence=entry.metadata["sentence"],
                type=types[entry.name],
                default=getattr(defaults, entry.name),
                bounds=entry.metadata["bounds"],
                if_changed=entry.metadata["if_changed"],
                shared=entry.metadata["shared"],
            )
            for entry in fields(section_type)
        )
    return tuple(found)


@cache
def keys_by_name() -> dict[str, Key]:
    """Dotted name → key, in the order of the file."""
    return {key.name: key for key in keys()}


def value_of(config: Config, name: str) -> Any:
    """The value of the dotted key `name`."""
    section, _, entry = name.partition(".")
    return getattr(getattr(config, section), entry)


def shown(value: Any) -> str:
    """A value as a user would write it; `empty` for an empty text, list or mapping."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, list, dict)) and not value:
        return "empty"
    return str(value)
