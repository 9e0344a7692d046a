"""Text of others, made fit for a log and a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with everything escaped that a terminal or a line of a log would obey.

    Control characters, newlines, and the marks that reverse the direction of writing become \n, \x1b, \u202e.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
