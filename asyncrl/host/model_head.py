"""Whether the output head that a model folder stores is the one that its config.json speaks of.

A head may be tied: the embedding is used once more. Where file and config.json disagree, each program that loads the
folder decides for itself, one for the stored head and one for the embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.errors import ModelError
from asyncrl.host.model_folder import ModelFiles, read_header

HEAD = "lm_head.weight"
CHUNK_BYTES = 1 << 24
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# What config.json means where it leaves tie_word_embeddings out, by how model_type begins; unknown for all others.
TIED_BY_DEFAULT = {"gemma": True, "gpt2": True, "llama": False, "qwen2": False, "qwen3": False, "mistral": False,
                   "mixtral": False, "phi3": False, "olmo2": False}  # fmt: skip


class _Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    start: int
    stop: int
    kind: tuple[str, tuple[int, ...]]  # dtype, shape


def check_head(model: ModelFiles, key: str) -> None:
    """Returns where config.json and weight files agree on the head, or where nothing is known of it.

    Reads headers; the values of head and embedding only where both are stored although they should be one.

    Raises ModelError, which begins with `key`: tie_word_embeddings is true and a head with other values is stored, or
    it is false and none is stored.
    """
    tied = _is_tied(model.config)
    if tied is None:
        return
    stored = {
        name: _Stored(path, base + start, base + stop, (str(entry["dtype"]), tuple(entry["shape"])))
        for path in model.weight_files
        for tensors, base in [read_header(path)]
        for name, entry in tensors.items()
        if name.endswith((HEAD, *EMBEDDINGS))
        for start, stop in [entry["data_offsets"]]
    }
    head = next((name for name in sorted(stored) if name.endswith(HEAD)), None)
    embedding = next((name for name in sorted(stored) if name.endswith(EMBEDDINGS)), None)
    said = f"tie_word_embeddings is {str(tied).lower()}" + ("" if _said(model.config) else " (the default of its kind)")
    if embedding is None:
        return  # names that we do not know
    if not tied and head is None:
        raise ModelError(
            f"{key}: {said}, but no {HEAD} is stored: learner and generators would each make up a head of their own. "
            "Copy the model again; if its head is the embedding, set tie_word_embeddings to true in config.json"
        )
    if tied and head is not None and not _equal(stored[head], stored[embedding]):
        raise ModelError(
            f"{key}: {said}, but a head of its own is stored: {head} has other values than {embedding}, and learner "
            "and generators would not use the same one. Set tie_word_embeddings to false in config.json if the model "
            f"was trained with that head, else save it without {head}"
        )


def _said(config: dict[str, Any]) -> bool:
    return isinstance(config.get("tie_word_embeddings"), bool)


def _is_tied(config: dict[str, Any]) -> bool | None:
    if _said(config):
        return bool(config["tie_word_embeddings"])
    kind = str(config.get("model_type"))
    return next((tied for begins, tied in TIED_BY_DEFAULT.items() if kind.startswith(begins)), None)


def _equal(left: _Stored, right: _Stored) -> bool:
    if left.kind != right.kind:
        return False
    with left.path.open("rb") as one, right.path.open("rb") as other:
        one.seek(left.start)
        other.seek(right.start)
        for start in range(0, left.stop - left.start, CHUNK_BYTES):
            size = min(CHUNK_BYTES, left.stop - left.start - start)
            if one.read(size) != other.read(size):
                return False
    return True
