"""Scales of a chart: from figures to places, with ticks at round figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TICKS = 4  # about so many
ROUND = (1.0, 2.0, 5.0, 10.0)
ROUND_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
SLACK = 1e-3  # of a step: figures that are beyond a round end by so little stand at the edge
MAX_LOG_TICKS = 7
SMALLEST = 1e-300  # of what counts as above 0, or as below
TIME_UNITS = (("s", 1.0, 180.0), ("min", 60.0, 3 * 3600.0), ("h", 3600.0, 3 * 86400.0), ("d", 86400.0, math.inf))


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark at `place` between 0 and 1 of a scale."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Scale:
    """The figures from `low` to `high`, linear or logarithmic (then both are above 0)."""

    low: float
    high: float
    log: bool = False

    def place(self, figure: float) -> float:
        """Where a figure stands: 0 at `low`, 1 at `high`; what is beyond stands at the edge."""
        if self.log:
            share = math.log(max(figure, SMALLEST) / self.low) / math.log(self.high / self.low)
        else:
            share = (figure - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self, factor: float = 1.0, unit: str = "") -> list[Tick]:
        """Ticks at round figures, which are shown multiplied by `factor` and followed by `unit`."""
        figures = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        return [Tick(self.place(figure), f"{number(factor * figure)}{unit}") for figure in figures]


def scale_for(figures: Iterable[float], *, log: bool = False, edges: Sequence[float] = ()) -> Scale:
    """A scale with all figures, and the edges, between round ends; a logarithmic one leaves out what is not above 0.

    Figures above 0 have 0 on their linear scale, unless they are close together and far from it.
    """
    known = [figure for figure in (*figures, *edges) if not log or figure > SMALLEST]
    low, high = (min(known), max(known)) if known else ((1.0, 10.0) if log else (0.0, 1.0))
    if log:
        low, high = _round_below(low), _round_above(high)
        return Scale(low, high if high > low else 10 * low, log=True)
    low, high = (end if abs(end) > SMALLEST else 0.0 for end in (low, high))  # denormal figures have no decimal power
    if 0 < low <= 0.6 * high:
        low = 0.0
    if high - low <= max(SMALLEST, 1e-9 * abs(high)):  # all the same, as far as a chart can show it
        low, high = (min(0.0, 2 * low), max(0.0, 2 * high)) if low else (0.0, 1.0)
    step = _round_step((high - low) / TICKS)
    return Scale(step * math.floor(low / step + SLACK), step * math.ceil(high / step - SLACK))


def time_ticks(seconds: float) -> list[Tick]:
    """Ticks from 0 to `seconds`, in the unit that fits; the last one names it."""
    name, size, _ = next(unit for unit in TIME_UNITS if seconds < unit[2])
    return _from_zero(seconds / size, name)


def step_ticks(steps: int) -> list[Tick]:
    """Ticks from 0 to `steps`; the last one says what they count."""
    return _from_zero(float(steps), "steps", least=1.0)


def number(figure: float) -> str:
    """A tick's figure: 4,000, 0.25, 1e-06."""
    if figure == 0 or 1e-3 <= abs(figure) < 1e6:
        return f"{figure:,.6f}".rstrip("0").rstrip(".")
    return f"{figure:.3g}"


def _from_zero(end: float, unit: str, least: float = 0.0) -> list[Tick]:
    step = max(least, _round_step(end / 6, ROUND)) if end > 0 else 1.0
    figures = [step * index for index in range(int(end / step + 1e-9) + 1)] if end > 0 else [0.0]
    # The last text is long and stands to the left of its place: what would lie below it is left out.
    figures = [figure for figure in figures if figure <= figures[-1] - 0.2 * end or figure == figures[-1]]
    return [
        Tick(figure / end if end else 0.0, f"{number(figure)} {unit}" if figure == figures[-1] else number(figure))
        for figure in figures
    ]


def _linear_ticks(low: float, high: float) -> list[float]:
    step = _round_step((high - low) / TICKS)
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = -(-(last - first) // (MAX_LOG_TICKS - 1)) or 1
    mantissas = ROUND[:3] if last - first <= 2 else ROUND[:1]
    figures = [mantissa * 10.0**power for power in range(first, last + 1, every) for mantissa in mantissas]
    return [figure for figure in figures if low * (1 - 1e-9) <= figure <= high * (1 + 1e-9)]


def _round_step(size: float, rounds: Sequence[float] = ROUND_STEPS) -> float:
    """The smallest round figure that is not below `size`."""
    return min(figure for figure in _around(size, rounds) if figure >= size * (1 - 1e-9))


def _round_below(figure: float) -> float:
    return max(near for near in _around(figure, ROUND) if near <= figure * (1 + 1e-9))


def _round_above(figure: float) -> float:
    return min(near for near in _around(figure, ROUND) if near >= figure * (1 - 1e-9))


def _around(figure: float, rounds: Sequence[float]) -> list[float]:
    """Round figures, some below and some above."""
    power: float = 10.0 ** math.floor(math.log10(figure) + 1e-12)
    return [power * factor for factor in rounds]
