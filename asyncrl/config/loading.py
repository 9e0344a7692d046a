"""Loads the configuration: defaults < what algorithm.name sets < YAML file < `key=value` on the command line.

    config = load_config("configs/quickstart.yaml", ["run.steps=20", "learner.cpus=[0]"])

With `learner.lr` 1e-6 by default, 1e-4 in the file and 3e-4 on the command line, the run uses 3e-4.
`${run.name}` in a value stands for another key. After loading, the program sees plain dataclasses only.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from asyncrl.config import AlgorithmConfig, Config
from asyncrl.config.checks import check, check_values, raise_all
from asyncrl.config.keys import Key, keys, sections
from asyncrl.config.methods import METHODS
from asyncrl.errors import ConfigError

__all__ = ["check", "load_config", "to_yaml"]

COMMAND_LINE = " (command line)"


@dataclass(frozen=True, slots=True)
class _Assignment:
    """`key` is to become `value`; `place` says who wrote that, as a suffix for messages."""

    key: str
    value: Any
    place: str


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` (None = defaults only), applies `overrides` (`key=value`), and checks the result.

    Raises ConfigError for an unreadable file, an unknown key (naming the nearest one), a value of the wrong
    type or outside its bounds, and keys that do not fit together. All problems of a kind are named at once.
    """
    assignments = list(_from_file(Path(path))) if path is not None else []
    for override in overrides:
        assignments.extend(_from_override(override))
    raise_all([problem for one in assignments if (problem := _unknown(one))])

    assignments = [*_from_method(assignments), *assignments]
    merged = OmegaConf.structured(Config)
    raise_all([problem for one in assignments if (problem := _apply(merged, one))])
    origins = {_known(one.key).name: one.place for one in assignments}
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(error, origins)) from None
    assert isinstance(config, Config)
    raise_all(check_values(config, origins))
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML with nothing left to resolve; `load_config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


# -- where values come from ----------------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[_Assignment]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error})") from None
    try:
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    content = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as `run:` and `model:`, each with its keys")
    for key, value in _flatten("", content):
        line = f", line {lines[key]}" if key in lines else ""
        yield _Assignment(key, value, f" ({path}{line})")


def _from_override(override: str) -> Iterator[_Assignment]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} (command line) is not key=value, for example run.steps=20")
    known = _known(key)
    if not text and known is not None and known.type is str:
        yield _Assignment(key, "", COMMAND_LINE)
        return
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise ConfigError(
            f"{override!r} (command line): the value is not valid YAML; quote it: {key}=\"'...'\""
        ) from None
    yield from (_Assignment(name, value, COMMAND_LINE) for name, value in _flatten(key, parsed["value"]))


def _from_method(assignments: Sequence[_Assignment]) -> Iterator[_Assignment]:
    """What the method's name stands for. An unknown name sets nothing and is reported with the other values."""
    names = [one.value for one in assignments if one.key == "algorithm.name"]
    name = names[-1] if names else AlgorithmConfig.name
    for key, value in METHODS.get(str(name), {}).items():
        yield _Assignment(f"algorithm.{key}", value, f" (algorithm.name={name})")


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; the content of an open mapping (task.args) is one leaf."""
    known = _known(prefix)
    misspelt = value == {} and prefix not in sections()  # without leaves it would go unnoticed
    if not isinstance(value, dict) or (known is not None and known.is_open) or (misspelt and prefix):
        yield prefix, value
        return
    for name, child in value.items():
        yield from _flatten(f"{prefix}.{name}" if prefix else str(name), child)


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Dotted key -> line, counted from 1."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            key = f"{prefix}.{name.value}" if prefix else str(name.value)
            found[key] = name.start_mark.line + 1
            found.update(_lines(child, key))
    return found


def _neighbours(path: Path) -> str:
    names = sorted(str(found) for found in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; in that folder there are: {', '.join(names)}" if names else "; give the path of a YAML file"


# -- what may be set -----------------------------------------------------------------------------------------


@cache
def _keys_by_name() -> dict[str, Key]:
    return {key.name: key for key in keys()}


def _known(name: str) -> Key | None:
    """The key that `name` sets: itself, or the open mapping it is inside of."""
    table = _keys_by_name()
    if name in table:
        return table[name]
    parent = table.get(".".join(name.split(".")[:2]))
    return parent if parent is not None and parent.is_open else None


def _unknown(assignment: _Assignment) -> str | None:
    key, place = assignment.key, assignment.place
    if _known(key) is not None:
        return None
    if key in sections():
        entries = [name for name in _keys_by_name() if name.startswith(f"{key}.")]
        if assignment.value is None:
            return f"{key}{place} is an empty section; remove it or give it keys, for example {entries[0]}"
        return f"{key}={assignment.value}{place}: {key} is a section; set a key of it, for example {entries[0]}"
    return f"unknown key {key}{place}; the nearest is {nearest_key(key)}. --help lists every key"


def nearest_key(name: str) -> str:
    """The valid dotted key most like `name`; one with the same last word, or its initials, comes first."""
    word = name.rpartition(".")[2]
    initials = "".join(part[0] for part in word.split("_") if part)

    def likeness(candidate: str) -> float:
        own_word = candidate.rpartition(".")[2]
        ratio = difflib.SequenceMatcher(None, name, candidate if "." in name else own_word).ratio()
        return ratio + (own_word in (word, initials))

    return max(_keys_by_name(), key=likeness)


def _apply(merged: DictConfig, assignment: _Assignment) -> str | None:
    key = _known(assignment.key)
    assert key is not None, "unknown keys were reported before"
    # OmegaConf has its own ideas about a scalar where a mapping or list stands, so shapes are compared here.
    wrong_shape = assignment.key == key.name and (
        isinstance(assignment.value, dict) != key.is_open
        or isinstance(assignment.value, list) != (typing.get_origin(key.type) is list)
    )
    interpolated = isinstance(assignment.value, str) and "${" in assignment.value
    try:
        if wrong_shape and not interpolated:
            raise TypeError
        OmegaConf.update(merged, assignment.key, assignment.value, merge=True)
    except OmegaConfBaseException as error:
        if interpolated:  # bad syntax inside ${...}
            return f"{assignment.key}={assignment.value}{assignment.place}: {_first_line(error)}"
        return _wrong_type(key, assignment)
    except TypeError:
        return _wrong_type(key, assignment)
    return None


def _wrong_type(key: Key, assignment: _Assignment) -> str:
    rule = key.type_name + (f", {key.rule}" if key.rule else "")
    shown = "null" if assignment.value is None else assignment.value
    return (
        f"{assignment.key}={shown}{assignment.place}: must be {rule}. "
        f"The default is {key.shown_default}: {key.sentence}"
    )


def _unresolved(error: OmegaConfBaseException, origins: dict[str, str]) -> str:
    place = origins.get(str(error.full_key), "")
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=???{place}: this value is left to you; set {error.full_key}=... on the command line"
    return f"{error.full_key}{place}: {_first_line(error)}; in a value, ${{section.key}} stands for that key"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
