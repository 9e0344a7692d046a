"""The picture of a run, report.png: training on the left, off-policy health on the right, over wall time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from asyncrl.metrics.alarms import RULES
from asyncrl.report.run_records import Record, RunRecords, alarm_steps, by_age, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "report.png"

TRAIN, EVAL, LEARNER, GENERATOR, ALL_AGES, ALARM = "#4477aa", "#cc3311", "#4477aa", "#ee7733", "#222222", "#cc3311"

Times = Callable[[Sequence[Record]], list[float]]
Panel = Callable[["Axes", RunRecords, Times], None]


def draw(run_dir: str | Path) -> Path:
    """Draws a run to report.png; returns its path.

    Left: reward, policy age, throughput, idle shares. Right, if the run measured them: effective sample size, clipped
    tokens and largest ratio by policy age, and the gap split in two; times with an alarm are shaded.

    Raises UserError when run_dir has no metrics file.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or touched
    from matplotlib import pyplot

    run = RunRecords(run_dir)
    unit, seconds = ("min", 60.0) if run.wall_s >= 180 else ("s", 1.0)
    columns: list[tuple[Panel, ...]] = [(_reward_panel, _age_panel, _throughput_panel, _idle_panel)]
    if values(run.steps, "ess_share"):
        columns.append((_ess_panel, _clip_panel, _ratio_panel, _gap_panel))
    figure, axes = pyplot.subplots(
        4, len(columns), sharex=True, figsize=(9 * len(columns), 10.5), layout="constrained", squeeze=False
    )
    try:
        for column, panels in enumerate(columns):
            for axis, panel in zip(axes[:, column], panels, strict=True):
                panel(axis, run, lambda records: [record["wall_s"] / seconds for record in records])
                _finish(axis)
            axes[-1, column].set_xlabel(f"wall time ({unit})")
            figure.align_ylabels(axes[:, column])
        figure.suptitle(_title(run), fontsize=12)
        path = run.run_dir / PICTURE_FILE
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return path


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


# -- training ------------------------------------------------------------------------------------------------


def _reward_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    steps = _timed(run.steps, "reward_mean")
    _noisy(axis, times(steps), values(steps, "reward_mean"), TRAIN, "training")
    evals = _timed(run.evals, "reward_mean")
    axis.plot(times(evals), values(evals, "reward_mean"), "o-", color=EVAL, markersize=6, label="held-out, greedy")
    axis.set_ylabel("reward")


def _age_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    for name, label, style in (
        ("policy_age_max", "max", "steps-post"),
        ("policy_age_mean", "mean", "default"),
    ):
        steps = _timed(run.steps, name)
        color = "#999999" if label == "max" else TRAIN
        axis.plot(times(steps), values(steps, name), drawstyle=style, color=color, linewidth=1.2, label=label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("policy age (steps)")


def _throughput_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    figures = (
        ("tokens_generated_per_s", "generated", GENERATOR),
        ("tokens_trained_per_s", "trained", LEARNER),
    )
    for name, label, color in figures:
        steps = _timed(run.step_lines, name)
        _noisy(axis, times(steps), values(steps, name), color, label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("throughput (tokens/s)")


def _idle_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    figures = (("learner_idle_share", "learner", LEARNER), ("generator_idle_share", "generator", GENERATOR))
    for name, label, color in figures:
        steps = _timed(run.step_lines, name)
        _noisy(axis, times(steps), [100 * share for share in values(steps, name)], color, label)
    axis.set_ylim(0, 100)
    axis.set_ylabel("idle (% of time)")


# -- off-policy health ---------------------------------------------------------------------------------------


def _ess_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    _ages(axis, run, times, "ess_share")
    _limit(axis, "ess_share")
    shade_alarms(axis, run, times)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("ESS / N")


def _clip_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    _ages(axis, run, times, "clip_fraction", scale=100)
    steps = _timed(run.steps, "masked_share")
    if any(values(steps, "masked_share")):
        masked = [100 * share for share in values(steps, "masked_share")]
        axis.plot(times(steps), masked, ":", color=ALL_AGES, linewidth=1.2, label="masked, all ages")
    top = axis.get_ylim()[1]
    _limit(axis, "clip_fraction", scale=100)
    shade_alarms(axis, run, times)
    axis.set_ylim(0, max(1.0, top))  # a limit far above a healthy run stays out of the picture
    axis.set_ylabel("clipped tokens (%)")


def _ratio_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    _ages(axis, run, times, "ratio_max")
    shade_alarms(axis, run, times)
    axis.set_yscale("log")
    axis.set_ylabel("largest ratio")


def _gap_panel(axis: Axes, run: RunRecords, times: Times) -> None:
    for name, label, color in (("gap_drift", "policy drift", LEARNER), ("gap_engine", "engine mismatch", GENERATOR)):
        steps = [step for step in _timed(run.steps, name) if step[name] > 0]
        _noisy(axis, times(steps), values(steps, name), color, label)
    shade_alarms(axis, run, times)
    axis.set_yscale("log")
    axis.set_ylabel("|log-prob gap| (nats)")


def _ages(axis: Axes, run: RunRecords, times: Times, name: str, scale: float = 1.0) -> None:
    """One line per age bucket, the older the lighter, and a black one over all ages."""
    from matplotlib import colormaps

    buckets = by_age(run.steps)
    for place, (bucket, figures) in enumerate(buckets.items()):
        figures = _timed(figures, name)
        color = colormaps["plasma"](0.9 * place / max(1, len(buckets) - 1))
        smooth, _ = _running_mean([scale * value for value in values(figures, name)])
        axis.plot(times(figures), smooth, color=color, linewidth=1.3, label=f"age {bucket}")
    steps = _timed(run.steps, name)
    smooth, window = _running_mean([scale * value for value in values(steps, name)])
    label = f"all ages (means of {window})" if window > 1 else "all ages"
    axis.plot(times(steps), smooth, color=ALL_AGES, linewidth=1.3, linestyle="--", label=label)


def _limit(axis: Axes, name: str, scale: float = 1.0) -> None:
    """Where the alarm of this figure begins."""
    rule = next(rule for rule in RULES if rule.figure == name)
    limit = scale * rule.limit
    axis.axhline(limit, color=ALARM, linewidth=1.0, linestyle=":", label=f"alarm {rule.side} {limit:g}")


def shade_alarms(axis: Axes, run: RunRecords, times: Times) -> None:
    """Times in which any alarm was on."""
    steps = [step for step in run.steps if step.get("wall_s") is not None]
    for is_on, span in groupby(steps, lambda step: bool(step.get("alarms"))):
        if is_on:
            on_at = times(list(span))
            axis.axvspan(on_at[0], on_at[-1], color=ALARM, alpha=0.1, linewidth=0)


def _title(run: RunRecords) -> str:
    steps = f"{run.run_dir.name}: {run.steps[-1]['version'] if run.steps else 0} steps"
    alarms = [f"{name} ({count} steps)" for name, count in alarm_steps(run.steps).items()]
    return f"{steps}; shaded: alarm {', '.join(alarms)}" if alarms else steps


# -- lines ---------------------------------------------------------------------------------------------------


def _timed(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record.get(name) is not None and record.get("wall_s") is not None]


def _noisy(axis: Axes, times: list[float], values: list[float], color: str, label: str) -> None:
    """A faint line of the values, and their running mean over a twentieth of the points on top."""
    smooth, window = _running_mean(values)
    if window > 1:
        axis.plot(times, values, color=color, linewidth=0.8, alpha=0.3)
        label = f"{label} (mean of {window})"
    axis.plot(times, smooth, color=color, linewidth=1.6 if window > 1 else 1.2, label=label)


def _running_mean(values: list[float]) -> tuple[list[float], int]:
    """Means over a twentieth of the points, and how many those are."""
    window = max(1, len(values) // 20)
    return [fmean(values[max(0, place - window + 1) : place + 1]) for place in range(len(values))], window
