"""A chart as data: curves on grids, limits of alarms, and where those were on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from asyncrl.report.page.points import Column, Grid

Style = Literal["line", "dots", "dashed", "dotted"]

COLORS = tuple(f"c{number}" for number in range(8))  # classes of page.css, each readable on light and dark
AGE_COLORS = tuple(f"a{number}" for number in range(8))  # the same, from young to old


@dataclass(frozen=True, slots=True)
class Curve:
    """One figure over steps and time.

    color   a class of page.css
    raw     what `column` is the running mean of; None where `column` is as it was measured
    sparse  its line goes on where it was not measured, and nothing is drawn behind it
    """

    label: str
    color: str
    grid: Grid
    column: Column
    style: Style = "line"
    raw: Column | None = None
    sparse: bool = False

    @property
    def measured(self) -> Column:
        """The figures as they were measured."""
        return self.raw or self.column


@dataclass(frozen=True, slots=True)
class Limit:
    """Where an alarm begins."""

    label: str
    figure: float
    is_near: bool  # the curves come near it, so that the chart shows it


@dataclass(frozen=True, slots=True)
class Span:
    """From one step to another, in which an alarm was on; times in seconds."""

    steps: tuple[int, int]
    times: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """What one figure of the page shows.

    key      names it in links
    percent  its figures are shares, shown in percent
    edges    figures that its scale has in any case
    stacked  curves lie on top of each other
    """

    key: str
    title: str
    note: str
    curves: Sequence[Curve]
    unit: str = ""
    percent: bool = False
    log: bool = False
    stacked: bool = False
    edges: Sequence[float] = ()
    limits: Sequence[Limit] = ()
    spans: Sequence[Span] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """Charts that belong together."""

    key: str
    title: str
    charts: Sequence[Chart] = field(default_factory=list)
