"""Metrics of a run: typed records (`types`), where they go (`recorder`, `sinks`, `wandb`), and `alarms` on them."""

from asyncrl.metrics.recorder import METRICS_FILE, Metrics
from asyncrl.metrics.sinks import iterate_records, newest_version, read_records
from asyncrl.metrics.types import EvalMetrics, StepMetrics, SyncMetrics

__all__ = [
    "METRICS_FILE",
    "EvalMetrics",
    "Metrics",
    "StepMetrics",
    "SyncMetrics",
    "iterate_records",
    "newest_version",
    "read_records",
]
