"""The weights of a model as transformers names their files: one, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from asyncrl.storage.tensor_files import Content, FileProof, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
WEIGHTS_INDEX = "model.safetensors.index.json"


def write_model_files(contents: Sequence[Content], folder: Path) -> dict[str, FileProof]:
    """Writes the tensors of a model; several files get an index that says which tensor is in which.

    Returns size and digest of the files of weights by name. Raises OSError.
    """
    shards = _shards(contents)
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    proofs = {file: write_tensors(folder / file, shard) for file, shard in zip(files, shards, strict=True)}
    if len(shards) > 1:
        places = {content.name: file for file, shard in zip(files, shards, strict=True) for content in shard}
        total = sum(content.num_bytes for content in contents)
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return proofs


def write_json(path: Path, content: object) -> None:
    """A JSON file for people."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(contents: Sequence[Content]) -> list[list[Content]]:
    """The contents in their order, cut before MAX_SHARD_BYTES would be exceeded; a larger tensor is alone."""
    shards: list[list[Content]] = [[]]
    filled = 0
    for content in contents:
        if shards[-1] and filled + content.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(content)
        filled += content.num_bytes
    return shards
