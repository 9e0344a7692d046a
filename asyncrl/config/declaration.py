"""How a configuration key is declared: default, sentence, what a change of it means to a run, and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class IfChanged(StrEnum):
    """What becomes of a run that is started again with another value of a key."""

    REFUSED = "refused"  # it would be another run, or the new value would have no effect on the old one
    ACCEPTED = "accepted"  # the run goes on with the new value, and says so
    RULED = "ruled"  # it depends on the two values: `desk.opening.changes` has the rule


REFUSED = IfChanged.REFUSED
ACCEPTED = IfChanged.ACCEPTED
RULED = IfChanged.RULED


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which values of a key's type are allowed; of a list, which elements."""

    choices: tuple[str, ...] = ()  # empty: any
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None


def key(default: Any, sentence: str, *, if_changed: IfChanged, shared: bool = False, **bounds: Any) -> Any:
    """Declares one key: its default, its sentence, and its bounds (the fields of `Bounds`).

    if_changed  what becomes of a run that is resumed with another value; every key has to choose
    shared      whether learner and generator must have the same value: it decides prompts or rewards on both sides

    A list or dict default is copied for each instance.
    """
    metadata = {"sentence": sentence, "if_changed": if_changed, "shared": shared, "bounds": Bounds(**bounds)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
