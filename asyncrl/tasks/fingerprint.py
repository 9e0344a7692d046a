"""What decides a run, as names with values: configuration keys, and digests of files.

    shared_settings(config)   what learner and generator must have in common, compared when a generator says hello:
                              the keys that are declared as shared, the source of task and rewards, the tokenizer
    run_settings(config)      what a run that is resumed is compared with: every key, the same digests, and those of the
                              model's weights and of the data files that task.args names

A value is JSON text, or a digest. Nothing of the task is imported: its files are read only.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from asyncrl.config import Config
from asyncrl.config.keys import keys, value_of
from asyncrl.host.fingerprints import (
    ABSENT,
    DIGEST_CHARACTERS,
    content_digest,
    model_fingerprint,
    tokenizer_fingerprint,
)
from asyncrl.host.model_folder import find_model
from asyncrl.types import Setting

MAX_VALUE_CHARACTERS = 2000  # a longer value is compared by its digest
MAX_SOURCE_FILES = 200

# What tokenizer_config.json says about how text becomes tokens. The rest differs between copies of one tokenizer.
_TOKENIZER_KEYS = (
    *("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
)
# Of what task.args names, these files are data. Others may be caches and notes of the task, which change while it runs.
_DATA_SUFFIXES = frozenset(
    (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".yaml", ".gz", ".zst", ".bz2", ".xz", ".npy")
)
_IMPORT_PATH = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


def shared_settings(config: Config) -> list[Setting]:
    """What decides prompts and rewards on both sides. Raises ModelError when there is no such model."""
    settings = [_key_setting(config, key.name) for key in keys() if key.shared]
    return settings + _source_settings(config) + _tokenizer_settings(config)


def run_settings(config: Config) -> list[Setting]:
    """Every key with its value, and the digests of what the keys name. Raises ModelError when there is no such model.

    The weights of a large model are sampled, not read whole: `host.fingerprints.content_digest`.
    """
    model = find_model(config.model.path)
    settings = [_key_setting(config, key.name) for key in keys()]
    settings += _source_settings(config) + _tokenizer_settings(config)
    settings.append(Setting("file config.json of the model", model_fingerprint(model.config)))
    settings.append(Setting("file tokenizer of the model", tokenizer_fingerprint(model.folder)))
    settings.append(Setting("file weights of the model", _digest_of_files(model.weight_files)))
    return settings + _data_settings(config)


def _key_setting(config: Config, name: str) -> Setting:
    return Setting(name, value_text(value_of(config, name)))


def value_text(value: Any) -> str:
    """The value of a key as it is compared: JSON with sorted names, of a long one a digest."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=repr)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{len(text)} characters, sha256 {_digest(text.encode())}"


# -- the tokenizer -------------------------------------------------------------------------------------------


def _tokenizer_settings(config: Config) -> list[Setting]:
    """What tokenizer_config.json and the chat template say; the vocabulary has a digest of its own in the hello."""
    folder = find_model(config.model.path).folder
    file = folder / "tokenizer_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        said = {}  # who loads the tokenizer refuses it by name
    if not isinstance(said, Mapping):
        said = {}
    chosen = {name: said[name] for name in _TOKENIZER_KEYS if said.get(name) is not None}
    template = folder / "chat_template.jinja"
    text = template.read_bytes() if template.is_file() else json.dumps(said.get("chat_template")).encode()
    return [
        Setting("file tokenizer_config.json of the model", value_text(chosen)),
        Setting("file chat template of the model", _digest(text)),
    ]


# -- source --------------------------------------------------------------------------------------------------


def _source_settings(config: Config) -> list[Setting]:
    """The digest of every module that the task and reward functions are made of."""
    found: dict[str, str] = {}
    named = [*_modules_in(config.task.args), *_modules_in(config.reward.parts)]
    for name in dict.fromkeys([config.task.path.partition(":")[0], *named]):
        found.update(source_digests(name))
    return [Setting(f"file {name} (source)", digest) for name, digest in sorted(found.items())]


def _modules_in(value: Any) -> Iterator[str]:
    """Modules of the import paths `module:name` that stand anywhere in a value."""
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _modules_in(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _modules_in(child)
    elif isinstance(value, str) and (match := _IMPORT_PATH.fullmatch(value)) and _source_file(match.group(1)):
        yield match.group(1)


def source_digests(module: str) -> dict[str, str]:
    """Dotted name → digest, of a module and of the modules beside it that it imports, and those that they import.

    Beside it means: not of the standard library and not installed by itself. A module without a source file is
    `ABSENT`. Nothing is executed.
    """
    digests: dict[str, str] = {}
    waiting = [module]
    while waiting and len(digests) < MAX_SOURCE_FILES:
        name = waiting.pop()
        if name in digests:
            continue
        file = _source_file(name)
        if file is None or not (name == module or _belongs(name, file, module)):
            continue
        source = file.read_bytes().replace(b"\r\n", b"\n")
        digests[name] = _digest(source)
        waiting += _imported_by(name, source, is_package=file.name == "__init__.py")
    return digests or {module: ABSENT}


def _source_file(name: str) -> Path | None:
    """The source file of a module, found without importing its packages."""
    paths: list[str] | None = [*sys.path, os.getcwd()]
    spec = None
    parts = name.split(".")
    for number in range(len(parts)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: number + 1]), paths)
        if spec is None:
            return None
        paths = list(spec.submodule_search_locations or [])
    file = Path(spec.origin) if spec is not None and spec.origin else None
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _belongs(name: str, file: Path, module: str) -> bool:
    """Whether an imported module is a part of what the user wrote, rather than a library."""
    package = module.partition(".")[0]
    if name.partition(".")[0] == package:
        return package != "asyncrl" or name.startswith("asyncrl.tasks.")
    if name.partition(".")[0] == "asyncrl":
        return False
    return not any(file.is_relative_to(folder) for folder in _installed()) and "site-packages" not in file.parts


@functools.cache
def _installed() -> set[str]:
    """Folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    return {paths[place] for place in ("stdlib", "platstdlib", "purelib", "platlib")}


def _imported_by(name: str, source: bytes, *, is_package: bool) -> list[str]:
    """Dotted names that a module may import; names of functions among them lead to no file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # who imports it says what is wrong
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            base += node.module.split(".") if node.module else []
            found.append(".".join(base))
            found += [".".join([*base, alias.name]) for alias in node.names]
    return [other for other in found if other and "*" not in other]


# -- data ----------------------------------------------------------------------------------------------------


def _data_settings(config: Config) -> list[Setting]:
    """The digest of every data file, or of the data files in every folder, that a text in task.args names."""
    named = {text: Path(text).expanduser() for text in _texts_in(config.task.args) if _may_be_path(text)}
    return [
        Setting(f"file {text} (task.args)", content_digest(path, _DATA_SUFFIXES))
        for text, path in sorted(named.items())
        if path.is_dir() or (path.is_file() and path.suffix in _DATA_SUFFIXES)
    ]


def _may_be_path(text: str) -> bool:
    return 0 < len(text) < 4096 and "\0" not in text


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _texts_in(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _texts_in(child)
    elif isinstance(value, str):
        yield value


def _digest_of_files(files: Iterable[Path]) -> str:
    return _digest("\n".join(f"{file.name} {content_digest(file)}" for file in files).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARACTERS]
