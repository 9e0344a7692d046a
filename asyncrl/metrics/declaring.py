"""How a figure is declared: with its unit, the sentence that defines it, and where it is shown."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

# Where a figure is shown besides metrics.jsonl (and Weights & Biases); alarms know their figures themselves.
LINE = "line"  # the progress line of a step, or the line of an evaluation
SUMMARY = "summary"  # summary.json, as it is or summed up over the run
REPORT = "report"  # report.html


def metric(
    unit: str, sentence: str, default: Any = MISSING, *, shown: tuple[str, ...] = (), adds_up: bool = False
) -> Any:
    """Declares one figure: its unit, the sentence that defines it, and where it is shown.

    adds_up says that the figures of several records make a total: Prometheus gets a counter. A list or dict default is
    a new, empty one for each instance.
    """
    metadata = {"unit": unit, "sentence": sentence, "shown": shown, "adds_up": adds_up}
    if isinstance(default, (dict, list)):
        return field(default_factory=type(default), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Derived:
    """How a property of StepMetrics is declared; the property's docstring is its sentence."""

    unit: str
    shown: tuple[str, ...] = ()
