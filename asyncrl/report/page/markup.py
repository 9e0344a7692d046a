"""Texts that become part of a page: escaped, unless they were made here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable

from asyncrl.host.printing import printable


class Html(str):
    """Markup. Any other text is escaped before it becomes part of some."""

    __slots__ = ()


def markup(template: str, *values: object) -> Html:
    """`template` with its {} replaced by the values, which are escaped unless they are markup themselves.

    What a text has of control characters, and of marks that reverse the direction of writing, is shown escaped.
    """
    return Html(template.format(*(value if isinstance(value, Html) else escaped(str(value)) for value in values)))


def escaped(text: str) -> Html:
    """`text` as markup, also between quotation marks."""
    return Html(html.escape(printable(text), quote=True))


def joined(parts: Iterable[Html]) -> Html:
    """Pieces of markup one after the other."""
    return Html("".join(parts))


def json_block(name: str, content: object) -> Html:
    """Data for the page's script, in a block that nothing runs as code and that no text in it can end.

    Raises ValueError for NaN and infinities, which are not JSON.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def shown(value: float | None, form: str = ".3g") -> str:
    """A figure in words; a dash where it was not measured."""
    return "–" if value is None else format(value, form)
