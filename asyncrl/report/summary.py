"""What a run came to, in figures: summary.json and the last lines, worked out from metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncrl.metrics.alarms import RULES
from asyncrl.metrics.ledger import in_words, shares
from asyncrl.metrics.sinks import clock_time
from asyncrl.report.advisor import Advice, bottleneck
from asyncrl.report.lengths import Lengths
from asyncrl.report.run_records import RunRecords, mean, measured, middle, total, totals

SUMMARY_FILE = "summary.json"
MAX_WINDOW_STEPS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was learned. Training rewards are noisy: first and last are means over `reward_window_steps` steps."""

    steps: int
    reward_first: float | None
    reward_last: float | None
    reward_window_steps: int
    eval_first: float | None
    eval_last: float | None
    eval_parts_first: Mapping[str, float | None]
    eval_parts_last: Mapping[str, float | None]
    eval_samples: int | None  # completions of each prompt in the last evaluation: the k of avg@k and pass@k
    eval_best_first: float | None  # of the best completion of each prompt
    eval_best_last: float | None
    eval_parts_best_first: Mapping[str, float | None]  # pass@k of a part that is 0 or 1
    eval_parts_best_last: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Flow:
    """What was generated, acknowledged, trained, dropped and lost."""

    tokens_generated: int
    tokens_trained: int
    tokens_generated_per_s: float | None
    tokens_trained_per_s: float | None
    policy_age_mean: float | None  # over tokens
    policy_age_max: int | None
    rollouts_acked: int
    rollouts_trained: int
    rollouts_dropped: int
    groups_filtered: int
    filtered_token_share: float | None
    dropped_by_length_decile: Sequence[int]
    rollouts_failed: Mapping[str, int]
    granted_tokens_mean: float | None  # mean length of what came in, of versions of which no prompt was still out
    granted_tokens_mean_trained: float | None  # the same of what was trained of it
    grant_age_mean: float | None  # over the rollouts that were trained
    grant_age_token_mean: float | None  # over their tokens

    @property
    def num_failed(self) -> int:
        """Rollouts that failed for any reason; what a stopping generator gave back has not."""
        return sum(count for reason, count in self.rollouts_failed.items() if reason != "returned")


@dataclass(frozen=True, slots=True)
class Health:
    """How far the policy was from what sampled its tokens, and the alarms that said so."""

    ess_share_min: float | None
    ess_share_median: float | None
    gap_engine_median: float | None
    gap_drift_median: float | None
    age_health: Mapping[str, Mapping[str, float]]
    alarms: Mapping[str, int]  # → steps after which it was on


@dataclass(frozen=True, slots=True)
class Syncs:
    """How versions reached the generators. Times are medians over the syncs that at least one generator committed."""

    sync_count: int
    sync_failed: int
    sync_pause_ms_median: float | None
    sync_total_ms_median: float | None
    sync_snapshot_ms_median: float | None
    sync_verify_ms_median: float | None
    sync_canary_ms_median: float | None
    sync_gb_per_s_median: float | None
    sync_retries: int
    canary_max_abs_diff: float | None
    canary_mean_abs_diff: float | None


@dataclass(frozen=True, slots=True)
class Idle:
    """How much learner and generators waited: idle time / all their time."""

    learner_idle_share: float | None
    generator_idle_share: float | None


@dataclass(frozen=True, slots=True)
class TimeSpent:
    """Where the time of learner and generators went, by activity; and what went on beside."""

    learner_time_s: Mapping[str, float]
    generator_time_s: Mapping[str, float]  # summed over generators
    learner_time_share: Mapping[str, float]
    generator_time_share: Mapping[str, float]
    overlapped_s: Mapping[str, float]
    bounded_by: str | None
    bounded_because: str | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A whole run in figures. What was never measured is None."""

    outcome: Outcome
    flow: Flow
    health: Health
    syncs: Syncs
    idle: Idle
    time: TimeSpent
    advice: Advice
    wall_s: float
    unreadable_lines: int

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json: all figures in one mapping; unreadable_lines only where there are any."""
        parts = (self.outcome, self.flow, self.health, self.syncs, self.idle, self.time)
        content = {name: value for part in parts for name, value in asdict(part).items()} | {"wall_s": self.wall_s}
        content |= {"changes": [asdict(change) for change in self.advice.changes], "changes_note": self.advice.note}
        return content | ({"unreadable_lines": self.unreadable_lines} if self.unreadable_lines else {})


def summarize(run: RunRecords, advice: Advice | None = None) -> RunSummary:
    """Works out the summary of a run. advice: what to change in it, where that was thought over."""
    return RunSummary(
        outcome=_outcome(run),
        flow=_flow(run),
        health=_health(run),
        syncs=_syncs(run),
        idle=_idle(run),
        time=_time(run),
        advice=advice or Advice(),
        wall_s=run.wall_s,
        unreadable_lines=run.unreadable_lines,
    )


def write_summary(run: RunRecords, advice: Advice | None = None) -> RunSummary:
    """Works out the summary of a run, writes it to summary.json in one move, and returns it.

    Raises OSError when it cannot be written.
    """
    summary = summarize(run, advice)
    target = run.run_dir / SUMMARY_FILE
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(summary.to_json(), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return summary


def _outcome(run: RunRecords) -> Outcome:
    """The window of first and last training rewards is a tenth of the steps: at least 1, at most 10."""
    window = max(1, min(MAX_WINDOW_STEPS, len(run.steps) // 10))
    first_eval = run.evals[0] if run.evals else None
    last_eval = run.evals[-1] if run.evals else None
    return Outcome(
        steps=run.steps[-1].version if run.steps else 0,
        reward_first=mean(step.reward_mean for step in run.steps[:window]),
        reward_last=mean(step.reward_mean for step in run.steps[-window:]),
        reward_window_steps=window,
        eval_first=first_eval.reward_mean if first_eval else None,
        eval_last=last_eval.reward_mean if last_eval else None,
        eval_parts_first=first_eval.reward_parts if first_eval else {},
        eval_parts_last=last_eval.reward_parts if last_eval else {},
        eval_samples=last_eval.samples if last_eval else None,
        eval_best_first=first_eval.reward_best_mean if first_eval else None,
        eval_best_last=last_eval.reward_best_mean if last_eval else None,
        eval_parts_best_first=first_eval.reward_parts_best if first_eval else {},
        eval_parts_best_last=last_eval.reward_parts_best if last_eval else {},
    )


def _flow(run: RunRecords) -> Flow:
    lines = run.step_lines
    interval_s = total(line.interval_s for line in lines)
    tokens_generated = total(line.tokens_generated for line in lines)
    tokens_trained = total(step.tokens_trained for step in run.steps)
    tokens_filtered = total(line.tokens_filtered for line in lines)
    failed: Counter[str] = Counter()
    for line in lines:
        failed.update(line.rollouts_failed)
    lengths = Lengths.of(lines, run.steps)
    by_grant = [step for step in run.steps if step.grant_age_mean is not None]
    deciles = measured(line.dropped_by_length_decile for line in lines)
    return Flow(
        tokens_generated=tokens_generated,
        tokens_trained=tokens_trained,
        tokens_generated_per_s=tokens_generated / interval_s if interval_s else None,
        tokens_trained_per_s=tokens_trained / interval_s if interval_s else None,
        policy_age_mean=_weighted((step.policy_age_mean, step.tokens_trained) for step in run.steps),
        policy_age_max=max(measured(step.policy_age_max for step in run.steps), default=None),
        rollouts_acked=total(line.rollouts_acked for line in lines),
        rollouts_trained=total(step.rollouts_trained for step in run.steps),
        rollouts_dropped=total(line.rollouts_dropped for line in lines),
        groups_filtered=total(line.groups_filtered for line in lines),
        filtered_token_share=tokens_filtered / (tokens_filtered + tokens_trained) if tokens_trained else None,
        dropped_by_length_decile=deciles[-1] if deciles else [],
        rollouts_failed=dict(failed),
        granted_tokens_mean=lengths.came_in_mean,
        granted_tokens_mean_trained=lengths.trained_mean,
        grant_age_mean=_weighted((step.grant_age_mean, step.rollouts_trained) for step in by_grant),
        grant_age_token_mean=_weighted((step.grant_age_token_mean, step.tokens_trained) for step in by_grant),
    )


def _weighted(figures: Iterable[tuple[float | None, int | None]]) -> float | None:
    """The mean of what was measured, by weight."""
    known = [(figure, weight) for figure, weight in figures if figure is not None and weight]
    return sum(figure * weight for figure, weight in known) / sum(weight for _, weight in known) if known else None


def _health(run: RunRecords) -> Health:
    return Health(
        ess_share_min=min(measured(step.ess_share for step in run.steps), default=None),
        ess_share_median=middle(step.ess_share for step in run.steps),
        gap_engine_median=middle(step.gap_engine for step in run.steps),
        gap_drift_median=middle(step.gap_drift for step in run.steps),
        age_health={bucket: _over_steps(steps) for bucket, steps in run.by_age().items()},
        alarms=run.alarm_steps(),
    )


def _over_steps(steps: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Figures of one bucket of ages over the run: the sum of tokens, the largest ratio_max, else means over tokens."""
    health: dict[str, float] = {}
    for name in sorted({name for step in steps for name in step}):
        figures = [(step.get(name), step.get("tokens") or 0) for step in steps]
        known = [(value, weight) for value, weight in figures if value is not None]
        tokens = sum(weight for _, weight in known)
        if name == "tokens":
            health[name] = tokens
        elif name == "ratio_max" and known:
            health[name] = max(value for value, _ in known)
        elif tokens:
            health[name] = sum(value * weight for value, weight in known) / tokens
    return health


def _syncs(run: RunRecords) -> Syncs:
    committed = [sync for sync in run.syncs if sync.generators_committed]
    return Syncs(
        sync_count=len(committed),
        sync_failed=len(run.syncs) - len(committed),
        sync_pause_ms_median=middle(sync.pause_ms for sync in committed),
        sync_total_ms_median=middle(sync.total_ms for sync in committed),
        sync_snapshot_ms_median=middle(sync.snapshot_ms for sync in committed),
        sync_verify_ms_median=middle(sync.verify_ms for sync in committed),
        sync_canary_ms_median=middle(sync.canary_ms for sync in committed),
        sync_gb_per_s_median=middle(sync.transfer_gb_per_s for sync in committed),
        sync_retries=total(sync.retries for sync in run.syncs),
        canary_max_abs_diff=max(measured(sync.canary_max_abs_diff for sync in committed), default=None),
        canary_mean_abs_diff=mean(sync.canary_mean_abs_diff for sync in committed),
    )


def _idle(run: RunRecords) -> Idle:
    interval_s = total(line.interval_s for line in run.step_lines)
    learner_idle_s = total(line.learner_idle_s for line in run.step_lines)
    busy_s = total(line.generator_busy_s for line in run.step_lines)
    idle_s = total(line.generator_idle_s for line in run.step_lines)
    return Idle(
        learner_idle_share=learner_idle_s / interval_s if interval_s else None,
        generator_idle_share=idle_s / (busy_s + idle_s) if busy_s + idle_s else None,
    )


def _time(run: RunRecords) -> TimeSpent:
    learner_s = totals(line.learner_time_s for line in run.step_lines)
    generator_s = totals(line.generator_time_s for line in run.step_lines)
    bound = bottleneck(learner_s, generator_s)
    return TimeSpent(
        learner_time_s=learner_s,
        generator_time_s=generator_s,
        learner_time_share=shares(learner_s),
        generator_time_share=shares(generator_s),
        overlapped_s=totals(line.overlapped_s for line in run.step_lines),
        bounded_by=bound.name if bound else None,
        bounded_because=bound.evidence if bound else None,
    )


# -- the last lines ------------------------------------------------------------------------------------------


def summary_lines(summary: RunSummary, run_dir: str | Path, page: str | Path) -> list[str]:
    """The last lines of a run: rewards, evaluation, throughput, off-policy health, and where the rest is."""
    outcome, flow = summary.outcome, summary.flow
    health, syncs = summary.health, summary.syncs
    return [
        f"{outcome.steps} steps in {clock_time(summary.wall_s)}",
        f"reward       first {_shown(outcome.reward_first)}   last {_shown(outcome.reward_last)}",
        f"evaluation   first {_shown(outcome.eval_first)}   last {_shown(outcome.eval_last)}{_avg_at(outcome)}",
        *_best_shown(outcome),
        (
            f"tokens/s     generated {_shown(flow.tokens_generated_per_s, ',.0f')}"
            f"   trained {_shown(flow.tokens_trained_per_s, ',.0f')}"
        ),
        (
            f"idle         learner {_shown(summary.idle.learner_idle_share, '.0%')}"
            f"   generator {_shown(summary.idle.generator_idle_share, '.0%')}"
        ),
        f"learner      {in_words(summary.time.learner_time_s)}",
        f"generators   {in_words(summary.time.generator_time_s)}",
        *_bound_shown(summary.time),
        *(f"{'change' if n == 0 else '':13}{line}" for n, line in enumerate(summary.advice.lines())),
        f"policy age   mean {_shown(flow.policy_age_mean, '.2f')}   max {_shown(flow.policy_age_max, 'd')}",
        *_lengths_shown(flow),
        (
            f"off-policy   ESS median {_shown(health.ess_share_median, '.2f')}"
            f"   min {_shown(health.ess_share_min, '.2f')}"
            f"   gap engine {_shown(health.gap_engine_median, '.1e')}"
            f"   drift {_shown(health.gap_drift_median, '.1e')} nats"
        ),
        f"alarms       {_alarms_shown(health.alarms)}",
        *(f"             {rule.figure}: {rule.advice}" for rule in RULES if rule.figure in health.alarms),
        (
            f"weight sync  {_shown(syncs.sync_total_ms_median, '.0f')} ms, of it generation paused "
            f"{_shown(syncs.sync_pause_ms_median, '.0f')} ms and training "
            f"{_shown(syncs.sync_snapshot_ms_median, '.1f')} ms (medians of {syncs.sync_count})"
        ),
        f"summary      {Path(run_dir) / SUMMARY_FILE}",
        f"report       {page}",
    ]


def _avg_at(outcome: Outcome) -> str:
    return f"   (avg@{outcome.eval_samples})" if outcome.eval_samples and outcome.eval_samples > 1 else ""


def _best_shown(outcome: Outcome) -> list[str]:
    """The best of several completions of a prompt: of each part of the reward, or of the whole where it has none."""
    if outcome.eval_samples is None or outcome.eval_samples < 2:
        return []
    lines = [
        (f"pass@{outcome.eval_samples} of {name}", outcome.eval_parts_best_first.get(name), last)
        for name, last in outcome.eval_parts_best_last.items()
    ] or [(f"best of {outcome.eval_samples}", outcome.eval_best_first, outcome.eval_best_last)]
    return [f"             first {_shown(first)}   last {_shown(last)}   ({name})" for name, first, last in lines]


def _lengths_shown(flow: Flow) -> list[str]:
    if flow.grant_age_mean is None:
        return []
    return [
        (
            f"lengths      granted {_shown(flow.granted_tokens_mean, '.1f')}   of them trained "
            f"{_shown(flow.granted_tokens_mean_trained, '.1f')} tokens   trained after "
            f"{_shown(flow.grant_age_mean, '.2f')} steps, tokens after {_shown(flow.grant_age_token_mean, '.2f')}"
        )
    ]


def _bound_shown(time: TimeSpent) -> list[str]:
    return [] if time.bounded_by is None else [f"bounded by   {time.bounded_by}: {time.bounded_because}"]


def _alarms_shown(alarms: Mapping[str, int]) -> str:
    return "   ".join(f"{name} in {count} steps" for name, count in alarms.items()) or "none"


def _shown(value: float | None, form: str = ".3f") -> str:
    return format(value, form) if value is not None else "-"
