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


# Sizes of published models, for forecasts: a file of their headers, whose data is a hole.
PUBLISHED: dict[str, dict[str, int | bool]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
PUBLISHED_VOCABULARY = 151_936


def make_published_model(folder: Path, name: str) -> Path:
    """A model folder of a size of `PUBLISHED`, in bfloat16: headers as they are, and no data behind them."""
    folder.mkdir(parents=True)
    sizes = PUBLISHED[name]
    shape = {**sizes, "vocab_size": PUBLISHED_VOCABULARY, "max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **shape}))
    _write_tokenizer(folder)
    header, end = {}, 0
    for tensor, dims in _published_shapes(sizes).items():
        size = 2 * int(np.prod(dims))
        header[tensor] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def _published_shapes(sizes: dict[str, int | bool]) -> dict[str, list[int]]:
    hidden, inner = int(sizes["hidden_size"]), int(sizes["intermediate_size"])
    queries, keys = (int(sizes[f"num_{kind}_heads"] * sizes["head_dim"]) for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": [PUBLISHED_VOCABULARY, hidden], "model.norm.weight": [hidden]}
    for layer in range(int(sizes["num_hidden_layers"])):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": [keys if n != "q" else queries, hidden] for n in "qkv"}
        shapes[f"{at}.self_attn.o_proj.weight"] = [hidden, queries]
        shapes |= {f"{at}.mlp.{n}_proj.weight": [inner, hidden] for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = [hidden, inner]
        shapes |= {f"{at}.{n}_layernorm.weight": [hidden] for n in ("input", "post_attention")}
    if not sizes["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [PUBLISHED_VOCABULARY, hidden]
    return shapes


def _write_tokenizer(folder: Path) -> None:
    tokens = {token: number for number, token in enumerate(["<end>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
