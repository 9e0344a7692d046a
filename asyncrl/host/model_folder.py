"""What a model folder holds, read without torch: files, parameter count, shape of the KV cache."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import ModelError
from asyncrl.host.model_config import read_model_config, size_of

MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format itself
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them makes a tokenizer
TOKENIZER_FILES = (*VOCABULARY_FILES, "merges.txt", "added_tokens.json")  # all that may belong to one


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder that is complete enough to be loaded."""

    folder: Path
    weight_files: tuple[Path, ...]
    config: dict[str, Any]  # the parsed config.json

    @property
    def num_bytes(self) -> int:
        """Size of all weight files, in bytes."""
        return sum(path.stat().st_size for path in self.weight_files)

    def num_parameters(self) -> int:
        """Elements of all stored tensors, from the safetensors headers alone.

        Raises ModelError when a header is malformed.
        """
        return sum(math.prod(shape) for shape in self.shapes().values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each stored tensor by name, from the headers alone. Raises ModelError as `num_parameters`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for number, path in enumerate(self.weight_files):
            for name, shape in _read_shapes(path).items():
                # Files that were joined by hand may name a tensor twice; each of them takes memory.
                shapes[name if name not in shapes else f"{name} ({number})"] = shape
        return shapes

    def kv_bytes_per_token(self, element_bytes: int) -> int | None:
        """Bytes of the keys and values of one token: 2 x layers x kv_heads x head_dim x element_bytes.

        None when config.json does not say.
        """
        layers, heads = size_of(self.config, "num_hidden_layers"), size_of(self.config, "num_attention_heads")
        if not layers or not heads:
            return None
        head_dim = size_of(self.config, "head_dim") or size_of(self.config, "hidden_size") // heads
        return 2 * layers * (size_of(self.config, "num_key_value_heads") or heads) * head_dim * element_bytes


def find_model(path: str, name: str = "model.path") -> ModelFiles:
    """The model at `path`: a folder, or the name of a model in the local Hugging Face cache.

    name is the configuration key that messages speak of. Raises ModelError when there is no such folder, when
    tokenizer or weights are missing, and as `read_model_config` does.
    """
    key = f"{name}={path}"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        cached = _cached_snapshot(path)
        if cached is None:
            raise ModelError(_missing(path, key))
        folder = cached
    config = read_model_config(folder, key)
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(
            f"{key} holds no tokenizer (one of {', '.join(VOCABULARY_FILES)}); "
            f"save it beside the weights with tokenizer.save_pretrained"
        )
    return ModelFiles(folder, _weight_files(key, folder), config)


def _missing(path: str, key: str) -> str:
    message = f"{key}: there is no such folder; bin/warmup makes tiny models for a task"
    if not path.startswith((".", "/", "~")) and path.count("/") == 1:
        message += f", and `hf download {path}` fetches a model of that name into {_hub_cache()}"
    return message


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached_snapshot(name: str) -> Path | None:
    """The folder to which the cache's main reference points, as `hf download NAME` left it; None if there is none."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    repository = _hub_cache() / ("models--" + name.replace("/", "--"))
    reference = repository / "refs" / "main"
    if not reference.is_file():
        return None
    snapshot = repository / "snapshots" / reference.read_text(encoding="utf-8").strip()
    return snapshot if snapshot.is_dir() else None


def _weight_files(key: str, folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise ModelError(f"{key}: {index.name} cannot be read; copy the model again") from None
        files = tuple(folder / name for name in sorted(names))
    elif (folder / "model.safetensors").is_file():
        files = (folder / "model.safetensors",)  # others beside it are not the model's: a checkpoint has some
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{key}: the index names {missing[0]}, which is missing; copy the model again")
    if not files:
        raise ModelError(
            f"{key} holds no .safetensors file; save the model with save_pretrained (pickled weights are not read)"
        )
    return files


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file by name (dtype, shape, data_offsets), and the byte at which their data begins.

    Raises ModelError when the file is none.
    """
    malformed = f"{path} is not a safetensors file; copy the model again"
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelError(malformed)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ModelError(malformed)
        header = file.read(length)
    try:
        return {name: dict(entry) for name, entry in json.loads(header).items() if name != "__metadata__"}, 8 + length
    except (ValueError, TypeError, AttributeError):
        raise ModelError(malformed) from None


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    tensors, _ = read_header(path)
    try:
        return {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path} is not a safetensors file; copy the model again") from None
