"""The text of each token: together they are the whole text, and characters of several tokens stay whole."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from asyncrl.report.rollouts.token_texts import MAX_WINDOW, token_texts_of


def byte_level():
    """One token for each byte, and one for " the"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"Ġthe": 256, "Ġt": 257, "Ġth": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_metaspace():
    """As SentencePiece: a token that begins a word has a mark for the blank, which is dropped at the beginning."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def decode_with(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "token_texts"),
    [
        ("", []),
        ("a b", ["a", " ", "b"]),
        ("on the", ["o", "n", " the"]),
        ("é", ["", "é"]),
        ("x🙂!", ["x", "", "", "", "🙂", "!"]),
        ("東\n京", ["", "", "東", "\n", "", "", "京"]),
    ],
)
def test_each_token_has_its_text_and_a_character_belongs_to_its_last_token(text, token_texts):
    tokenizer = byte_level()
    assert token_texts_of(tokenizer.encode(text).ids, decode_with(tokenizer)) == token_texts


def test_a_character_that_was_cut_off_is_shown_as_the_tokenizer_shows_it():
    tokenizer = byte_level()
    ids = tokenizer.encode("ok 🙂").ids[:-2]
    assert "".join(token_texts_of(ids, decode_with(tokenizer))) == decode_with(tokenizer)(ids) == "ok \ufffd"


def test_a_blank_that_depends_on_the_token_before_is_there():
    tokenizer = with_metaspace()
    assert token_texts_of([0, 1, 2, 0], decode_with(tokenizer)) == ["a", " b", "c", " a"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_anything_are_the_whole_text_or_there_are_none(seed):
    """Random bytes are what an untrained model says: most of them are no characters."""
    tokenizer, rng = byte_level(), np.random.default_rng(seed)
    ids = rng.integers(0, 259, int(rng.integers(1, 200))).tolist()
    token_texts = token_texts_of(ids, decode_with(tokenizer))
    assert token_texts is None or ("".join(token_texts) == decode_with(tokenizer)(ids) and len(token_texts) == len(ids))


def test_a_text_that_cannot_be_cut_by_tokens_has_no_pieces():
    assert token_texts_of([1, 2, 3], lambda ids: str(len(ids))) is None


def test_no_more_than_a_few_tokens_are_decoded_at_once_but_for_the_whole():
    """Else a completion of n tokens would cost n squared."""
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return "\ufffd" * len(ids)

    token_texts_of(range(500), decode)
    assert max(sizes[:-1]) <= MAX_WINDOW and sizes[-1] == 500
