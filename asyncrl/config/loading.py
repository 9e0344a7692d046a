"""Loads the configuration: defaults < what algorithm.name sets < YAML file < `key=value` on the command line.

    config = load_config("configs/quickstart.yaml", ["run.steps=20", "learner.cpus=[0]"])

With `learner.lr` 1e-6 by default, 1e-4 in the file and 3e-4 on the command line, the run uses 3e-4.
`${run.name}` in a value stands for another key. After loading, the program sees plain dataclasses only.
"""

from __future__ import annotations

import copy
import difflib
import functools
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from asyncrl.config import AlgorithmConfig, Config
from asyncrl.config.checks import check, check_values, raise_all
from asyncrl.config.keys import Key, keys_by_name, sections
from asyncrl.config.methods import METHODS
from asyncrl.config.schema import RENAMED_KEYS
from asyncrl.config.written import by_declared_types, compose, text_as_written, value_by_declared_type
from asyncrl.errors import ConfigError

COMMAND_LINE = " (command line)"


@dataclass(frozen=True, slots=True)
class _Written:
    """Somebody wrote that the key `name` is to be `value`; `place` says who, as the end of a message."""

    name: str
    value: Any
    place: str


@dataclass(frozen=True, slots=True)
class _Assignment(_Written):
    """What was written, with the key that it sets: the one of that name, or the open mapping that the name is in."""

    key: Key


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` (None = defaults only), applies `overrides` (`key=value`), and checks the result.

    Raises ConfigError for an unreadable file, an unknown key (naming the nearest one), a value of the wrong type or
    outside its bounds, and keys that do not fit together. All problems of a kind are named at once.
    """
    written = list(_from_file(Path(path))) if path is not None else []
    for override in overrides:
        written.extend(_from_override(override))
    given = _with_their_keys(written)
    assignments = [*_with_their_keys(_from_method(given)), *given]
    origins = {assignment.key.name: assignment.place for assignment in assignments}
    config = _merge(assignments, origins)
    raise_all(check_values(config, origins))
    check(config)
    return config


def written_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that the file and the overrides set, with the values as they are written.

    Raises ConfigError as `load_config` does for a file or a key that there is not.
    """
    written = [*_from_file(Path(path)), *(entry for override in overrides for entry in _from_override(override))]
    return {assignment.key.name: assignment.value for assignment in _with_their_keys(written)}


def to_yaml(config: Config) -> str:
    """The configuration as YAML with nothing left to resolve; `load_config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


# -- where values come from ----------------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[_Written]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error})") from None
    try:
        loaded = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        lines = _lines(compose(text))
        if isinstance(loaded, DictConfig) and text.strip():  # read first as it stands: errors then name its own lines
            loaded = OmegaConf.create(by_declared_types(text, _key_set_by))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    content = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as `run:` and `model:`, each with its keys")
    for name, value in _flatten("", content):
        line = f", line {lines[name]}" if name in lines else ""
        yield _Written(name, value, f" ({path}{line})")


def _from_override(override: str) -> Iterator[_Written]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} (command line) is not key=value, for example run.steps=20")
    key = _key_set_by(name)
    if key is not None and key.type is str:
        yield _Written(name, text_as_written(text), COMMAND_LINE)
        return
    try:
        value = OmegaConf.create(value_by_declared_type(text, key))
        parsed = OmegaConf.to_container(value, resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        raise ConfigError(
            f"{override!r} (command line): the value is not valid YAML; quote it: {name}=\"'...'\""
        ) from None
    assert isinstance(parsed, dict), "a dot list makes a mapping"
    yield from (_Written(leaf, value, COMMAND_LINE) for leaf, value in _flatten(name, parsed["value"]))


def _from_method(assignments: Sequence[_Assignment]) -> Iterator[_Written]:
    """What the method's name stands for. An unknown name sets nothing and is reported with the other values."""
    names = [assignment.value for assignment in assignments if assignment.name == "algorithm.name"]
    name = names[-1] if names else AlgorithmConfig.name
    for entry, value in METHODS.get(str(name), {}).items():
        yield _Written(f"algorithm.{entry}", value, f" (algorithm.name={name})")


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; the content of an open mapping (task.args) is one leaf."""
    key = _key_set_by(prefix)
    misspelt = value == {} and prefix not in sections()  # without leaves it would go unnoticed
    if not isinstance(value, dict) or (key is not None and key.is_open) or (misspelt and prefix):
        yield prefix, value
        return
    for name, child in value.items():
        yield from _flatten(f"{prefix}.{name}" if prefix else str(name), child)


def _lines(node: yaml.Node | None, prefix: str = "") -> dict[str, int]:
    """Dotted key → its line in the file, counted from 1."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            dotted = f"{prefix}.{name.value}" if prefix else str(name.value)
            found[dotted] = name.start_mark.line + 1
            found.update(_lines(child, dotted))
    return found


def _neighbours(path: Path) -> str:
    names = sorted(str(found) for found in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; in that folder there are: {', '.join(names)}" if names else "; give the path of a YAML file"


# -- what may be set -----------------------------------------------------------------------------------------


def _key_set_by(name: str) -> Key | None:
    """The key that `name` sets: the one of that name, or the open mapping that it is inside of."""
    table = keys_by_name()
    if name in table:
        return table[name]
    parent = table.get(".".join(name.split(".")[:2]))
    return parent if parent is not None and parent.is_open else None


def _with_their_keys(written: Iterable[_Written]) -> list[_Assignment]:
    """What was written, with its keys. Raises ConfigError naming every key that there is not."""
    assignments = []
    problems = []
    for entry in written:
        key = _key_set_by(entry.name)
        if key is None:
            problems.append(_unknown(entry))
        else:
            assignments.append(_Assignment(entry.name, entry.value, entry.place, key))
    raise_all(problems)
    return assignments


def _unknown(written: _Written) -> str:
    name, place = written.name, written.place
    if name in RENAMED_KEYS:
        return f"{name}{place} is called {RENAMED_KEYS[name]} now; set that key"
    if name in sections():
        example = next(known for known in keys_by_name() if known.startswith(f"{name}."))
        if written.value is None:
            return f"{name}{place} is an empty section; remove it or give it keys, for example {example}"
        return f"{name}={written.value}{place}: {name} is a section; set a key of it, for example {example}"
    return f"unknown key {name}{place}; the nearest is {nearest_key(name)}. --help lists every key"


def nearest_key(name: str) -> str:
    """The valid dotted key most like `name`; one with the same last word, or its initials, comes first."""
    word = name.rpartition(".")[2]
    initials = "".join(part[0] for part in word.split("_") if part)

    def likeness(candidate: str) -> float:
        own_word = candidate.rpartition(".")[2]
        ratio = difflib.SequenceMatcher(None, name, candidate if "." in name else own_word).ratio()
        return ratio + (own_word in (word, initials))

    return max(keys_by_name(), key=likeness)


def _merge(assignments: Sequence[_Assignment], origins: dict[str, str]) -> Config:
    """The defaults with the assignments made in order, and every `${...}` resolved.

    Raises ConfigError naming every value of the wrong type, or the first reference that leads nowhere.
    """
    merged = copy.deepcopy(_defaults())
    raise_all([problem for assignment in assignments if (problem := _apply(merged, assignment))])
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(error, origins)) from None
    assert isinstance(config, Config)
    return config


@functools.cache
def _defaults() -> DictConfig:
    """Nothing but defaults. Made once, for that takes five times as long as a copy."""
    defaults = OmegaConf.structured(Config)
    assert isinstance(defaults, DictConfig)
    return defaults


def _apply(merged: DictConfig, assignment: _Assignment) -> str | None:
    """Sets the value in `merged`; returns the problem if it cannot be."""
    key, value = assignment.key, assignment.value
    # OmegaConf has its own ideas about a scalar where a mapping or list stands, so shapes are compared here.
    wrong_shape = assignment.name == key.name and (
        isinstance(value, dict) != key.is_open or isinstance(value, list) != (typing.get_origin(key.type) is list)
    )
    interpolated = isinstance(value, str) and "${" in value
    if wrong_shape and not interpolated:
        return _wrong_type(assignment)
    try:
        OmegaConf.update(merged, assignment.name, value, merge=True)
    except OmegaConfBaseException as error:
        if interpolated:  # bad syntax inside ${...}
            return f"{assignment.name}={value}{assignment.place}: {_first_line(error)}"
        return _wrong_type(assignment)
    except TypeError:
        return _wrong_type(assignment)
    return None


def _wrong_type(assignment: _Assignment) -> str:
    key = assignment.key
    value = "null" if assignment.value is None else assignment.value
    return key.refusal(assignment.name, value, assignment.place, key.type_and_rule)


def _unresolved(error: OmegaConfBaseException, origins: dict[str, str]) -> str:
    place = origins.get(str(error.full_key), "")
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=???{place}: this value is left to you; set {error.full_key}=... on the command line"
    return f"{error.full_key}{place}: {_first_line(error)}; in a value, ${{section.key}} stands for that key"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
