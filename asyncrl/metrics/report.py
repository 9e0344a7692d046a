"""The end of a run: summary.json, picture and last lines; `python -m asyncrl.metrics.report RUN_DIR` repeats it.

Everything is worked out from metrics.jsonl. After a crash some versions were trained again, from the journal:
of those the newest line counts for what was trained, while what was generated, acknowledged or dropped is
summed over all lines, because each is an increment that happened.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from asyncrl.errors import AsyncRLError, UserError
from asyncrl.metrics import METRICS_FILE, read_records
from asyncrl.metrics.sinks import clock_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUMMARY_FILE = "summary.json"
PICTURE_FILE = "report.png"

Record = dict[str, Any]


class RunRecords:
    """The records of one run, sorted by kind."""

    def __init__(self, run_dir: str | Path) -> None:
        """Raises UserError when run_dir has no metrics file."""
        self.run_dir = Path(run_dir)
        path = self.run_dir / METRICS_FILE
        try:
            records, self.unreadable_lines = read_records(path)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; give the run.dir of a run that has started") from None
        self.step_lines = [record for record in records if record.get("kind") == "step"]
        self.syncs = [record for record in records if record.get("kind") == "sync"]
        self.evals = sorted(_newest(record for record in records if record.get("kind") == "eval"), key=_version)
        self.steps = sorted(_newest(self.step_lines), key=_version)
        self.wall_s = max((record.get("wall_s") or 0.0 for record in records), default=0.0)


def _newest(records: Iterable[Record]) -> list[Record]:
    """The last record of each version."""
    return list({record["version"]: record for record in records}.values())


def _version(record: Record) -> int:
    return record["version"]


def write_summary(run_dir: str | Path) -> dict[str, Any]:
    """Works out the summary of a run, writes it to summary.json in one move, and returns it.

    What was never measured is None. Raises UserError when run_dir has no metrics file.
    """
    run = RunRecords(run_dir)
    summary = {**_outcome(run), **_flow(run), **_syncs(run), **_idle(run), "wall_s": run.wall_s}
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
        "reward_first": _mean(run.steps[:window], "reward_mean"),
        "reward_last": _mean(run.steps[-window:], "reward_mean"),
        "reward_window_steps": window,
        "eval_first": _mean(first, "reward_mean"),
        "eval_last": _mean(last, "reward_mean"),
        "eval_parts_first": first[0].get("reward_parts", {}) if first else {},
        "eval_parts_last": last[0].get("reward_parts", {}) if last else {},
    }


def _flow(run: RunRecords) -> dict[str, Any]:
    failed: Counter[str] = Counter()
    for line in run.step_lines:
        failed.update(line.get("rollouts_failed") or {})
    deciles = _values(run.step_lines, "dropped_by_length_decile")
    tokens_trained = _total(run.steps, "tokens_trained")
    weighted = sum((step.get("policy_age_mean") or 0.0) * (step.get("tokens_trained") or 0) for step in run.steps)
    interval_s = _total(run.step_lines, "interval_s")
    tokens_generated = _total(run.step_lines, "tokens_generated")
    return {
        "tokens_generated": tokens_generated,
        "tokens_trained": tokens_trained,
        "tokens_generated_per_s": tokens_generated / interval_s if interval_s else None,
        "tokens_trained_per_s": tokens_trained / interval_s if interval_s else None,
        "policy_age_mean": weighted / tokens_trained if tokens_trained else None,
        "policy_age_max": max(_values(run.steps, "policy_age_max"), default=None),
        "rollouts_acked": _total(run.step_lines, "rollouts_acked"),
        "rollouts_trained": _total(run.steps, "rollouts_trained"),
        "rollouts_dropped": _total(run.step_lines, "rollouts_dropped"),
        "dropped_by_length_decile": deciles[-1] if deciles else [],
        "rollouts_failed": dict(failed),
    }


def _syncs(run: RunRecords) -> dict[str, Any]:
    """Times are medians over the syncs that at least one generator committed."""
    committed = [sync for sync in run.syncs if sync.get("generators_committed")]
    return {
        "sync_count": len(committed),
        "sync_failed": len(run.syncs) - len(committed),
        "sync_pause_ms_median": _middle(committed, "pause_ms"),
        "sync_total_ms_median": _middle(committed, "total_ms"),
        "canary_max_abs_diff": max(_values(committed, "canary_max_abs_diff"), default=None),
    }


def _idle(run: RunRecords) -> dict[str, Any]:
    interval_s = _total(run.step_lines, "interval_s")
    busy, idle = _total(run.step_lines, "generator_busy_s"), _total(run.step_lines, "generator_idle_s")
    return {
        "learner_idle_share": _total(run.step_lines, "learner_idle_s") / interval_s if interval_s else None,
        "generator_idle_share": idle / (busy + idle) if busy + idle else None,
    }


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return [record[name] for record in records if record.get(name) is not None]


def _total(records: Sequence[Record], name: str) -> Any:
    return sum(_values(records, name))


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = _values(records, name)
    return fmean(values) if values else None


def _middle(records: Sequence[Record], name: str) -> float | None:
    values = _values(records, name)
    return median(values) if values else None


# -- the picture ---------------------------------------------------------------------------------------------

TRAIN, EVAL, LEARNER, GENERATOR = "#4477aa", "#cc3311", "#4477aa", "#ee7733"


def draw(run_dir: str | Path) -> Path:
    """Draws reward, policy age, throughput and idle shares over wall time to report.png; returns its path.

    Raises UserError when run_dir has no metrics file.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or touched
    from matplotlib import pyplot

    run = RunRecords(run_dir)
    unit, seconds = ("min", 60.0) if run.wall_s >= 180 else ("s", 1.0)
    figure, axes = pyplot.subplots(4, 1, sharex=True, figsize=(9, 10.5), layout="constrained")
    try:
        for axis, panel in zip(axes, (_reward_panel, _age_panel, _throughput_panel, _idle_panel), strict=True):
            panel(axis, run, lambda records: [record["wall_s"] / seconds for record in records])
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.01)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        axes[-1].set_xlabel(f"wall time ({unit})")
        figure.suptitle(f"{run.run_dir.name}: {run.steps[-1]['version'] if run.steps else 0} steps", fontsize=12)
        figure.align_ylabels(axes)
        path = run.run_dir / PICTURE_FILE
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return path


Times = Callable[[Sequence[Record]], list[float]]


def _reward_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    steps = _timed(run.steps, "reward_mean")
    _noisy(axis, times(steps), _values(steps, "reward_mean"), TRAIN, "training")
    evals = _timed(run.evals, "reward_mean")
    axis.plot(times(evals), _values(evals, "reward_mean"), "o-", color=EVAL, markersize=6, label="held-out, greedy")
    axis.set_ylabel("reward")


def _age_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    for name, label, style in (
        ("policy_age_max", "max", "steps-post"),
        ("policy_age_mean", "mean", "default"),
    ):
        steps = _timed(run.steps, name)
        color = "#999999" if label == "max" else TRAIN
        axis.plot(times(steps), _values(steps, name), drawstyle=style, color=color, linewidth=1.2, label=label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("policy age (steps)")


def _throughput_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    figures = (
        ("tokens_generated_per_s", "generated", GENERATOR),
        ("tokens_trained_per_s", "trained", LEARNER),
    )
    for name, label, color in figures:
        steps = _timed(run.step_lines, name)
        _noisy(axis, times(steps), _values(steps, name), color, label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("throughput (tokens/s)")


def _idle_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    figures = (("learner_idle_share", "learner", LEARNER), ("generator_idle_share", "generator", GENERATOR))
    for name, label, color in figures:
        steps = _timed(run.step_lines, name)
        _noisy(axis, times(steps), [100 * share for share in _values(steps, name)], color, label)
    axis.set_ylim(0, 100)
    axis.set_ylabel("idle (% of time)")


def _timed(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record.get(name) is not None and record.get("wall_s") is not None]


def _noisy(axis: Axes, times: list[float], values: list[float], color: str, label: str) -> None:
    """A faint line of the values, and their running mean over a twentieth of the points on top."""
    window = len(values) // 20
    if window < 2:
        axis.plot(times, values, color=color, linewidth=1.2, label=label)
        return
    axis.plot(times, values, color=color, linewidth=0.8, alpha=0.3)
    smooth = [fmean(values[max(0, place - window + 1) : place + 1]) for place in range(len(values))]
    axis.plot(times, smooth, color=color, linewidth=1.6, label=f"{label} (mean of {window})")


# -- the last lines ------------------------------------------------------------------------------------------


def summary_lines(summary: dict[str, Any], run_dir: str | Path, picture: Path | None) -> list[str]:
    """The last lines of a run: rewards, evaluation, throughput, idle shares, and where the rest is."""
    lines = [
        f"{summary['steps']} steps in {clock_time(summary['wall_s'])}",
        f"reward       first {_shown(summary['reward_first'])}   last {_shown(summary['reward_last'])}",
        f"evaluation   first {_shown(summary['eval_first'])}   last {_shown(summary['eval_last'])}",
        f"tokens/s     generated {_shown(summary['tokens_generated_per_s'], ',.0f')}"
        f"   trained {_shown(summary['tokens_trained_per_s'], ',.0f')}",
        f"idle         learner {_shown(summary['learner_idle_share'], '.0%')}"
        f"   generator {_shown(summary['generator_idle_share'], '.0%')}",
        f"policy age   mean {_shown(summary['policy_age_mean'], '.2f')}   max {_shown(summary['policy_age_max'], 'd')}",
        f"weight sync  {_shown(summary['sync_total_ms_median'], '.0f')} ms, of it generation paused "
        f"{_shown(summary['sync_pause_ms_median'], '.0f')} ms (medians of {summary['sync_count']})",
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
        remedy = f"`python -m asyncrl.metrics.report {run_dir}` makes it"
        raise UserError(f"{path}: there is no such file; {remedy}") from None
    print("\n".join(summary_lines(summary, run_dir, picture)), flush=True)


def _shown(value: float | None, form: str = ".3f") -> str:
    return format(value, form) if value is not None else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m asyncrl.metrics.report RUN_DIR`; exit code 2 when that is no run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m asyncrl.metrics.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        write_summary(arguments[0])
        print_summary(arguments[0], draw(arguments[0]))
    except AsyncRLError as error:
        print(f"asyncrl.metrics.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
