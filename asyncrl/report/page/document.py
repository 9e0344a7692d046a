"""The report of a run, report.html: one file that needs nothing else, and that asks nobody for anything.

Its policy lets nothing be loaded and nothing run but the one script and the one style that are in it, named by their
digests. Every text of the run is escaped where it becomes markup (`markup`).
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from asyncrl import __version__
from asyncrl.metrics.sinks import clock_time
from asyncrl.report.page.chart import Chart, Section
from asyncrl.report.page.curves import Source, sections
from asyncrl.report.page.drawing import Axes, figure_of
from asyncrl.report.page.headline import alarm_notes, change_notes, losses, tiles
from asyncrl.report.page.lanes import timeline
from asyncrl.report.page.markup import Html, joined, json_block, markup
from asyncrl.report.page.points import Column, Grid
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import RunSummary

PAGE_FILE = "report.html"
ROLLOUTS_FOLDER = "rollouts"  # in run.dir
PLACES = {  # sections that the top of a page links to, as far as it has them
    "figures": "Figures",
    "learning": "Learning",
    "off-policy": "Off-policy",
    "speed": "Speed",
    "completions": "Completions",
    "sync": "Sync",
    "rollouts": "Rollouts",
    "losses": "Losses",
}


@dataclass(frozen=True, slots=True)
class PageContent:
    """What a page says. `main` is all of it but the frame, so that a live page can replace it."""

    title: str
    main: Html


def content_of(run: RunRecords, summary: RunSummary) -> PageContent:
    """The report of one run."""
    source = Source.of(run)
    axes = axes_of([source], [run])
    found = sections([source])
    rounds = timeline(run.syncs, axes)
    parts = [alarm_notes(run), tiles(run, summary), change_notes(summary)]
    for section in found:
        figures = [figure_of(chart, axes) for chart in section.charts]
        parts.append(section_of(section.key, section.title, [*([rounds] if section.key == "sync" else []), *figures]))
    if rounds and not any(section.key == "sync" for section in found):
        parts.append(section_of("sync", "Weight sync", [rounds]))
    if (run.run_dir / ROLLOUTS_FOLDER).is_dir():
        from asyncrl.report.page.rollouts import rollouts_of  # it reads numpy, which takes longer than all of the page

        if articles := rollouts_of(run.run_dir):
            parts.append(section_of("rollouts", "Rollouts", articles))
    parts += [losses(run, summary), data_block(found, axes)]
    name = run.run_dir.resolve().name
    return PageContent(name, joined([_heading(name, summary), *parts]))


def write_page(path: Path, content: PageContent) -> Path:
    """Writes a page in one move, for its user alone; returns its path. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # like the metrics: it may show rollouts
        file.write(page(content))
    os.replace(partial, path)
    return path


def page(content: PageContent, *, live: bool = False) -> str:
    """A page as text. live: it asks the server that it came from for news."""
    style, script = _part("page.css"), _part("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        f"form-action 'none'{'; connect-src ' + chr(39) + 'self' + chr(39) if live else ''}"
    )
    places = PLACES if live else {key: text for key, text in PLACES.items() if f'<section id="{key}"' in content.main}
    links = joined(markup('<a href="#{}">{}</a>', key, text) for key, text in places.items())
    return markup(
        '<!DOCTYPE html>\n<html lang="en"{}><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>{} – asyncrl</title>\n<style>{}</style></head>\n'
        '<body><header class="bar"><nav aria-label="Sections">{}</nav><fieldset class="switch">'
        '<legend class="hidden">Horizontal axis</legend>'
        '<label><input type="radio" name="axis" id="x-step" checked> steps</label>'
        '<label><input type="radio" name="axis" id="x-time"> time</label></fieldset>'
        '<p id="where" aria-live="off"></p></header>\n<main id="main">{}</main>\n'
        "<footer><p>asyncrl {}, {}</p></footer>\n<script>{}</script></body></html>\n",
        Html(' data-live="yes"') if live else Html(),
        policy,
        content.title,
        Html(style),
        links,
        content.main,
        __version__,
        "live" if live else time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        Html(script),
    )


def section_of(key: str, title: str, figures: Iterable[Html]) -> Html:
    """A section of the page."""
    return markup(
        '<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2><div class="charts">{2}</div>'
        "</section>\n",
        key,
        title,
        joined(figures),
    )


def axes_of(sources: Sequence[Source], runs: Sequence[RunRecords]) -> Axes:
    """The axes on which all records have their place."""
    grids = [grid for source in sources for grid in (source.step_grid, source.eval_grid, source.round_grid)]
    last_step = max((grid.steps[-1] for grid in grids if len(grid)), default=0)
    marks = [(step.version, step.wall_s or 0.0) for step in runs[0].returns()] if len(runs) == 1 else []
    return Axes(max(0, last_step), max(run.wall_s for run in runs), marks)


def data_block(found: Sequence[Section], axes: Axes) -> Html:
    """What the script reads out: the points of every curve, each grid once."""
    grids: dict[Grid, int] = {}
    charts: dict[str, object] = {}
    for chart in (chart for section in found for chart in section.charts):
        charts[chart.key] = _points_of(chart, grids)
    content = {
        "step": axes.last_step,
        "time": _short(axes.last_s),
        "grids": [{"step": grid.steps, "time": [_short(at) for at in grid.times]} for grid in grids],
        "charts": charts,
    }
    return json_block("data", content)


def _points_of(chart: Chart, grids: dict[Grid, int]) -> Mapping[str, object]:
    curves = []
    for curve in chart.curves:
        column = curve.measured
        points: dict[str, object] = {
            "grid": grids.setdefault(curve.grid, len(grids)),
            "mean": _figures(column, "means"),
        }
        if column.is_band:
            points |= {"low": _figures(column, "lows"), "high": _figures(column, "highs")}
        curves.append(points)
    return {"unit": "%" if chart.percent else chart.unit, "curves": curves}


def _figures(column: Column, name: str) -> list[float | None]:
    return [None if figure is None else _short(figure) for figure in getattr(column, name)]


def _short(figure: float) -> float:
    """A figure with as many digits as somebody reads."""
    return figure if isinstance(figure, int) else float(f"{figure:.4g}")


def _heading(name: str, summary: RunSummary) -> Html:
    steps = f"{summary.outcome.steps:,} steps in {clock_time(summary.wall_s)}"
    return markup('<h1>{}</h1><p class="lead">{}</p>\n', name, steps)


@cache
def _part(name: str) -> str:
    """A file beside this module that goes into every page as it is."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What names a script or style in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
