"""Metrics as JSON: what a line of metrics.jsonl holds, and what Weights & Biases is sent."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from asyncrl.metrics.types import DERIVED, AnyMetrics, StepMetrics


def to_record(metrics: AnyMetrics) -> dict[str, Any]:
    """A mapping that is valid JSON: kind, every field, and the derived figures of a step.

    JSON has no NaN or infinity: such a figure becomes null and its name goes to `non_finite`.
    """
    record: dict[str, Any] = {"kind": metrics.kind}
    record.update((entry.name, getattr(metrics, entry.name)) for entry in fields(metrics))
    if isinstance(metrics, StepMetrics):
        record.update((name, getattr(metrics, name)) for name in DERIVED)
    non_finite: list[str] = []
    record = {name: _json_ready(name, value, non_finite) for name, value in record.items()}
    if non_finite:
        record["non_finite"] = non_finite
    return record


def _json_ready(name: str, value: Any, non_finite: list[str]) -> Any:
    if isinstance(value, dict):
        return {str(part): _json_ready(f"{name}.{part}", inner, non_finite) for part, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(f"{name}.{place}", inner, non_finite) for place, inner in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)  # numpy scalars included
    if math.isfinite(number):
        return number
    non_finite.append(name)
    return None
