"""Data, tasks, prompts and tokenizers that once ended a run or changed its numbers; each test names the fault."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from asyncrl.errors import ModelError
from asyncrl.host.tokenizer import load_tokenizer
from tests.faults.tokenizer_folders import TEXT, byte_level_folder


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "NoSuchClass"])
def test_W5_learner_and_generator_use_one_tokenizer_class(tmp_path, named):
    folder = byte_level_folder(tmp_path, tokenizer_class=named)
    tokenizer = load_tokenizer(str(folder))
    token_ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == TEXT
    # The generator's engine has no other way to a tokenizer.
    engine = Path(__file__).parents[2] / "asyncrl" / "generator" / "engines" / "vllm" / "engine.py"
    assert "load_tokenizer(self._options.model_path)" in engine.read_text()


def test_W5_rewards_see_the_text_as_it_was_written_whatever_the_tokenizer_config_says(tmp_path):
    folder = byte_level_folder(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"clean_up_tokenization_spaces": true,', 1))
    tokenizer = load_tokenizer(str(folder))
    text = "it 's 42 ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_W5_a_tokenizer_that_does_not_decode_what_it_encoded_is_refused_with_both_texts(tmp_path):
    from tokenizers import decoders

    folder = byte_level_folder(tmp_path, decoder=decoders.Fuse())
    with pytest.raises(ModelError, match=r"decodes 'Answer: it is 42\.' to 'Answer:ĠitĠisĠ42\.', with 'Ġ' that"):
        load_tokenizer(str(folder))


def test_W5_a_tokenizer_that_changes_blanks_alone_is_warned_of(tmp_path, caplog):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", "Answer", ":", "it", "is", "42", "."]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    byte_level_folder(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unknown>").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(str(tmp_path))
    assert "decodes 'Answer: it is 42.' to 'Answer : it is 42 .'" in caplog.text
