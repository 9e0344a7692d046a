"""A chart as markup: SVG over steps and over wall time, a legend that reads figures out, a table behind a fold.

The lines of a chart lie in an SVG that is stretched to the width of its place, and keep their thickness; its texts lie
outside of that, so that they stay readable on any width. There is one drawing for each horizontal axis, and the page
shows one of them: no script is needed to look at a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from asyncrl.report.page.chart import Chart, Curve, Span
from asyncrl.report.page.markup import Html, joined, markup, shown
from asyncrl.report.page.points import Column, Grid
from asyncrl.report.page.scales import Scale, Tick, scale_for, step_ticks, time_ticks

WIDE, HIGH = 2000, 1000  # units of a drawing
LEAST_WIDE = 4  # of a span, so that one step is visible
TEXT_CURVES = 4  # so many are told in the text of a chart
AXES = ("step", "time")


@dataclass(frozen=True, slots=True)
class Axes:
    """The horizontal axes that all charts of a page share: from 0 to the last step, and to the last second.

    marks  steps and seconds at which a vertical line stands in every chart
    """

    last_step: int
    last_s: float
    marks: Sequence[tuple[int, float]] = ()
    _places: dict[tuple[Grid, str], list[int]] = field(default_factory=dict, repr=False)

    def place(self, axis: str, at: float) -> int:
        """Where a step or a time stands, in units of a drawing."""
        end = self.last_step if axis == "step" else self.last_s
        return round(WIDE * min(1.0, max(0.0, at / end))) if end else 0

    def places(self, axis: str, grid: Grid) -> list[int]:
        """Where the points of a grid stand."""
        if (grid, axis) not in self._places:
            at = grid.steps if axis == "step" else grid.times
            self._places[grid, axis] = [self.place(axis, where) for where in at]
        return self._places[grid, axis]

    def ticks(self, axis: str) -> list[Tick]:
        """The ticks of one of both axes."""
        return step_ticks(self.last_step) if axis == "step" else time_ticks(self.last_s)


def figure_of(chart: Chart, axes: Axes) -> Html:
    """The chart as a figure of the page."""
    scale = _scale(chart)
    return markup(
        '<figure class="chart" id="{}"><figcaption><h3>{}</h3><p>{}</p></figcaption><div class="plot">{}{}{}</div>'
        '<ul class="legend">{}</ul>{}</figure>\n',
        chart.key,
        chart.title,
        chart.note,
        _vertical_ticks(chart, scale),
        _drawings(chart, axes, scale),
        horizontal_ticks(axes),
        joined([*(_legend_entry(chart, curve) for curve in chart.curves), *_legend_of_limits(chart)]),
        _table(chart),
    )


def horizontal_ticks(axes: Axes) -> Html:
    """The texts below a drawing, for both axes."""
    return markup('<svg class="xs" aria-hidden="true">{}</svg>', joined(_tick_texts(axes, axis) for axis in AXES))


def nested(axis: str, content: Html, high: int = HIGH) -> Html:
    """A drawing in its own units, for one of both axes."""
    return markup(
        '<svg class="by-{}" viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>', axis, WIDE, high, content
    )


def drawing(text: str, content: Html, height: int = 0) -> Html:
    """The picture of a chart, which `text` tells to who does not see it. height: pixels, where not that of all."""
    fixed = markup(' height="{}"', height) if height else Html()
    return markup(
        '<svg class="drawing" role="img" aria-label="{}"{}>{}<line class="cursor" y1="0" y2="100%"/></svg>',
        text,
        fixed,
        content,
    )


def marks_of(axes: Axes, axis: str, high: int = HIGH) -> Html:
    """The vertical lines that every chart has."""
    places = [axes.place(axis, step if axis == "step" else time) for step, time in axes.marks]
    return joined(markup('<path class="mark" d="M{},0V{}"/>', place, high) for place in places)


# -- paths -----------------------------------------------------------------------------------------------------


def line_path(places: Sequence[int], heights: Sequence[int | None], *, sparse: bool = False) -> str:
    """A line through the points, unless it is sparse interrupted where one was not measured; one by itself is a dot."""
    pieces = []
    known = [index for index, height in enumerate(heights) if height is not None]
    for run in ([known] if known else []) if sparse else _runs(heights):
        points = " ".join(f"{places[index]},{heights[index]}" for index in run)
        pieces.append(f"M{points}" + ("h0" if len(run) == 1 else ""))
    return "".join(pieces)


def dots_path(places: Sequence[int], heights: Sequence[int | None]) -> str:
    """A dot at each point: a line without length, whose round ends make it one."""
    return "".join(f"M{place},{height}h0" for place, height in zip(places, heights, strict=True) if height is not None)


def band_path(places: Sequence[int], below: Sequence[int | None], above: Sequence[int | None]) -> str:
    """The area between two lines."""
    pieces = []
    for run in _runs(below):
        there = " ".join(f"{places[index]},{above[index]}" for index in run)
        back = " ".join(f"{places[index]},{below[index]}" for index in reversed(run))
        pieces.append(f"M{there} {back}Z")
    return "".join(pieces)


def _runs(heights: Sequence[int | None]) -> Iterable[list[int]]:
    """The indices of measured points, as runs without a gap."""
    for is_known, run in groupby(range(len(heights)), lambda index: heights[index] is not None):
        if is_known:
            yield list(run)


# -- parts of a figure -----------------------------------------------------------------------------------------


def _scale(chart: Chart) -> Scale:
    limits = [limit.figure for limit in chart.limits if limit.is_near]
    if chart.stacked:
        return Scale(0.0, 1.0)
    bounds = [bound for curve in chart.curves for bound in curve.measured.bounds or ()]
    return scale_for(bounds, log=chart.log, edges=(*limits, *chart.edges))


def _vertical_ticks(chart: Chart, scale: Scale) -> Html:
    ticks = scale.ticks(100.0, " %") if chart.percent else scale.ticks()
    texts = [markup('<text x="100%" y="{}">{}</text>', _from_top(tick.place), tick.text) for tick in ticks]
    return markup('<svg class="ys" aria-hidden="true">{}</svg>', joined(texts))


def _tick_texts(axes: Axes, axis: str) -> Html:
    ticks = axes.ticks(axis)
    texts = [
        markup(
            '<text x="{}" y="1em" class="{}">{}</text>',
            f"{100 * tick.place:.4g}%",
            "first" if tick.place < 0.03 else "last" if tick.place > 0.9 else "middle",
            tick.text,
        )
        for tick in ticks
    ]
    return markup('<g class="by-{}">{}</g>', axis, joined(texts))


def _drawings(chart: Chart, axes: Axes, scale: Scale) -> Html:
    rules = [
        markup('<line class="rule" x2="100%" y1="{0}" y2="{0}"/>', _from_top(tick.place)) for tick in scale.ticks()
    ]
    limits = [
        markup('<line class="limit" x2="100%" y1="{0}" y2="{0}"/>', _from_top(scale.place(limit.figure)))
        for limit in chart.limits
        if limit.is_near
    ]
    heights = {id(column): _heights(column, scale) for curve in chart.curves for column in (curve.column, curve.raw)}
    drawn = [nested(axis, _curves(chart, axes, axis, heights)) for axis in AXES]
    return drawing(text_of(chart), joined([*rules, *drawn, *limits]))


Heights = tuple[list[int | None], list[int | None], list[int | None]]  # of means, least and largest


def _heights(column: Column | None, scale: Scale) -> Heights:
    if column is None:
        return [], [], []
    means = _each(column.means, scale)
    if scale.log:  # 0 has no place there
        means = [None if (figure or 0.0) <= 0 else place for figure, place in zip(column.means, means, strict=True)]
    if not column.is_band:
        return means, means, means
    return means, _each(column.lows, scale), _each(column.highs, scale)


def _each(figures: Sequence[float | None], scale: Scale) -> list[int | None]:
    return [None if figure is None else round(HIGH * (1 - scale.place(figure))) for figure in figures]


def _curves(chart: Chart, axes: Axes, axis: str, heights: dict[int, Heights]) -> Html:
    parts = [*(_span(axes, axis, span) for span in chart.spans), marks_of(axes, axis)]
    if chart.stacked:
        return joined([*parts, *_stack(chart.curves, axes, axis)])
    for curve in chart.curves:
        places = axes.places(axis, curve.grid)
        if curve.raw is not None and not curve.sparse:
            parts.append(_faint(curve.color, curve.raw, places, heights[id(curve.raw)]))
        elif curve.raw is None and curve.column.is_band:
            parts.append(_faint(curve.color, curve.column, places, heights[id(curve.column)]))
        means = heights[id(curve.column)][0]
        parts.append(
            markup(
                '<path class="line {} {}" d="{}"/>',
                curve.color,
                curve.style,
                line_path(places, means, sparse=curve.sparse),
            )
        )
        if curve.style == "dots":
            parts.append(markup('<path class="dot {}" d="{}"/>', curve.color, dots_path(places, means)))
    return joined(parts)


def _faint(color: str, column: Column, places: Sequence[int], heights: Heights) -> Html:
    """What lies behind a line: its single figures or, where points stand for several records, their extent."""
    means, lows, highs = heights
    if column.is_band:
        return markup('<path class="band {}" d="{}"/>', color, band_path(places, lows, highs))
    return markup('<path class="line faint {}" d="{}"/>', color, line_path(places, means))


def _stack(curves: Sequence[Curve], axes: Axes, axis: str) -> Iterable[Html]:
    """Shares of one whole, one on top of the other, the first at the bottom."""
    below: dict[Grid, list[float]] = {}
    for curve in curves:
        base = below.get(curve.grid, [0.0] * len(curve.grid))
        top = [low + (share or 0.0) for low, share in zip(base, curve.column.means, strict=True)]
        known = [share is not None for share in curve.column.means]
        lower, upper = (
            [
                round(HIGH * (1 - min(1.0, edge))) if is_known else None
                for edge, is_known in zip(edges, known, strict=True)
            ]
            for edges in (base, top)
        )
        below[curve.grid] = top
        yield markup(
            '<path class="layer {}" d="{}"/>', curve.color, band_path(axes.places(axis, curve.grid), lower, upper)
        )


def _span(axes: Axes, axis: str, span: Span) -> Html:
    begin, end = span.steps if axis == "step" else span.times
    left, right = axes.place(axis, begin), axes.place(axis, end)
    left = min(left, WIDE - LEAST_WIDE)
    return markup(
        '<rect class="alarm" x="{}" y="0" width="{}" height="{}"/>', left, max(LEAST_WIDE, right - left), HIGH
    )


def _from_top(place: float) -> str:
    return f"{100 * (1 - place):.4g}%"


# -- words -----------------------------------------------------------------------------------------------------


def in_words(chart: Chart, figure: float | None) -> str:
    """A figure of a chart, with its unit."""
    if figure is None:
        return shown(None)
    text = f"{100 * figure:.3g} %" if chart.percent else f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"
    return f"{text} {chart.unit}".rstrip()


def text_of(chart: Chart) -> str:
    """What a chart shows, in a few sentences, for who does not see it."""
    parts = [f"{chart.title}: {chart.note}"]
    for curve in chart.curves[:TEXT_CURVES]:
        column = curve.measured
        known = [mean for mean in column.means if mean is not None]
        if bounds := column.bounds:
            said = [in_words(chart, figure) for figure in (known[0], known[-1], *bounds)]
            parts.append(f"{curve.label}: first {said[0]}, last {said[1]}, least {said[2]}, largest {said[3]}")
    if len(chart.curves) > TEXT_CURVES:
        parts.append(f"and {len(chart.curves) - TEXT_CURVES} more lines")
    parts += [f"{limit.label}" for limit in chart.limits]
    if chart.spans:
        parts.append(f"an alarm was on {len(chart.spans)} times")
    return "; ".join(parts) + "."


def key_of(color: str, style: str) -> Html:
    """The sample of a line in a legend."""
    return markup('<svg class="key" aria-hidden="true"><path class="line {} {}" d="M1,6h22"/></svg>', color, style)


def _legend_entry(chart: Chart, curve: Curve) -> Html:
    style = "layer" if chart.stacked else curve.style
    last = next((mean for mean in reversed(curve.measured.means) if mean is not None), None)
    label = f"{curve.label} (mean of {_window(curve)})" if curve.raw is not None and not curve.sparse else curve.label
    return markup("<li>{}<span>{}</span> <b>{}</b></li>", key_of(curve.color, style), label, in_words(chart, last))


def _window(curve: Curve) -> str:
    records = curve.grid.starts[-1]
    return f"{max(1, records // 20)}"


def _legend_of_limits(chart: Chart) -> Iterable[Html]:
    for limit in chart.limits:
        yield markup("<li>{}<span>{}</span></li>", key_of("alarm", "dotted"), limit.label)
    if chart.spans:
        yield markup(
            '<li><svg class="key" aria-hidden="true"><rect class="alarm" width="24" height="12"/></svg>'
            "<span>an alarm was on</span></li>"
        )


def _table(chart: Chart) -> Html:
    """First, last, least and largest of each line; the page's script adds every point."""
    rows = []
    for curve in chart.curves:
        means = [mean for mean in curve.measured.means if mean is not None]
        bounds = curve.measured.bounds or (None, None)
        figures = (means[0] if means else None, means[-1] if means else None, *bounds)
        cells = joined(markup("<td>{}</td>", in_words(chart, figure)) for figure in figures)
        rows.append(markup('<tr><th scope="row">{}</th>{}</tr>', curve.label, cells))
    head = joined(markup('<th scope="col">{}</th>', name) for name in ("first", "last", "least", "largest"))
    return markup(
        '<details id="{}-table"><summary>Table<span class="hidden"> of {}</span></summary>'
        '<div class="scroll" role="group" aria-label="Table of {}" tabindex="0"><table>'
        "<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div></details>",
        chart.key,
        chart.title,
        chart.title,
        head,
        joined(rows),
    )
