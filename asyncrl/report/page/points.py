"""Figures over steps and wall time, on at most MAX_POINTS points, so that the page of a long run stays small.

Of a short run every record is a point. Of a long one each point stands for several records in a row, and keeps their
mean and what lies farthest out on both sides: no spike is lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_POINTS = 500
LARGEST = 1e300


@dataclass(frozen=True, slots=True)
class Column:
    """One figure at the points of a grid: mean, least and largest of the records of each; None where not measured."""

    means: Sequence[float | None]
    lows: Sequence[float | None]
    highs: Sequence[float | None]

    @property
    def is_band(self) -> bool:
        """Whether points stand for several records, so that least and largest say more than the mean."""
        return self.means is not self.lows

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest figure; None where nothing was measured."""
        lows = [low for low in self.lows if low is not None]
        highs = [high for high in self.highs if high is not None]
        return (min(lows), max(highs)) if lows else None


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: charts share it, and the page writes it once
class Grid:
    """Where points stand.

    steps   of each point, the version of its last record
    times   of each point, the wall time of that record in seconds; it never falls
    starts  of each point, the first of its records; and at the end, how many records there are
    """

    steps: Sequence[int]
    times: Sequence[float]
    starts: Sequence[int]

    @classmethod
    def of(cls, steps: Sequence[int], times: Sequence[float | None], max_points: int = MAX_POINTS) -> Grid:
        """The grid of records with these versions, which do not fall, and these wall times in seconds.

        A record without a time has that of the one before it.
        """
        count = min(len(steps), max_points)
        starts = [index * len(steps) // count for index in range(count)] if count else []
        starts.append(len(steps))
        rising, newest = [], 0.0
        for time in times:
            newest = max(newest, finite(time) or 0.0)
            rising.append(newest)
        lasts = [end - 1 for end in starts[1:]]
        return cls([steps[last] for last in lasts], [rising[last] for last in lasts], starts)

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, figures: Sequence[float | None]) -> Column:
        """The figures of all records, at the points. What is NaN or infinite counts as not measured."""
        known = [finite(figure) for figure in figures]
        if len(known) == len(self.steps):
            return Column(known, known, known)
        means: list[float | None] = []
        lows: list[float | None] = []
        highs: list[float | None] = []
        for start, end in pairwise(self.starts):
            inside = [figure for figure in known[start:end] if figure is not None]
            means.append(sum(inside) / len(inside) if inside else None)
            lows.append(min(inside) if inside else None)
            highs.append(max(inside) if inside else None)
        return Column(means, lows, highs)


def finite(figure: float | None) -> float | None:
    """The figure, within what a chart can show; None for NaN and infinities, which have no place on a page."""
    if figure is None or not math.isfinite(figure):
        return None
    return figure if abs(figure) <= LARGEST else math.copysign(LARGEST, figure)


def running_mean(figures: Sequence[float | None], window: int) -> list[float | None]:
    """Of each figure the mean of it and what was measured before it, `window` points in all."""
    means: list[float | None] = []
    inside: deque[float | None] = deque(maxlen=window)
    for figure in figures:
        inside.append(figure)
        known = [value for value in inside if value is not None] if figure is not None else []
        means.append(sum(known) / len(known) if known else None)
    return means
