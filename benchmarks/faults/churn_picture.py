"""The picture of a churn run: who was there, the versions, the reward beside undisturbed runs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.faults.churn_account import DOWN, LEAVING, OUT, READY, STARTING, STOPPED, windows

STATE_COLORS = {
    STARTING: "#bbbbbb",
    READY: "#4477aa",
    STOPPED: "#ccbb44",
    LEAVING: "#99ddff",
    OUT: "#aa3377",
}
EVENT_MARKS = {"join": ("^", "#228833"), "leave": ("v", "#66ccee"), "kill": ("X", "#cc3311"), "stop": ("s", "#ccbb44")}
DISTURBED, CALM = "#cc3311", "#4477aa"


def draw(record: dict[str, Any], path: Path) -> Path:
    """Above: each generator's state over time with the events; then versions; then rewards by step."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or touched
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(11, 9), layout="constrained", height_ratios=(1.1, 1, 1.2))
    timeline, seconds = record["timeline"], record["seconds"]
    _generators(axes[0], timeline, seconds)
    _versions(axes[1], timeline, record)
    _rewards(axes[2], timeline)
    for axis in axes[:2]:
        axis.set_xlim(0, seconds / 60)
        axis.set_xlabel("time (min)")
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    verdict = ", ".join(f"{name} {'PASS' if bar['passed'] else 'FAIL'}" for name, bar in record["bars"].items())
    figure.suptitle(f"{seconds / 60:.0f} min of join, leave, kill, stop: {verdict}", fontsize=11)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _generators(axis: Any, timeline: dict[str, Any], seconds: float) -> None:
    names = sorted({name for _, name, _ in timeline["changes"]})
    for row, name in enumerate(names):
        mine = [(time, state) for time, who, state in timeline["changes"] if who == name] + [(seconds, DOWN)]
        for (time, state), (until, _) in zip(mine, mine[1:], strict=False):
            if state != DOWN and until > 0:
                begin = max(0.0, time)
                axis.broken_barh(
                    [(begin / 60, (min(until, seconds) - begin) / 60)], (row - 0.3, 0.6), color=STATE_COLORS[state]
                )
    for kind, (mark, color) in EVENT_MARKS.items():
        at = [(time / 60, names.index(name)) for time, what, name, *_ in timeline["events"] if what == kind]
        axis.plot([x for x, _ in at], [y + 0.38 for _, y in at], mark, color=color, markersize=5, label=kind)
    for state, color in STATE_COLORS.items():
        axis.plot([], [], "s", color=color, markersize=9, label=state)
    axis.set_yticks(range(len(names)), names)


def _versions(axis: Any, timeline: dict[str, Any], record: dict[str, Any]) -> None:
    axis.plot(
        [time / 60 for time, _ in timeline["versions"]],
        [version for _, version in timeline["versions"]],
        color=DISTURBED,
        linewidth=1.3,
        label="policy version",
    )
    for number, (begin, length) in enumerate(record["longest_gaps"][:3]):
        label = f"longest gaps, {length:.1f} s first" if number == 0 else None
        axis.axvspan(begin / 60, (begin + length) / 60, color="#ccbb44", alpha=0.5, linewidth=0, label=label)
    axis.set_ylabel("policy version")


def _rewards(axis: Any, timeline: dict[str, Any]) -> None:
    num_steps = min(map(len, timeline["rewards"]))
    for number, curve in enumerate(timeline["rewards"]):
        mean, means = fmean(curve[:num_steps]), windows(curve, num_steps)
        width = num_steps / max(1, len(means))
        axis.plot(
            [width * (place + 0.5) for place in range(len(means))],
            means,
            color=DISTURBED if number == 0 else CALM,
            linewidth=1.6 if number == 0 else 1.1,
            label=f"disturbed, mean {mean:.3f}" if number == 0 else f"undisturbed {number}, mean {mean:.3f}",
        )
    axis.set_xlabel("step")
    axis.set_ylabel("reward")
