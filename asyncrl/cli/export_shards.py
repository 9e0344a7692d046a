"""The model of a checkpoint that several ranks wrote, as the contents of Hugging Face files: one tensor at a time.

Ranks write what training changes. What it does not change, under adapters or a part by names, is in model.path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from asyncrl.config import Config
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.host.model_folder import find_model
from asyncrl.storage.checkpoint_files import LORA_A, LORA_B, PEFT_PREFIX, STATE_FOLDER, WEIGHT_SHARDS, Manifest
from asyncrl.storage.tensor_arrays import FLOATS, bytes_as, read_array
from asyncrl.storage.tensor_files import SUFFIX, Buffer, Content, Piece, pieces_of, whole_shape

WEIGHT = ".weight"
HEAD = "lm_head.weight"


def contents_of_shards(config: Config, manifest: Manifest, dtype: str) -> list[Content]:
    """The whole model with what was trained in place, adapters merged, a tied head once.

    Raises ConfigError where model.path is not what was trained, CheckpointError where a file cannot be read.
    """
    trained = _pieces(_shard_files(manifest))
    if config.update.what == "full":
        return [_content(name, pieces, dtype) for name, pieces in trained.items()]
    base = _pieces(find_model(config.model.path).weight_files)
    if config.model.path and HEAD in base and find_model(config.model.path).config.get("tie_word_embeddings"):
        del base[HEAD]
    merged = {name.removesuffix(LORA_A) + WEIGHT: name for name in trained if name.endswith(LORA_A)}
    missing = sorted({name for name in (merged or trained) if name not in base})
    if missing:
        raise ConfigError(
            f"{config.model.path} has no {missing[0]}, which was trained: set model.path to the model the run began "
            "with; one that stores it otherwise (experts) is exported by the learner at the end of the run"
        )
    scale = config.update.lora_alpha / config.update.lora_rank
    return [
        _merged(name, base[name], trained, scale, dtype)
        if name in merged
        else _content(name, trained.get(name, base[name]), dtype)
        for name in base
    ]


def adapters_of_shards(manifest: Manifest) -> list[Content]:
    """The adapters alone, under PEFT's names, as they were trained."""
    pieces = _pieces(_shard_files(manifest))
    return [_content(f"{PEFT_PREFIX}{name}", found, found[0].dtype) for name, found in pieces.items()]


def contents_in(dtype: str, files: Iterable[Path]) -> list[Content]:
    """The tensors of whole files, those of floats in another dtype."""
    return [_content(name, pieces, dtype) for name, pieces in _pieces(files).items()]


def is_in(dtype: str, files: Iterable[Path]) -> bool:
    """Whether all floats in these files are of that dtype."""
    found = {piece.dtype for pieces in _pieces(files).values() for piece in pieces}
    return found & FLOATS <= {dtype}


def _shard_files(manifest: Manifest) -> list[Path]:
    folder = f"{STATE_FOLDER}/{WEIGHT_SHARDS}/"
    return sorted(manifest.path / name for name in manifest.files if name.startswith(folder) and name.endswith(SUFFIX))


def _pieces(files: Iterable[Path]) -> dict[str, list[Piece]]:
    try:
        return pieces_of(files)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a file of weights cannot be read: {error}") from error


def _content(name: str, pieces: Sequence[Piece], dtype: str) -> Content:
    kind = dtype if pieces[0].dtype in FLOATS else pieces[0].dtype
    return Content(name, kind, whole_shape(pieces), _reader(lambda: read_array(pieces), kind))


def _merged(name: str, base: Sequence[Piece], trained: dict[str, list[Piece]], scale: float, dtype: str) -> Content:
    stem = name.removesuffix(WEIGHT)

    def value() -> np.ndarray:
        # As `fold_adapter` of the weight plane does it, in float32.
        lora_a, lora_b = read_array(trained[stem + LORA_A]), read_array(trained[stem + LORA_B])
        weight: np.ndarray = read_array(base) + np.float32(scale) * (lora_b @ lora_a)
        return weight

    return Content(name, dtype, whole_shape(base), _reader(value, dtype))


def _reader(value: Callable[[], np.ndarray], dtype: str) -> Callable[[], Buffer]:
    return lambda: bytes_as(value(), dtype)
