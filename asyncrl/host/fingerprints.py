"""Digests that two daemons compare at hello: they show whether both hold the same architecture and tokenizer.

The values of the weights are not part of a digest: they change with every step, and the canary checks them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.errors import ModelError
from asyncrl.host.model_folder import TOKENIZER_FILES, find_model
from asyncrl.types import Setting

# Differ between two copies of one model without changing what it computes.
VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})

DIGEST_CHARACTERS = 16
ABSENT = "absent"
WHOLE_BYTES = 64 * 2**20  # a larger file is not read whole
_SAMPLES = 64
_SAMPLE_BYTES = 2**16


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """Digest of a parsed config.json (architecture, sizes, rotary settings, special tokens): 16 hex characters."""
    kept = {name: value for name, value in config.items() if name not in VOLATILE_KEYS}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_CHARACTERS]


def model_folder_fingerprint(path: str) -> str:
    """`model_fingerprint` of a model folder, or of a cached hub name. Raises ModelError when there is no such model."""
    return model_fingerprint(find_model(path).config)


def tokenizer_fingerprint(folder: Path) -> str:
    """Digest of the tokenizer's files in a model folder: 16 hex characters.

    Raises ModelError when the folder holds none of them.
    """
    digest = hashlib.sha256()
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise ModelError(f"{folder} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)})")
    for name in found:
        content = (folder / name).read_bytes()
        # Name and length first: the same bytes cut differently must not give the same digest.
        digest.update(f"{name}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()[:DIGEST_CHARACTERS]


def content_digest(path: Path, suffixes: Collection[str] = ()) -> str:
    """Digest of a file, or of a folder's files with their names (all, or those with these suffixes): 16 hex characters.

    Of a file over WHOLE_BYTES its size and 64 pieces of 64 KiB are read, the first and the last of them included: a
    start must not wait for gigabytes. Raises OSError when it cannot be read.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in files if not suffixes or file.suffix in suffixes]
    for file in files:
        size = file.stat().st_size
        name = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{name}:{size}:".encode())
        with file.open("rb") as opened:
            if size <= WHOLE_BYTES:
                while block := opened.read(2**22):
                    digest.update(block)
                continue
            for number in range(_SAMPLES):
                opened.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:DIGEST_CHARACTERS]


class Difference(NamedTuple):
    """A setting that two sides have with different values."""

    name: str
    before: str  # of an earlier start, or of the learner
    after: str


def differences(before: Iterable[Setting], after: Iterable[Setting]) -> list[Difference]:
    """Every setting that differs, by name; one that is on one side only is `ABSENT` on the other."""
    old, new = dict(before), dict(after)
    return [
        Difference(name, old.get(name, ABSENT), new.get(name, ABSENT))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
