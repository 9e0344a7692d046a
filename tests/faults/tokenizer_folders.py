"""Model folders that hold a tokenizer and nothing to compute with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEXT = "Question: is it 42?\nAnswer: it is 42."
END_ID, BEGIN_ID = 1, 2


def byte_level_folder(
    folder: Path,
    *,
    tokenizer_class: str = "PreTrainedTokenizerFast",
    template: str = "",
    chat_template: str = "",
    decoder: Any = None,
    extra_tokens: Sequence[str] = (),
) -> Path:
    """A byte-level BPE tokenizer, whose tokenizer_config.json names `tokenizer_class`.

    template: what is put around a text, such as `$A <end>`. extra_tokens: such that the embedding has no row for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>", "<begin>"]
    raw.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    if template:
        raw.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<end>", END_ID), ("<begin>", BEGIN_ID)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", chat_template=chat_template or None
    )
    rows = len(fast)
    fast.add_tokens(list(extra_tokens), special_tokens=True)
    fast.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder
