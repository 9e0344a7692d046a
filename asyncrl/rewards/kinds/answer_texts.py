r"""Texts around a mathematical answer: signs of currencies, boxes, and what looks like arithmetic and is none."""

from __future__ import annotations

import re

# \$ and other signs of currencies, with the country before them.
_CURRENCY = re.compile(r"(?:\b(?:US|CA|AU|NZ|HK)\s?)?(?:(?<!\\)\\\$|[€£¥₹])")
_CURRENCY_WORD = r"(?:dollars?|euros?|pounds?|USD|EUR|GBP)"
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
# What may stand between boxes that are one answer, as in \boxed{1}, \boxed{2} and \boxed{3}.
_JOINT = re.compile(r"(?:[\s,;&$]|\\[,;: ]|\\q?quad\b|\band\b|\bor\b|\\text\s*\{\s*(?:and|or|,)\s*\})*")

_DATE = (
    r"\d{4}(?P<s1>[-/.])(?:1[0-2]|0?[1-9])(?P=s1)(?:3[01]|[12]\d|0?[1-9])"
    r"|(?:3[01]|[12]\d|0?[1-9])(?P<s2>[-/.])(?:3[01]|[12]\d|0?[1-9])(?P=s2)\d{4}"
)
_LITERAL = re.compile(rf"(?<![\w.])(?:{_DATE}|\d+(?:\.\d+){{2,}})(?![\w]|[-/]\d)")

_GROUPED = re.compile(r"([-+]?\d{1,3})((?:(?:[ ',\u00a0\u202f]|\{,\}|\\[,; ])\d{3})+)(\.\d+)?")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_AMOUNT = re.compile(rf"(?i)(?:{_CURRENCY_WORD}\s*)?([-+]?[\d.,]*\d)(?:\s*{_CURRENCY_WORD})?\.?")


def plain_signs(text: str) -> str:
    r"""The text without signs of currencies, and with plain ones for minus and percent: \$18.90 -> 18.90."""
    return _CURRENCY.sub("", text).replace("\u2212", "-").replace(r"\%", "%")


def literal_of(text: str) -> tuple[int, ...] | None:
    """The numbers of a text that is nothing but a date or a number with several points; None for any other text.

    Example: "2023-05-01" -> (2023, 5, 1), "$1.2.3$" -> (1, 2, 3), "2023" -> None.
    """
    match = _LITERAL.fullmatch(_content(text))
    return None if match is None else _numbers(match[0])


def last_literal(text: str) -> tuple[int, ...] | None:
    """That of the last box, which must be nothing else, or without a box the last one in the text."""
    if _boxes(text):
        return literal_of(text)
    found = [match[0] for match in _LITERAL.finditer(text)]
    return _numbers(found[-1]) if found else None


def without_literals(text: str) -> str:
    """The text without dates and the like, which a parser of formulas would take for differences and quotients."""
    return _LITERAL.sub(" ", text)


def last_answer(text: str) -> str:
    r"""The part of a text that holds its final expression, written so that it is read as one number if it is one.

    Example: "\boxed{1} or rather \boxed{3}" -> "\boxed{3}", "\boxed{5 000}" -> "$5000$", "x is $2$" as it is.
    """
    boxes = _boxes(text)
    number = _as_number(_content(text))
    if number is not None:
        return f"${number}$"
    if not boxes:
        return text
    first = len(boxes) - 1
    while first and _JOINT.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    return text[boxes[first][0] : boxes[-1][1]]


def _content(text: str) -> str:
    """What stands in the last box, or without one the whole text, without $ around it."""
    boxes = _boxes(text)
    if boxes:
        text = _BOX.sub("", text[slice(*boxes[-1])], count=1)[:-1]
    return text.strip().strip("$").strip()


def _boxes(text: str) -> list[tuple[int, int]]:
    """Begin and end of each box that is closed and not inside of another, in order."""
    boxes: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the box of each open brace begins; None for any other brace
    for token in _BRACE.finditer(text):
        if token[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()
                boxes.append((begin, token.end()))
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.start() if token[0] != "{" else None)
    return boxes


def _as_number(text: str) -> str | None:
    """A text that is one number in a form of everyday life, in LaTeX; None for any other."""
    if match := _GROUPED.fullmatch(text):
        return match[1] + re.sub(r"\D", "", match[2]) + (match[3] or "")
    if match := _MIXED.fullmatch(text):
        return rf"{match[1]}({match[2]}+\frac{{{match[3]}}}{{{match[4]}}})"
    if match := _SCIENTIFIC.fullmatch(text):
        return rf"{match[1]} \times 10^{{{int(match[2])}}}"
    if (match := _AMOUNT.fullmatch(text)) and match[1] != text:
        return _as_number(match[1]) or match[1]
    return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
