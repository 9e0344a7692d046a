"""The end of a run: summary.json, picture and last lines; `python -m asyncrl.report.summary RUN_DIR` repeats it.

Everything is worked out from metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncrl.errors import AsyncRLError, UserError
from asyncrl.metrics.sinks import clock_time
from asyncrl.report.picture import draw
from asyncrl.report.run_records import Record, RunRecords, alarm_steps, by_age, mean, middle, total, values

SUMMARY_FILE = "summary.json"


def write_summary(run_dir: str | Path) -> dict[str, Any]:
    """Works out the summary of a run, writes it to summary.json in one move, and returns it.

    What was never measured is None. Raises UserError when run_dir has no metrics file.
    """
    run = RunRecords(run_dir)
    summary = {**_outcome(run), **_flow(run), **_health(run), **_syncs(run), **_idle(run), "wall_s": run.wall_s}
    if run.unreadable_lines:
        summary["unreadable_lines"] = run.unreadable_lines
    target = run.run_dir / SUMMARY_FILE
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return summary


def _outcome(run: RunRecords) -> dict[str, Any]:
    """Training rewards are noisy: first and last are means over a tenth of the steps, at most 10, at least "
    "1."""
    window = max(1, min(10, len(run.steps) // 10))
    first, last = run.evals[:1], run.evals[-1:]
    return {
        "steps": run.steps[-1]["version"] if run.steps else 0,
        "reward_first": mean(run.steps[:window], "reward_mean"),
        "reward_last": mean(run.steps[-window:], "reward_mean"),
        "reward_window_steps": window,
        "eval_first": mean(first, "reward_mean"),
        "eval_last": mean(last, "reward_mean"),
        "eval_parts_first": first[0].get("reward_parts", {}) if first else {},
        "eval_parts_last": last[0].get("reward_parts", {}) if last else {},
    }


def _flow(run: RunRecords) -> dict[str, Any]:
    failed: Counter[str] = Counter()
    for line in run.step_lines:
        failed.update(line.get("rollouts_failed") or {})
    deciles = values(run.step_lines, "dropped_by_length_decile")
    tokens_trained = total(run.steps, "tokens_trained")
    tokens_filtered = total(run.step_lines, "tokens_filtered")
    weighted = sum((step.get("policy_age_mean") or 0.0) * (step.get("tokens_trained") or 0) for step in run.steps)
    interval_s = total(run.step_lines, "interval_s")
    tokens_generated = total(run.step_lines, "tokens_generated")
    return {
        "tokens_generated": tokens_generated,
        "tokens_trained": tokens_trained,
        "tokens_generated_per_s": tokens_generated / interval_s if interval_s else None,
        "tokens_trained_per_s": tokens_trained / interval_s if interval_s else None,
        "policy_age_mean": weighted / tokens_trained if tokens_trained else None,
        "policy_age_max": max(values(run.steps, "policy_age_max"), default=None),
        "rollouts_acked": total(run.step_lines, "rollouts_acked"),
        "rollouts_trained": total(run.steps, "rollouts_trained"),
        "rollouts_dropped": total(run.step_lines, "rollouts_dropped"),
        "groups_filtered": total(run.step_lines, "groups_filtered"),
        "filtered_token_share": tokens_filtered / (tokens_filtered + tokens_trained) if tokens_trained else None,
        "dropped_by_length_decile": deciles[-1] if deciles else [],
        "rollouts_failed": dict(failed),
    }


def _health(run: RunRecords) -> dict[str, Any]:
    return {
        "ess_share_min": min(values(run.steps, "ess_share"), default=None),
        "ess_share_median": middle(run.steps, "ess_share"),
        "gap_engine_median": middle(run.steps, "gap_engine"),
        "gap_drift_median": middle(run.steps, "gap_drift"),
        "age_health": {bucket: _over_steps(steps) for bucket, steps in by_age(run.steps).items()},
        "alarms": alarm_steps(run.steps),
    }


def _over_steps(steps: Sequence[Record]) -> dict[str, float]:
    """Figures of one age bucket over the run: tokens added up, the largest ratio_max, means over tokens of the rest."""
    health: dict[str, float] = {}
    for name in sorted({name for step in steps for name in step} - {"wall_s"}):
        measured = [(step[name], step["tokens"]) for step in steps if step.get(name) is not None]
        if name == "tokens":
            health[name] = sum(value for value, _ in measured)
        elif name == "ratio_max":
            health[name] = max(value for value, _ in measured)
        elif measured:
            health[name] = sum(value * tokens for value, tokens in measured) / sum(tokens for _, tokens in measured)
    return health


def _syncs(run: RunRecords) -> dict[str, Any]:
    """Times are medians over the syncs that at least one generator committed."""
    committed = [sync for sync in run.syncs if sync.get("generators_committed")]
    return {
        "sync_count": len(committed),
        "sync_failed": len(run.syncs) - len(committed),
        "sync_pause_ms_median": middle(committed, "pause_ms"),
        "sync_total_ms_median": middle(committed, "total_ms"),
        "sync_snapshot_ms_median": middle(committed, "snapshot_ms"),
        "sync_verify_ms_median": middle(committed, "verify_ms"),
        "sync_canary_ms_median": middle(committed, "canary_ms"),
        "sync_gb_per_s_median": middle(committed, "transfer_gb_per_s"),
        "sync_retries": total(run.syncs, "retries"),
        "canary_max_abs_diff": max(values(committed, "canary_max_abs_diff"), default=None),
        "canary_mean_abs_diff": mean(committed, "canary_mean_abs_diff"),
    }


def _idle(run: RunRecords) -> dict[str, Any]:
    interval_s = total(run.step_lines, "interval_s")
    busy, idle = total(run.step_lines, "generator_busy_s"), total(run.step_lines, "generator_idle_s")
    return {
        "learner_idle_share": total(run.step_lines, "learner_idle_s") / interval_s if interval_s else None,
        "generator_idle_share": idle / (busy + idle) if busy + idle else None,
    }


# -- the last lines ------------------------------------------------------------------------------------------


def summary_lines(summary: dict[str, Any], run_dir: str | Path, picture: Path | None) -> list[str]:
    """The last lines of a run: rewards, evaluation, throughput, off-policy health, and where the rest is."""
    lines = [
        f"{summary['steps']} steps in {clock_time(summary['wall_s'])}",
        f"reward       first {_shown(summary['reward_first'])}   last {_shown(summary['reward_last'])}",
        f"evaluation   first {_shown(summary['eval_first'])}   last {_shown(summary['eval_last'])}",
        f"tokens/s     generated {_shown(summary['tokens_generated_per_s'], ',.0f')}"
        f"   trained {_shown(summary['tokens_trained_per_s'], ',.0f')}",
        f"idle         learner {_shown(summary['learner_idle_share'], '.0%')}"
        f"   generator {_shown(summary['generator_idle_share'], '.0%')}",
        f"policy age   mean {_shown(summary['policy_age_mean'], '.2f')}   max {_shown(summary['policy_age_max'], 'd')}",
        f"off-policy   ESS median {_shown(summary['ess_share_median'], '.2f')}"
        f"   min {_shown(summary['ess_share_min'], '.2f')}   gap engine {_shown(summary['gap_engine_median'], '.1e')}"
        f"   drift {_shown(summary['gap_drift_median'], '.1e')} nats",
        f"alarms       {_alarms_shown(summary['alarms'])}",
        f"weight sync  {_shown(summary['sync_total_ms_median'], '.0f')} ms, of it generation paused "
        f"{_shown(summary['sync_pause_ms_median'], '.0f')} ms and training "
        f"{_shown(summary['sync_snapshot_ms_median'], '.1f')} ms (medians of {summary['sync_count']})",
        f"summary      {Path(run_dir) / SUMMARY_FILE}",
    ]
    if picture is not None:
        lines.append(f"picture      {picture}")
    return lines


def print_summary(run_dir: str | Path, picture: Path | None = None) -> None:
    """Prints the last lines of a run from its summary.json.

    Raises UserError when `write_summary` has not been called for run_dir.
    """
    path = Path(run_dir) / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = f"`python -m asyncrl.report.summary {run_dir}` makes it"
        raise UserError(f"{path}: there is no such file; {remedy}") from None
    print("\n".join(summary_lines(summary, run_dir, picture)), flush=True)


def _alarms_shown(alarms: dict[str, int]) -> str:
    return "   ".join(f"{name} in {count} steps" for name, count in alarms.items()) or "none"


def _shown(value: float | None, form: str = ".3f") -> str:
    return format(value, form) if value is not None else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m asyncrl.report.summary RUN_DIR`; exit code 2 when that is no run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m asyncrl.report.summary RUN_DIR", file=sys.stderr)
        return 2
    try:
        write_summary(arguments[0])
        print_summary(arguments[0], draw(arguments[0]))
    except AsyncRLError as error:
        print(f"asyncrl.report.summary: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
