"""Texts of servers without the keys that they repeat: what they say goes into logs, messages and the journal."""

from __future__ import annotations

import re
from collections.abc import Iterable

REPLACEMENT = "[key]"
_LEAST = 8  # characters in a row that give a key away: servers repeat beginnings and ends, too

_AUTHORIZATION = re.compile(
    r"""(?ix) ( \b (?: proxy-)? authorization ["']? \s* [:=] \s* ["']? ) (?: [a-z]+ \s+ )? [^\s"',;}\]]+
      | ( \b (?: bearer|basic ) \s+ ) [\w.~+/=-]{6,}
      | ( \b (?: x-)? api[-_\s]?key ["']? \s* [:=] \s* ["']? ) [^\s"',;}\]]+ """
)


def redacted(text: str, keys: Iterable[str]) -> str:
    """The text without any of the keys, whole or in part, and without the values of authorization headers.

    Example: key "sk-0123456789", text "no sk-012345678..." -> "no [key]..."
    """
    hidden = [False] * len(text)
    for key in keys:
        size = min(_LEAST, len(key))
        pieces = {key[start : start + size] for start in range(len(key) - size + 1)} if key else set()
        for start in range(len(text) - size + 1):
            if text[start : start + size] in pieces:
                hidden[start : start + size] = [True] * size
    shown = []
    for place, character in enumerate(text):
        if not hidden[place]:
            shown.append(character)
        elif place == 0 or not hidden[place - 1]:
            shown.append(REPLACEMENT)
    return _AUTHORIZATION.sub(lambda found: next(filter(None, found.groups()), "") + REPLACEMENT, "".join(shown))
