"""Random models of the Qwen2 type whose completions have a known length: fixed, or geometric with a given mean.

One dimension of the residual stream is reserved: every embedding writes the same number into it and no layer adds to
it, so it reaches the output head as a constant, and the end token's logit is set through it alone. The other logits
are close to equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

END_ID = 1
FIRST_CHARACTER = 0x4E00


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a model."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    inner: int


SIZES = {
    "0.8M": Size(vocab=128, hidden=128, layers=4, heads=4, inner=384),
    "10M": Size(vocab=4096, hidden=256, layers=8, heads=8, inner=1152),
}


def make_model(folder: Path, size: str, *, mean_tokens: float | None = None, seed: int = 0) -> Path:
    """Writes a model of `size` with tied embeddings, and a tokenizer of one character per token.

    mean_tokens: mean of the geometric law of completion lengths, before the cap; None = never ends by itself.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END_ID,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 1.0
        # The norm before the head turns the constant, by far the largest dimension, into about sqrt(hidden).
        share = 1e-12 if mean_tokens is None else 1.0 / mean_tokens
        wanted = math.log(share * (shape.vocab - 1) / (1.0 - share))
        embedding[END_ID, 0] = 1.0 + wanted / math.sqrt(shape.hidden)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    _tokenizer(shape.vocab).save_pretrained(folder)
    return folder


def _tokenizer(vocab: int) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<end>", *(chr(FIRST_CHARACTER + index) for index in range(vocab - 2))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
