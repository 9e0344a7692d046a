"""What a generator tells of itself at `/metrics`. The run's own figures are the learner's, see `metrics.types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from asyncrl.metrics.declaring import metric


@dataclass(slots=True, kw_only=True)
class GeneratorMetrics:
    """One generator, as it stands. Counts and times are totals since its start; nothing of it is in metrics.jsonl."""

    kind: ClassVar[str] = "generator"

    tokens_generated: int = metric("tokens", "Completion tokens that the engine sampled.", 0, adds_up=True)
    rollouts_completed: int = metric("rollouts", "Rollouts that were generated and rewarded.", 0, adds_up=True)
    generations_failed: int = metric("leases", "Leases whose generation the engine failed.", 0, adds_up=True)
    rewards_failed: int = metric("rollouts", "Rollouts whose reward could not be had.", 0, adds_up=True)
    time_s: dict[str, float] = metric("s", "All of its time, by activity.", {}, adds_up=True)
    busy_s: float = metric("s", "Time with a sequence in the engine: swap, decode and eval.", 0.0, adds_up=True)
    idle_s: float = metric("s", "The rest of the time since the engine was up.", 0.0, adds_up=True)
    cpu_s: float = metric("s", "CPU time of all its processes.", 0.0, adds_up=True)
    engine_step_ms: dict[str, float] = metric("ms", "What a step of its engine takes, by part.", {})
    leases: int = metric("leases", "Leases in hand.", 0)
    outbox_bytes: int = metric("bytes", "Size of the groups that the learner has not acknowledged yet.", 0)
    held_version: int | None = metric("steps", "Policy version that the engine holds.", None)
