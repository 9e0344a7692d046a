"""A model folder complete enough for checks that read headers only."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from asyncrl.tasks.arithmetic import CHARACTERS

TENSORS = {"embed": (50, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "norm": (8,)}
NUM_PARAMETERS = 536


def make_model_folder(folder: Path) -> Path:
    """config.json, a tokenizer of the arithmetic task's characters, and 536 float32 parameters."""
    folder.mkdir()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    sizes = {"vocab_size": 50, "max_position_embeddings": 32768, **shape}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes}))
    _write_tokenizer(folder)
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in TENSORS.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path) -> None:
    tokens = {token: number for number, token in enumerate(["<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
