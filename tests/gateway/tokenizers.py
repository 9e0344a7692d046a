"""A tokenizer for any chat template: byte-level BPE of few merges, and the special tokens that the template spells."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
BOS, EOS = "<s>", "</s>"

_SPELLED = re.compile(
    r"<\|[^|<>{}\s]{1,40}\|>|<｜[^｜]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_turn>"
)
_XML = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_ENDS = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "deepseekv3": "<｜end▁of▁sentence｜>"}
_ALSO = {"gptoss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]}


@cache
def trained() -> str:
    """JSON of the tokenizer without special tokens: 256 bytes and merges of a little text."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bare.train_from_iterator([(TEMPLATES / "qwen3.jinja").read_text(), Path(__file__).read_text()], trainer)
    return bare.to_str()


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """With the chat template NAME of `templates`."""
    return tokenizer_with(template_of(name), name)


def tokenizer_with(template: str, name: str) -> PreTrainedTokenizerFast:
    bare = Tokenizer.from_str(trained())
    spelled = {*_SPELLED.findall(template), *_ALSO.get(name, ())}
    spelled |= {text for text in _XML if text in template}
    eos = _ENDS.get(name, EOS)
    bare.add_special_tokens([AddedToken(text, special=True) for text in sorted({BOS, eos, *spelled})])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=BOS, eos_token=eos, name_or_path=name)
    tokenizer.chat_template = template
    return tokenizer
