"""A daemon's figures in the text format that Prometheus reads, made from their declarations.

A field NAME of the records of one kind is the metric asyncrl_KIND_NAME. Its help is the sentence of its declaration,
its unit a base unit: times are in seconds. A figure that adds up over the records is a counter and ends in _total; any
other is a gauge and shows the newest record, or nothing where that has none. Parts of a figure are labels.

No torch here, and no Prometheus library either: the desk must be up in a fraction of a second.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.metrics.types import DERIVED, AnyMetrics, StepMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_PARTS = 128  # of one figure: each is a time series, and the names come from the task and its rewards
MAX_LABEL = 80  # characters

# How the parts of a figure are labelled; names of generators (`members`) would be a time series for each life of one.
LABELS: dict[str, tuple[str, ...]] = {
    "reward_parts": ("part",),
    "reward_parts_best": ("part",),
    "rollouts_failed": ("reason",),
    "dropped_by_length_decile": ("decile",),
    "age_health": ("age", "figure"),
    "came_in_by_grant_age": ("age", "figure"),
    "trained_by_grant_age": ("age", "figure"),
    "alarms": ("alarm",),
    "extra": ("figure",),
    "learner_time_s": ("activity",),
    "generator_time_s": ("activity",),
    "overlapped_s": ("work",),
    "time_s": ("activity",),
    "engine_step_ms": ("part",),
}

Record = AnyMetrics | GeneratorMetrics
Labels = tuple[str, ...]


@dataclass(slots=True)
class Family:
    """One metric with all its samples: label values → value. A family without labels has one sample, under ()."""

    name: str
    kind: str  # counter or gauge
    help: str
    labels: Labels = ()
    samples: dict[Labels, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Its part of the text; nothing where there is no sample."""
        if not self.samples:
            return
        yield f"# HELP {self.name} {_escaped(self.help, quotes=False)}"
        yield f"# TYPE {self.name} {self.kind}"
        for values, number in self.samples.items():
            named = ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(self.labels, values, strict=True))
            yield f"{self.name}{{{named}}} {_number(number)}" if named else f"{self.name} {_number(number)}"


def families_of(record_type: type[Record]) -> dict[str, tuple[Family, float]]:
    """Field → its metric without samples, and what a value is multiplied by. Figures that are texts are left out."""
    found = {}
    for entry in fields(record_type):
        if entry.name in LABELS or str(entry.type).split(" ")[0] in ("int", "float", "bool"):
            meta = entry.metadata
            found[entry.name] = _family(record_type.kind, entry.name, meta["unit"], meta["sentence"], meta["adds_up"])
    if record_type is StepMetrics:
        for name, derived in DERIVED.items():
            sentence = " ".join((getattr(StepMetrics, name).__doc__ or "").split())
            found[name] = _family(StepMetrics.kind, name, derived.unit, sentence, False)
    return found


def _family(kind: str, name: str, unit: str, sentence: str, adds_up: bool) -> tuple[Family, float]:
    factor, base = 1.0, name
    if unit in ("s", "ms"):
        factor = 1e-3 if unit == "ms" else 1.0
        base = f"{name.removesuffix(f'_{unit}')}_seconds"
    full = f"asyncrl_{kind}_{base}{'_total' if adds_up else ''}"
    text = sentence if unit in ("s", "ms") else f"{sentence} Unit: {unit}."
    return Family(full, "counter" if adds_up else "gauge", text, LABELS.get(name, ())), factor


class Exposition:
    """The newest figures of one daemon and the totals since its start. Any thread may write, any may render."""

    def __init__(self, *kinds: type[Record]) -> None:
        self._lock = threading.Lock()
        self._families = {kind: families_of(kind) for kind in kinds}
        self._records = {kind: _count_of(kind) for kind in kinds}
        self._last_step: float | None = None  # on the monotonic clock

    def write(self, metrics: AnyMetrics) -> None:
        """Takes one record whose counts are increments, as a sink of the run's metrics."""
        with self._lock:
            self._take(metrics, adding=True)
            if isinstance(metrics, StepMetrics):
                self._last_step = time.monotonic()

    def close(self) -> None:
        """Nothing to do: what was written stays readable."""

    def replace(self, metrics: GeneratorMetrics) -> None:
        """Takes a record whose counts are totals already."""
        with self._lock:
            self._take(metrics, adding=False)

    def render(self, more: Sequence[Family] = ()) -> str:
        """The text of everything, `more` first."""
        with self._lock:
            known = [*(family for kind in self._families.values() for family, _ in kind.values()), *self._ages()]
            counts = list(self._records.values()) if StepMetrics in self._records else []
            return "".join(f"{line}\n" for family in (*more, *counts, *known) for line in family.lines())

    def _ages(self) -> list[Family]:
        if self._last_step is None:
            return []
        name, text = "asyncrl_newest_step_age_seconds", "Time since the learner took note of its newest step."
        return [Family(name, "gauge", text, samples={(): time.monotonic() - self._last_step})]

    def _take(self, record: Record, *, adding: bool) -> None:
        count = self._records[type(record)].samples
        count[()] = count.get((), 0.0) + 1
        for name, (family, factor) in self._families[type(record)].items():
            given = {labels: factor * value for labels, value in _parts(getattr(record, name), len(family.labels))}
            if family.kind == "gauge" or not adding:
                family.samples = given
                continue
            for labels, value in given.items():
                family.samples[labels] = family.samples.get(labels, 0.0) + value
            family.samples = dict(list(family.samples.items())[:MAX_PARTS])


def _count_of(kind: type[Record]) -> Family:
    text = f"Records of the kind {kind.kind} since this daemon started."
    return Family(f"asyncrl_{kind.kind}_records_total", "counter", text)


def _parts(value: Any, depth: int) -> list[tuple[Labels, float]]:
    """The samples that a figure stands for, at most MAX_PARTS: label values and number. depth: how many labels."""
    if value is None:
        return []
    if depth == 0:
        return [((), float(value))]
    if isinstance(value, Mapping):
        items = [(str(name), inner) for name, inner in value.items()]
    elif value and isinstance(value[0], str):  # names that are there: each counts as 1
        items = [(name, 1.0) for name in value]
    else:
        items = [(str(place), inner) for place, inner in enumerate(value)]
    found = [
        ((name[:MAX_LABEL], *labels), number) for name, inner in items for labels, number in _parts(inner, depth - 1)
    ]
    return found[:MAX_PARTS]


def _escaped(text: str, *, quotes: bool = True) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quotes else escaped


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
