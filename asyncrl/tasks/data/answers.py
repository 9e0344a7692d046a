"""Answers in texts: the last number, what a pattern finds, and equality with what is right."""

from __future__ import annotations

import re
from decimal import Decimal

from asyncrl.errors import TaskError

# 1,234.50 or 1234.50 or .5; a sign, before or after a $, counts unless it stands between two numbers (10-5).
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"((?<![\w.)])[-−]\$?|(?<![\w.)])\$-)?({DIGITS})")


def last_number(text: str) -> Decimal | None:
    """The last number in the text; commas between thousands and currency signs are no part of it."""
    number = None
    for number in _NUMBER.finditer(text):  # noqa: B007 - only the last is wanted
        pass
    if number is None:
        return None
    value = Decimal(number[2].replace(",", ""))
    return -value if number[1] else value


def answer_texts(answer: object) -> list[str]:
    """The right answers as stripped texts: of a text or number itself, of a list each of them.

    Raises TaskError, with a reason that can follow the place of a record, for anything else.
    """
    answers = answer if isinstance(answer, list | tuple) else [answer]
    if not answers or not all(isinstance(one, str | int | float) for one in answers):
        raise TaskError(f"has an answer that is no text, no number and no list of them: {answer!r:.80}")
    return [str(one).strip() for one in answers]
