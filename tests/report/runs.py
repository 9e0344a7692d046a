"""Records of made-up runs, and how they get into a metrics file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from asyncrl.metrics import METRICS_FILE, EvalMetrics, StepMetrics, SyncMetrics
from asyncrl.metrics.sinks import JsonlSink


def health(tokens: int, **given: Any) -> dict[str, float]:
    figures = {"ratio_mean": 1.0, "ratio_max": 2.0, "clip_fraction": 0.1, "kl_behaviour": 0.01, "masked_share": 0.0}
    return {"tokens": tokens, **figures, **given}


def step(version: int, **given: Any) -> StepMetrics:
    measured = {
        "interval_s": 2.0,
        "wall_s": 2.0 * version,
        "reward_mean": version / 100,
        "reward_std": 0.1,
        "policy_age_mean": 1.0,
        "policy_age_max": 2,
        "tokens_generated": 1000,
        "tokens_trained": 800,
        "rollouts_acked": 16,
        "rollouts_trained": 16,
        "learner_idle_s": 0.2,
        "generator_busy_s": 1.5,
        "generator_idle_s": 0.5,
        "learner_time_s": {"compute": 1.4, "data": 0.3, "snapshot": 0.299, "messages": 0.001},
        "generator_time_s": {"decode": 1.0, "leases": 0.5, "swap": 0.5},
        "overlapped_s": {"transfer": 0.25},
        "ess_share": 0.9,
        "gap_engine": 0.001,
        "gap_drift": 0.02,
        "age_health": {"0": health(200, ess_share=1.0), "1": health(600, ess_share=0.8)},
    }
    return StepMetrics(version=version, **{**measured, **given})


def sync(version: int, **given: Any) -> SyncMetrics:
    measured = {"wall_s": 2.0 * version, "total_ms": 80.0, "pause_ms": 10.0, "generators_committed": 1}
    return SyncMetrics(
        version=version, **{**measured, "canary_max_abs_diff": 1e-6, "canary_mean_abs_diff": 1e-7, **given}
    )


def evaluation(version: int, reward: float) -> EvalMetrics:
    return EvalMetrics(
        version=version, wall_s=2.0 * version, prompts=8, reward_mean=reward, reward_parts={"correct": reward}
    )


def write_run(folder: Path, metrics: Iterable[StepMetrics | SyncMetrics | EvalMetrics]) -> Path:
    """A run folder with these records."""
    sink = JsonlSink(folder / METRICS_FILE)
    for record in metrics:
        sink.write(record)
    sink.close()
    return folder


def whole(steps: int, **given: Any) -> list[StepMetrics | SyncMetrics | EvalMetrics]:
    """A run with an evaluation at both ends."""
    records: list[StepMetrics | SyncMetrics | EvalMetrics] = [evaluation(0, 0.25)]
    for version in range(1, steps + 1):
        records += [step(version, **given), sync(version, members=["gpu-0", "gpu-1"], generators_committed=2)]
    return [*records, evaluation(steps, 0.875)]
