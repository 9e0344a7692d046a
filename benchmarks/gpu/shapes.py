"""Models with random weights in the shapes of real ones, made on the spot: nothing is downloaded."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " "


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen3 model with tied embeddings."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int

    @property
    def computed_parameters(self) -> int:
        """Parameters that every token is multiplied with: matrices of the layers, and the head."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden

    def training_flops(self, lengths: list[int]) -> float:
        """Floating-point operations of forward and backward pass of sequences: 6 per parameter, causal attention."""
        tokens, pairs = sum(lengths), sum(length * length / 2 for length in lengths)
        return 6 * self.computed_parameters * tokens + 12 * self.layers * self.heads * self.head_dim * pairs


SHAPES = {
    "0.6B": Shape(151936, 1024, 28, 16, 8, 128, 3072),
    "4B": Shape(151936, 2560, 36, 32, 8, 128, 9728),
    "tiny": Shape(512, 64, 2, 2, 1, 32, 128),
}


def make_model(folder: Path, name: str, device: str) -> None:
    """Writes a model in bfloat16, and a tokenizer of one character per token; what is there already stays."""
    shape = SHAPES[name]
    if (folder / "tokenizer.json").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _tokenizer(shape.vocab).save_pretrained(folder)


def _tokenizer(vocab: int) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, END, UNKNOWN, *CHARACTERS]
    tokens += [f"<{number}>" for number in range(vocab - len(tokens))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)
