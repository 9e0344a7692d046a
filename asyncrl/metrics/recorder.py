"""The door of the metrics: each record gets its wall time, the alarms see it, and every sink writes it.

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
from asyncrl.metrics.wandb import WandbRun, WandbSink, kept_id

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
        """wall_offset_s: seconds that earlier starts of the same run took. clock: a monotonic time in seconds."""
        self._sinks = list(sinks)
        self._alarms = alarms
        self._wall_offset_s = wall_offset_s
        self._clock = clock
        self._started_at = clock()

    @classmethod
    def open(
        cls, config: Config, canary_tolerance: float, stream: IO[str] | None = None, more: Sequence[Sink] = ()
    ) -> Metrics:
        """Opens the sinks that `config` asks for; wall time goes on where an earlier start of the run stopped.

        canary_tolerance  nats, what one alarm is measured against: not the key weights.canary_tolerance, whose 0 stands
                          for a default, but the tolerance that the weight sync uses
        stream            where the progress lines go; standard output if None
        more              further sinks

        Raises OSError when run.dir cannot be written.
        """
        folder = Path(config.run.dir)
        file = JsonlSink(folder / METRICS_FILE)
        sinks: list[Sink] = [file, ConsoleSink(config.run.steps, stream), *more]
        if config.log.wandb != "off":
            online = config.log.wandb == "online"
            run = WandbRun(config.log.wandb_project, config.run.name, kept_id(folder), folder, asdict(config))
            sinks.append(WandbSink(run, online=online))
        return cls(sinks, Alarms(canary_tolerance), wall_offset_s=file.last_wall_s())

    def log_step(self, metrics: StepMetrics) -> None:
        """Logs a step. Each step comes once and in order, because alarms count steps in a row."""
        for change in self._alarms.update(metrics):
            log.log(logging.WARNING if change.is_on else logging.INFO, "%s", change.line)
        metrics.alarms = list(self._alarms.active)
        self._log(metrics)

    def log_sync(self, metrics: SyncMetrics) -> None:
        """Logs a round of weight sync."""
        self._log(metrics)

    def log_eval(self, metrics: EvalMetrics) -> None:
        """Logs an evaluation."""
        self._log(metrics)

    def close(self) -> None:
        """Prints the last progress line, closes the file, and waits for wandb no longer than its deadline."""
        for sink in self._sinks:
            sink.close()

    def _log(self, metrics: AnyMetrics) -> None:
        metrics.wall_s = self._wall_offset_s + self._clock() - self._started_at
        for sink in self._sinks:
            sink.write(metrics)
