"""The charts of one run, or of several beside each other, made of their plans and records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from asyncrl.metrics.alarms import RULES
from asyncrl.metrics.types import youngest_age
from asyncrl.report.page.chart import AGE_COLORS, COLORS, Chart, Curve, Limit, Section, Span, Style
from asyncrl.report.page.charts import SECTIONS, ChartLine, ChartPlan, Record
from asyncrl.report.page.points import Column, Grid, running_mean
from asyncrl.report.run_records import EvalRecord, RunRecords, StepRecord, SyncRecord

NEAR = 2.0  # curves that come within this factor of a limit are shown with it
MAX_PARTS = 16
COMPARED_STYLES: tuple[Style, ...] = ("line", "dashed", "dotted")


@dataclass(slots=True)
class Source:
    """The records of a run that charts read, and the grids that they share."""

    name: str
    steps: Sequence[StepRecord]
    evals: Sequence[EvalRecord]
    rounds: Sequence[SyncRecord]
    step_grid: Grid = field(init=False)
    eval_grid: Grid = field(init=False)
    round_grid: Grid = field(init=False)

    def __post_init__(self) -> None:
        self.step_grid = _grid(self.steps)
        self.eval_grid = _grid(self.evals)
        self.round_grid = _grid(self.rounds)

    @classmethod
    def of(cls, run: RunRecords, name: str = "") -> Source:
        """What charts read of a run."""
        return cls(name, run.steps_in_force, run.evals, slowest_rounds(run.syncs))


def sections(sources: Sequence[Source]) -> list[Section]:
    """All sections that have a chart: of one run everything, of several what is compared."""
    found = [Section(key, title, charts(plans, sources)) for key, title, plans in SECTIONS]
    return [section for section in found if section.charts]


def charts(plans: Iterable[ChartPlan], sources: Sequence[Source]) -> list[Chart]:
    """The charts of which something was measured."""
    made = []
    for plan in plans:
        curves = list(_curves(plan, sources[0]) if len(sources) == 1 else _compared(plan, sources))
        if curves:
            alone = sources[0] if len(sources) == 1 else None
            made.append(_chart(plan, curves, _spans(plan, alone) if alone else []))
    return made


def slowest_rounds(syncs: Sequence[SyncRecord]) -> list[SyncRecord]:
    """Of each version the round that took longest, in the order of versions."""
    slowest: dict[int, SyncRecord] = {}
    for sync in syncs:
        known = slowest.get(sync.version)
        if known is None or (sync.total_ms or 0.0) >= (known.total_ms or 0.0):
            slowest[sync.version] = sync
    return [slowest[version] for version in sorted(slowest)]


def _grid(records: Sequence[StepRecord] | Sequence[EvalRecord] | Sequence[SyncRecord]) -> Grid:
    return Grid.of([record.version for record in records], [record.wall_s for record in records])


def _chart(plan: ChartPlan, curves: list[Curve], spans: list[Span]) -> Chart:
    return Chart(
        key=plan.key,
        title=plan.title,
        note=plan.note,
        curves=curves,
        unit=plan.unit,
        percent=plan.percent,
        log=plan.log,
        stacked=plan.stacked,
        edges=plan.edges,
        limits=_limits(plan, curves),
        spans=spans,
    )


# -- curves ----------------------------------------------------------------------------------------------------


def _curves(plan: ChartPlan, source: Source) -> Iterable[Curve]:
    """All lines of one run. By age, the line over all ages is the black one."""
    if plan.by_age:
        yield from _ages(plan.by_age, source)
    colors = iter(COLORS)
    for line in plan.lines:
        color = line.color or ("ink" if plan.by_age else next(colors))
        yield from _curve(line, source.steps, source.step_grid, color)
    for joined in plan.joined:
        figures = joined.figures(source.steps)
        if any(figure is not None for figure in figures):
            yield _smoothed(joined.label, joined.color, source.step_grid, figures, noisy=True)
    for result in plan.evals:
        yield from _curve(result, source.evals, source.eval_grid, result.color or COLORS[1])
    for sync in plan.rounds:
        yield from _curve(sync, source.rounds, source.round_grid, sync.color or next(colors))
    if plan.parts is not None:
        rows = [plan.parts(step) for step in source.steps]
        yield from (_layers if plan.stacked else _parts)(rows, source.step_grid)
    if plan.eval_parts is not None:
        yield from _parts([plan.eval_parts(result) for result in source.evals], source.eval_grid)


def _compared(plan: ChartPlan, sources: Sequence[Source]) -> Iterable[Curve]:
    """The compared lines of each run: a run has its color, a line its style."""
    lines = [line for line in plan.lines if line.compared]
    for source, color in zip(sources, COLORS, strict=False):
        for line, style in zip(lines, COMPARED_STYLES, strict=False):
            label = f"{source.name}: {line.label}" if len(lines) > 1 else source.name
            yield from _curve(line, source.steps, source.step_grid, color, label, style)
        for result in plan.evals:
            if result.compared:
                label = f"{source.name}: {result.label}"
                yield from _curve(result, source.evals, source.eval_grid, color, label, result.style)
        rounds = [line for line in plan.rounds if line.compared]
        for sync, style in zip(rounds, COMPARED_STYLES, strict=False):
            label = f"{source.name}: {sync.label}"
            yield from _curve(sync, source.rounds, source.round_grid, color, label, style)


def _curve(
    line: ChartLine[Record],
    records: Sequence[Record],
    grid: Grid,
    color: str,
    label: str = "",
    style: Style | None = None,
) -> Iterable[Curve]:
    """The line as a curve; none where it was never measured."""
    figures = [line.figure(record) for record in records]
    if any(figure is not None for figure in figures):
        yield _smoothed(label or line.label, color, grid, figures, style or line.style, noisy=line.noisy)


def _smoothed(
    label: str, color: str, grid: Grid, figures: Sequence[float | None], style: Style = "line", *, noisy: bool
) -> Curve:
    column = grid.column(figures)
    window = len(grid) // 20
    if not noisy or window < 2:
        return Curve(label, color, grid, column, style)
    means = running_mean(column.means, window)
    smooth = Column(means, means, means)
    return Curve(label, color, grid, smooth, style, raw=column)


def _ages(figure: str, source: Source) -> Iterable[Curve]:
    buckets = sorted({bucket for step in source.steps for bucket in step.age_health}, key=youngest_age)
    for place, bucket in enumerate(buckets[: len(AGE_COLORS)]):
        figures = [step.age_health[bucket].get(figure) if bucket in step.age_health else None for step in source.steps]
        if any(value is not None for value in figures):
            color = AGE_COLORS[place * (len(AGE_COLORS) - 1) // max(1, len(buckets) - 1)]
            column = source.step_grid.column(figures)
            means = running_mean(column.means, max(1, len(source.step_grid) // 20))
            smooth = Column(means, means, means)
            yield Curve(f"age {bucket}", color, source.step_grid, smooth, raw=column, sparse=True)


def _names_in(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The names in the order in which they came up; none where there is one alone: it says no more than the whole."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names if len(names) > 1 else []


def _parts(rows: Sequence[Mapping[str, float | None]], grid: Grid) -> Iterable[Curve]:
    """One curve for each name."""
    for place, name in enumerate(_names_in(rows)[:MAX_PARTS]):
        style: Style = "line" if place < len(COLORS) else "dashed"
        figures = [row.get(name) for row in rows]
        yield _smoothed(name, COLORS[place % len(COLORS)], grid, figures, style, noisy=True)


def _layers(rows: Sequence[Mapping[str, float | None]], grid: Grid) -> Iterable[Curve]:
    """The share of each name in the sum of a row, the largest at the bottom; of many names the smallest as one."""
    names = _names_in(rows)
    whole = [sum(value or 0.0 for value in row.values()) for row in rows]
    totals = {name: sum(row.get(name) or 0.0 for row in rows) for name in names}
    ordered = sorted(names, key=lambda name: -totals[name])
    room = len(COLORS) if len(names) <= len(COLORS) else len(COLORS) - 1
    layers = [(name, [name]) for name in ordered[:room]]
    if len(ordered) > room:
        layers.append((f"{len(ordered) - room} others", ordered[room:]))
    for (label, members), color in zip(layers, COLORS, strict=False):
        taken = [sum(row.get(name) or 0.0 for name in members) for row in rows]
        column = grid.column(
            [part / all_of_it if all_of_it > 0 else None for part, all_of_it in zip(taken, whole, strict=True)]
        )
        means = running_mean(column.means, max(1, len(grid) // 20))
        yield Curve(label, color, grid, Column(means, means, means), raw=column, sparse=True)


# -- alarms ----------------------------------------------------------------------------------------------------


def _limits(plan: ChartPlan, curves: Sequence[Curve]) -> list[Limit]:
    """Where the alarms of a chart begin, as far as the run's files say it."""
    bounds = [bound for curve in curves for bound in curve.measured.bounds or ()]
    limits = []
    for rule in RULES:
        if rule.figure in plan.alarms and not rule.of_canary_tolerance:
            figure = f"{100 * rule.limit:g} %" if plan.percent else f"{rule.limit:g}"
            nearest = max(bounds, default=0.0) if rule.side == "above" else min(bounds, default=NEAR)
            is_near = nearest * NEAR >= rule.limit if rule.side == "above" else nearest <= rule.limit * NEAR
            label = f"alarm {rule.figure} {rule.side} {figure}"
            limits.append(Limit(label, rule.limit, is_near or 1.0 in plan.edges))
    return limits


def _spans(plan: ChartPlan, source: Source) -> list[Span]:
    """When the alarms of a chart were on."""
    found = []
    grid = source.step_grid
    marked = [not set(plan.alarms).isdisjoint(step.alarms) for step in source.steps]
    on = [any(marked[start:end]) for start, end in pairwise(grid.starts)]
    for is_on, run in groupby(range(len(on)), lambda point: on[point]):
        if is_on:
            points = list(run)
            first, last = points[0], points[-1]
            found.append(Span((grid.steps[first], grid.steps[last]), (grid.times[first], grid.times[last])))
    return found
