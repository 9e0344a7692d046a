"""The tokenizer of a model folder: one loader for every process, so that all of them read and write the same text.

The desk's helper encodes prompts with it and the generator decodes completions with it. transformers' own auto classes
are no substitute: they go by the class that tokenizer_config.json names, which may build another pipeline than the one
in tokenizer.json (`LlamaTokenizerFast` over a byte-level vocabulary decodes to `Answer:ĠitĠis`). And they import torch.
"""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.errors import ModelError
from asyncrl.host.model_folder import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# Texts that show what a decoder leaves behind: marks for blanks and line ends, parts of words, single bytes.
SAMPLES = ("Answer: it is 42.", "def f(x):\n    return x + 1\n", "naïve 東京 🙂")


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder (or cached hub name), as its tokenizer.json says, without importing torch.

    Raises ModelError when there is none, when it has no tokenizer.json or no end token, or when it does not decode what
    it encoded (`check_round_trip`).
    """
    folder = find_model(path).folder
    check_tokenizer_file(folder, f"model.path={path}")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise ModelError(
            f"model.path={path}: the tokenizer cannot be loaded ({type(error).__name__}: {error}); copy it again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path={path}: the tokenizer has no eos_token; name one in tokenizer_config.json")
    tokenizer.clean_up_tokenization_spaces = False  # a reward sees the text as it was written: "it 's", not "it's"
    check_round_trip(tokenizer, f"model.path={path}")
    return tokenizer


def check_tokenizer_file(folder: Path, key: str) -> None:
    """Raises ModelError, which begins with `key`, where a model folder has no tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{key} has no tokenizer.json; convert its tokenizer once with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def check_round_trip(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Encodes and decodes a few telling texts; a text that the vocabulary cannot express says nothing.

    Raises ModelError, which begins with `where`, when characters come out that did not go in: then rewards would not
    see what the model said. Blanks, case and Unicode's normal forms may change; that is logged as a warning.
    """
    for text in SAMPLES:
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in token_ids:
            continue
        decoded = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(decoded, str), "the text of one sequence is one text"
        if decoded == text:
            continue
        before, after = _bare(text), _bare(decoded)
        if strange := sorted({char for char in decoded if set(_bare(char)) - set(before)}):
            raise ModelError(
                f"{where}: the tokenizer decodes {text!r} to {decoded!r}, with {', '.join(map(repr, strange))} that "
                "the text does not hold, and so would every completion be; repair the decoder in tokenizer.json, for "
                "example by saving the tokenizer again with the class that it was made with"
            )
        if len(after) == len(before) and decoded != "".join(text.split()):  # a vocabulary without blanks drops them
            log.warning("%s: the tokenizer decodes %r to %r; rewards see completions so changed", where, text, decoded)
            return


def _bare(text: str) -> str:
    """The text without blanks, case and the differences that Unicode's normal forms take away."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
