"""The text of each token of a completion, so that tokens can be shown in colours of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_WINDOW = 32  # tokens that are decoded together at most: a character takes a few


def token_texts_of(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str] | None:
    """The text of each token; together they are `decode(token_ids)`. None where a text cannot be cut by its tokens.

    What a token adds depends on those before it (blanks, parts of characters), so each is decoded with a few of them. A
    character of several tokens belongs to the last one, and the others have the empty text.

    Example: the tokens of a space, and of the first two and the last two bytes of 🙂 -> [" ", "", "🙂"].
    """
    token_texts: list[str] = []
    start, whole = 0, 0  # tokens [start, whole) are the context: their text is complete, and is `known`
    known = ""
    for index in range(len(token_ids)):
        text = decode(token_ids[start : index + 1])
        if len(text) > len(known) and not text.endswith("\ufffd"):
            token_texts.append(text[len(known) :])
            start, whole = whole, index + 1
            known = decode(token_ids[start:whole])
        elif index + 1 - start >= MAX_WINDOW:  # bytes that are no characters: without a context from here on
            token_texts.append(text[len(known) :])
            start = whole = index + 1
            known = ""
        else:
            token_texts.append("")
    if whole < len(token_ids):
        token_texts[-1] = decode(token_ids[start:])[len(known) :]
    return token_texts if "".join(token_texts) == decode(token_ids) else None
