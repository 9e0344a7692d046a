"""How a configuration key is declared: its default, its sentence and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which values of a key's type are allowed; of a list, which elements."""

    choices: tuple[str, ...] = ()  # empty: any
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None


def key(default: Any, sentence: str, **bounds: Any) -> Any:
    """Declares one key: its default, its sentence, and its bounds (the fields of `Bounds`).

    A list or dict default is copied for each instance.
    """
    metadata = {"sentence": sentence, "bounds": Bounds(**bounds)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
