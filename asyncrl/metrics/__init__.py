"""Metrics of a run: typed figures (`types`), where they go (`sinks`, `wandb`), and what they add up to (`report`)."""

from asyncrl.metrics.recorder import METRICS_FILE, Metrics
from asyncrl.metrics.sinks import read_records
from asyncrl.metrics.types import EvalMetrics, StepMetrics, SyncMetrics

__all__ = ["METRICS_FILE", "EvalMetrics", "Metrics", "StepMetrics", "SyncMetrics", "read_records"]
