"""Digests that two daemons compare at hello: they show whether both hold the same architecture and tokenizer.

The values of the weights are not part of a digest: they change with every step, and the canary checks them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncrl.errors import ModelError
from asyncrl.host.model_folder import TOKENIZER_FILES, find_model

# Differ between two copies of one model without changing what it computes.
VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})

DIGEST_CHARACTERS = 16


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
