"""Random models of the Llama type whose completions have a known length: fixed, geometric, or of any other law.

One dimension of the residual stream is reserved: every embedding writes the same number into it and no layer adds to
it, so it reaches the output head as nearly a constant, and the end token's logit is set through it alone. The other
logits are close to equal. How large the constant is after the last norm, and how large the other logits are, hangs on
the size of the model: both are measured on random tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END_ID = 1
FIRST_CHARACTER = 0x4E00
QUIET = 0.05  # of what layers add, in a model whose tokens follow from each other
SEQUENCES, POSITIONS = 8, 128  # of random tokens, on which a model is measured
BISECTIONS = 60
CERTAIN = 20.0  # nats by which the one right token is ahead


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
    from transformers import LlamaForCausalLM

    shape = SIZES[size]
    config = _config(shape, tied=True)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 1.0
        embedding[END_ID, 0] = _end_weight(model, 1e-12 if mean_tokens is None else 1.0 / mean_tokens)
    return _save(model, folder)


def _end_weight(model: Any, share: float) -> float:
    """What the end token's embedding must have in the reserved place to be sampled with probability `share` on average.

    The average is over random tokens, which is what the model itself writes.
    """
    import torch

    vocab = model.config.vocab_size
    embedding = model.model.embed_tokens.weight
    written = torch.randint(END_ID + 1, vocab, (SEQUENCES, POSITIONS))
    hidden = model.model(written).last_hidden_state.double().flatten(0, 1)
    logits = hidden @ embedding.double().T
    logits[:, END_ID] = -torch.inf
    others = logits.logsumexp(dim=1)
    end = embedding[END_ID].double().clone()
    end[0] = 0.0
    ahead = hidden @ end - others
    low, high = -100.0, 100.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        mean = torch.sigmoid(ahead + middle * hidden[:, 0]).mean()
        low, high = (middle, high) if mean < share else (low, middle)
    return high


def make_counting_model(folder: Path, size: str, shares: Sequence[float], *, seed: int = 0) -> Path:
    """Writes a model of `size` whose completions have lengths of a given law: shares[i] is the probability of i + 1.

    Prompts end with the first character of the tokenizer. The model's first token names how many are to come; each
    token is followed by that of one less, and the last by the end. Layers compute what those of any model do, but their
    share of the residual stream is small. The head is not tied, so that it can name the successor.
    """
    import torch
    from transformers import LlamaForCausalLM

    config = _config(SIZES[size], tied=False)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    width, longest = config.hidden_size, len(shares)
    codes = torch.randn(longest, width).sign()  # row n: the code of the token after which n are left
    codes[:, 0] = 0.0  # that place is the prompt's
    start = END_ID + 1
    tokens = torch.tensor([END_ID, *range(start + 1, start + longest)])  # by how many are left after them
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(QUIET)
            layer.mlp.down_proj.weight.mul_(QUIET)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[tokens[1:]] = codes[1:]
        embedding[start] = torch.eye(width)[0] * math.sqrt(width)
        # The norm before the head leaves all of them as they are, but for what the layers add.
        head.zero_()
        head[:, 0] = -CERTAIN / math.sqrt(width)
        head[tokens[:-1]] = codes[1:] * CERTAIN / width
        head[tokens, 0] = torch.tensor([math.log(max(share, 1e-9)) for share in shares]) / math.sqrt(width)
    return _save(model, folder)


def _config(shape: Size, *, tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END_ID,
    )


def _save(model: Any, folder: Path) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    _tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def _tokenizer(vocab: int) -> object:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<end>", *(chr(FIRST_CHARACTER + index) for index in range(vocab - 2))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
