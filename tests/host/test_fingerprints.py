"""Fingerprints: what must make two daemons refuse each other, and what must not."""

import json

import pytest

from asyncrl.errors import ModelError
from asyncrl.host.fingerprints import model_fingerprint, model_folder_fingerprint, tokenizer_fingerprint

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 50,
    "hidden_size": 16,
    "dtype": "float32",
    "transformers_version": "5.19.0",
}


def test_sizes_count_and_bookkeeping_does_not():
    same = {**dict(reversed(CONFIG.items())), "dtype": "bfloat16", "_name_or_path": "/elsewhere"}
    assert model_fingerprint(CONFIG) == model_fingerprint(same)
    assert model_fingerprint(CONFIG) != model_fingerprint({**CONFIG, "hidden_size": 32})
    assert len(model_fingerprint(CONFIG)) == 16


def test_a_folder_is_fingerprinted_by_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model_folder_fingerprint(str(tmp_path)) == model_fingerprint(CONFIG)
    with pytest.raises(ModelError, match="no such folder"):
        model_folder_fingerprint(str(tmp_path / "nowhere"))


def test_any_byte_of_the_tokenizer_counts(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("ab")
    first = tokenizer_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("aB")
    changed = tokenizer_fingerprint(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert len({first, changed, tokenizer_fingerprint(tmp_path)}) == 3
