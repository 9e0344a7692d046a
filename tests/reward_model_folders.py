"""Tiny random sequence-classification models with a character tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}"
MAX_LENGTH = 128


def make_tiny_reward_model(
    folder: Path, *, num_labels: int = 1, padding: bool = True, writes: bool = False, seed: int = 0
) -> Path:
    """A Qwen2 of some 70,000 parameters whose scores differ widely between texts; or one that writes text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
    )

    tokens = ["<pad>", "<end>", "<unknown>", *map(chr, range(32, 127))]
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        num_labels=num_labels,
        pad_token_id=0 if padding else None,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = (Qwen2ForCausalLM if writes else Qwen2ForSequenceClassification)(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>"} if padding else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>", **special)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def scores_by_transformers(folder: Path, texts: list[str]) -> list[list[float]]:
    """The reference: each text by itself, without padding and without a server."""
    from typing import cast

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = cast(Any, AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].tolist() for text in texts]
