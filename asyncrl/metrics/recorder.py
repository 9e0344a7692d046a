"""Metrics of a run: typed records, written to metrics.jsonl, the console and Weights & Biases.

    metrics = Metrics.open(config, canary_tolerance=1e-4)
    metrics.log_step(StepMetrics.of_step(trainer_figures, version=1, interval_s=0.8, ...))
    metrics.close()

No torch here: the desk process logs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from asyncrl.config import Config
from asyncrl.metrics.alarms import Alarms
from asyncrl.metrics.sinks import ConsoleSink, JsonlSink, Sink
from asyncrl.metrics.types import AnyMetrics, EvalMetrics, StepMetrics, SyncMetrics
from asyncrl.metrics.wandb import WandbSink

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Stamps each record with the wall time of the run and hands it to every sink."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        alarms: Alarms,
        wall_offset_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """wall_offset_s: what earlier starts of the same run took."""
        self._sinks = list(sinks)
        self._alarms = alarms
        self._wall_offset_s = wall_offset_s
        self._clock = clock
        self._started_at = clock()

    @classmethod
    def open(cls, config: Config, canary_tolerance: float, stream: IO[str] | None = None) -> Metrics:
        """The sinks that `config` asks for; wall time goes on where an earlier start of the run stopped.

        canary_tolerance, in nats, is what one alarm is measured against (weights.canary_tolerance may be 0 = default).

        Raises OSError when run.dir cannot be written.
        """
        folder = Path(config.run.dir)
        file = JsonlSink(folder / METRICS_FILE)
        sinks: list[Sink] = [file, ConsoleSink(config.run.steps, stream)]
        if config.log.wandb != "off":
            sinks.append(WandbSink(config.log.wandb, config.log.wandb_project, config.run.name, folder, asdict(config)))
        return cls(sinks, Alarms(canary_tolerance), wall_offset_s=file.last_wall_s())

    def wall_s(self) -> float:
        """Seconds the run has taken so far, over all starts of the learner."""
        return self._wall_offset_s + self._clock() - self._started_at

    def log_step(self, metrics: StepMetrics) -> None:
        """Every step once, in order: alarms count steps in a row."""
        for change in self._alarms.update(metrics):
            log.log(logging.WARNING if change.is_on else logging.INFO, "%s", change.line)
        metrics.alarms = list(self._alarms.active)
        self._log(metrics)

    def log_sync(self, metrics: SyncMetrics) -> None:
        self._log(metrics)

    def log_eval(self, metrics: EvalMetrics) -> None:
        self._log(metrics)

    def close(self) -> None:
        """Prints the last line, flushes, and waits for wandb no longer than its deadline."""
        for sink in self._sinks:
            sink.close()

    def _log(self, metrics: AnyMetrics) -> None:
        if metrics.wall_s is None:
            metrics.wall_s = self.wall_s()
        for sink in self._sinks:
            sink.write(metrics)
