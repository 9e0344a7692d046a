"""The catalogue of configuration keys, read off the dataclasses in `asyncrl.config`.

Standard library only: `--help` is made from it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from asyncrl.config import Config


@dataclass(frozen=True, slots=True)
class Key:
    """One configuration key as declared in `asyncrl.config`."""

    name: str  # dotted, as written on the command line
    section: str
    sentence: str
    type: Any
    default: Any
    checks: dict[str, Any]

    @property
    def rule(self) -> str:
        """What values are allowed, in words; empty when every value of the type is."""
        words = {"minimum": "at least {}", "above": "above {}", "maximum": "at most {}"}
        parts = [text.format(self.checks[check]) for check, text in words.items() if check in self.checks]
        if "choices" in self.checks:
            parts.append("one of " + ", ".join(self.checks["choices"]))
        return " and ".join(parts)

    @property
    def type_name(self) -> str:
        names = {
            str: "text",
            int: "integer",
            float: "number",
            bool: "true or false",
            list[int]: "list of integers",
            list[float]: "list of numbers",
            list[str]: "list of texts",
        }
        return names.get(self.type, "mapping")

    @property
    def shown_default(self) -> str:
        return shown(self.default)

    @property
    def is_open(self) -> bool:
        """True for a mapping whose own keys are free (task.args)."""
        return typing.get_origin(self.type) is dict


def sections() -> dict[str, str]:
    """Section name -> the sentence that describes it, in the order of the file."""
    return {name: (section.__doc__ or "").strip() for name, section in typing.get_type_hints(Config).items()}


@cache
def keys() -> tuple[Key, ...]:
    """Every configuration key, in the order of the file."""
    found = []
    for section, section_type in typing.get_type_hints(Config).items():
        types = typing.get_type_hints(section_type)
        defaults = section_type()
        for entry in fields(section_type):
            checks = dict(entry.metadata)
            sentence = checks.pop("sentence")
            default = getattr(defaults, entry.name)
            name = f"{section}.{entry.name}"
            found.append(Key(name, section, sentence, types[entry.name], default, checks))
    return tuple(found)


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
