"""What may travel with a prompt: a payload of plain values, checked when the example is made.

The lease carries it to a generator as msgpack, whose reader bounds nesting and the number of values. Whatever would
fail on the way is refused here, where the example can be named; numbers of numpy become Python's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncrl.errors import TaskError

MAX_LEVELS = 15  # of dicts and lists within each other, the payload itself included
MAX_VALUES = 60_000  # keys and values of all dicts and lists
ALLOWED = "texts, numbers, booleans, None, bytes, and lists and dicts of them"


def plain_payload(payload: object, max_bytes: int) -> dict[str, Any]:
    """The payload as it travels. max_bytes bounds the sum of its texts and bytes.

    Raises TaskError naming the key and the reason.
    """
    if not isinstance(payload, dict):
        raise TaskError(f"payload must be a dict, not {type(payload).__name__}")
    plain = _Plain(max_bytes)
    checked: dict[str, Any] = plain.of(payload, "payload", 1)
    return checked


class _Plain:
    """One walk over a payload."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values = 0
        self._bytes = 0

    def of(self, value: Any, where: str, level: int) -> Any:
        """The value in plain types. `where` is its name for messages, level the number of containers around it, + 1."""
        if isinstance(value, dict | list | tuple):
            return self._container(value, where, level)
        if isinstance(value, np.generic):
            native = value.item()
            if isinstance(native, np.generic):
                raise TaskError(f"{where} is {type(value).__name__}, which has no plain number: convert it")
            return self.of(native, where, level)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                raise TaskError(f"{where} is an integer of more than 64 bits: give it as a text")
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str | bytes):
            return self._counted(value, where)
        hint = ": use .tolist()" if isinstance(value, np.ndarray) else ""
        raise TaskError(f"{where} is of type {type(value).__name__}; a payload holds {ALLOWED}{hint}")

    def _container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], where: str, level: int) -> Any:
        if level > MAX_LEVELS:
            raise TaskError(f"{where[:80]}... is nested over {MAX_LEVELS} levels")
        self._values += len(value) * (2 if isinstance(value, dict) else 1)
        if self._values > MAX_VALUES:
            raise TaskError(f"{where} brings the payload over {MAX_VALUES} keys and values: give long lists as a text")
        if not isinstance(value, dict):
            return [self.of(item, f"{where}[{place}]", level + 1) for place, item in enumerate(value)]
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise TaskError(f"{where} has the key {key!r:.60}, a {type(key).__name__}: keys must be texts")
            plain[self._counted(key, f"a key of {where}")] = self.of(item, f"{where}[{key!r:.60}]", level + 1)
        return plain

    def _counted(self, value: str | bytes, where: str) -> str | bytes:
        """A text or bytes, of the plain type, whose size counts."""
        data = value if isinstance(value, bytes) else checked_text(value, where).encode()
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            raise TaskError(
                f"{where} brings the payload over {self._max_bytes} bytes, a quarter of transport.max_frame_bytes"
            )
        return bytes(data) if isinstance(value, bytes) else data.decode()


def checked_text(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8. Raises TaskError for a lone surrogate, half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TaskError(
            f"{where} holds the lone surrogate \\u{code:04x} at character {error.start}: half of a character"
        ) from None
    return text
