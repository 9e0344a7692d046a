"""The picture of a run, report.png: training on the left, off-policy health on the right, over wall time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from asyncrl.metrics.alarms import RULES
from asyncrl.report.run_records import RunRecords, StepRecord, measured, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_FILE = "report.png"

TRAIN = "#4477aa"
EVAL = "#cc3311"
LEARNER = "#4477aa"
GENERATOR = "#ee7733"
ALL_AGES = "#222222"
ALARM = "#cc3311"

MINUTES_FROM_S = 180  # longer runs are drawn over minutes, shorter ones over seconds


@dataclass(frozen=True, slots=True)
class TimeUnit:
    """The unit of the time axis."""

    name: str
    seconds: float

    def of(self, times_s: Sequence[float]) -> list[float]:
        """Times in seconds as times in this unit."""
        return [time_s / self.seconds for time_s in times_s]


Panel = Callable[["Axes", RunRecords, TimeUnit], None]


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
    unit = TimeUnit("min", 60.0) if run.wall_s >= MINUTES_FROM_S else TimeUnit("s", 1.0)
    columns: list[tuple[Panel, ...]] = [(_reward_panel, _age_panel, _throughput_panel, _idle_panel)]
    if measured(step.ess_share for step in run.steps):
        columns.append((_ess_panel, _clip_panel, _ratio_panel, _gap_panel))
    figure, axes = pyplot.subplots(
        4, len(columns), sharex=True, figsize=(9 * len(columns), 10.5), layout="constrained", squeeze=False
    )
    try:
        for column, panels in enumerate(columns):
            for axis, panel in zip(axes[:, column], panels, strict=True):
                panel(axis, run, unit)
                _finish(axis)
            axes[-1, column].set_xlabel(f"wall time ({unit.name})")
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


def _reward_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    times_s, rewards = points(run.steps, lambda step: step.reward_mean)
    _noisy(axis, unit.of(times_s), rewards, TRAIN, "training")
    times_s, rewards = points(run.evals, lambda result: result.reward_mean)
    axis.plot(unit.of(times_s), rewards, "o-", color=EVAL, markersize=6, label="held-out, greedy")
    axis.set_ylabel("reward")


def _age_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    times_s, oldest = points(run.steps, lambda step: step.policy_age_max)
    axis.plot(unit.of(times_s), oldest, drawstyle="steps-post", color="#999999", linewidth=1.2, label="max")
    times_s, means = points(run.steps, lambda step: step.policy_age_mean)
    axis.plot(unit.of(times_s), means, color=TRAIN, linewidth=1.2, label="mean")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("policy age (steps)")


def _throughput_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    times_s, rates = points(run.step_lines, lambda line: line.tokens_generated_per_s)
    _noisy(axis, unit.of(times_s), rates, GENERATOR, "generated")
    times_s, rates = points(run.step_lines, lambda line: line.tokens_trained_per_s)
    _noisy(axis, unit.of(times_s), rates, LEARNER, "trained")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("throughput (tokens/s)")


def _idle_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    times_s, shares = points(run.step_lines, lambda line: line.learner_idle_share)
    _noisy(axis, unit.of(times_s), _percent(shares), LEARNER, "learner")
    times_s, shares = points(run.step_lines, lambda line: line.generator_idle_share)
    _noisy(axis, unit.of(times_s), _percent(shares), GENERATOR, "generator")
    axis.set_ylim(0, 100)
    axis.set_ylabel("idle (% of time)")


# -- off-policy health ---------------------------------------------------------------------------------------


def _ess_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    _ages(axis, run, unit, "ess_share", lambda step: step.ess_share)
    _limit(axis, "ess_share")
    shade_alarms(axis, run, unit)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("ESS / N")


def _clip_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    _ages(axis, run, unit, "clip_fraction", lambda step: step.clip_fraction, scale=100)
    times_s, masked = points(run.steps, lambda step: step.masked_share)
    if any(masked):
        axis.plot(unit.of(times_s), _percent(masked), ":", color=ALL_AGES, linewidth=1.2, label="masked, all ages")
    top = axis.get_ylim()[1]
    _limit(axis, "clip_fraction", scale=100)
    shade_alarms(axis, run, unit)
    axis.set_ylim(0, max(1.0, top))  # a limit far above a healthy run stays out of the picture
    axis.set_ylabel("clipped tokens (%)")


def _ratio_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    _ages(axis, run, unit, "ratio_max", lambda step: step.ratio_max)
    shade_alarms(axis, run, unit)
    axis.set_yscale("log")
    axis.set_ylabel("largest ratio")


def _gap_panel(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    times_s, drifts = points(run.steps, lambda step: _above_zero(step.gap_drift))
    _noisy(axis, unit.of(times_s), drifts, LEARNER, "policy drift")
    times_s, mismatches = points(run.steps, lambda step: _above_zero(step.gap_engine))
    _noisy(axis, unit.of(times_s), mismatches, GENERATOR, "engine mismatch")
    shade_alarms(axis, run, unit)
    axis.set_yscale("log")
    axis.set_ylabel("|log-prob gap| (nats)")


def _above_zero(value: float | None) -> float | None:
    """None for 0 too, which has no place on a logarithmic axis."""
    return value if value is not None and value > 0 else None


def _ages(
    axis: Axes,
    run: RunRecords,
    unit: TimeUnit,
    name: str,
    of_step: Callable[[StepRecord], float | None],
    scale: float = 1.0,
) -> None:
    """One line per bucket of ages, the older the lighter, and a black one over all ages.

    name is that of the figure in age_health; of_step is the same figure over all tokens of a step.
    """
    from matplotlib import colormaps

    buckets = run.by_age()
    for place, (bucket, steps) in enumerate(buckets.items()):
        times_s, figures = points(steps, lambda step: step.figures.get(name))
        color = colormaps["plasma"](0.9 * place / max(1, len(buckets) - 1))
        smooth, _ = _running_mean([scale * figure for figure in figures])
        axis.plot(unit.of(times_s), smooth, color=color, linewidth=1.3, label=f"age {bucket}")
    times_s, figures = points(run.steps, of_step)
    smooth, window = _running_mean([scale * figure for figure in figures])
    label = f"all ages (means of {window})" if window > 1 else "all ages"
    axis.plot(unit.of(times_s), smooth, color=ALL_AGES, linewidth=1.3, linestyle="--", label=label)


def _limit(axis: Axes, name: str, scale: float = 1.0) -> None:
    """Draws where the alarm of this figure begins."""
    rule = next(rule for rule in RULES if rule.figure == name)
    limit = scale * rule.limit
    axis.axhline(limit, color=ALARM, linewidth=1.0, linestyle=":", label=f"alarm {rule.side} {limit:g}")


def shade_alarms(axis: Axes, run: RunRecords, unit: TimeUnit) -> None:
    """Shades the times in which any alarm was on."""
    times_s, numbers_on = points(run.steps, lambda step: len(step.alarms))
    moments = zip(unit.of(times_s), numbers_on, strict=True)
    for is_on, span in groupby(moments, lambda moment: moment[1] > 0):
        if is_on:
            on_at = [time for time, _ in span]
            axis.axvspan(on_at[0], on_at[-1], color=ALARM, alpha=0.1, linewidth=0)


def _title(run: RunRecords) -> str:
    steps = f"{run.run_dir.name}: {run.steps[-1].version if run.steps else 0} steps"
    alarms = [f"{name} ({count} steps)" for name, count in run.alarm_steps().items()]
    return f"{steps}; shaded: alarm {', '.join(alarms)}" if alarms else steps


# -- lines ---------------------------------------------------------------------------------------------------


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


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
