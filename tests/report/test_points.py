"""Figures on grids and scales: what is drawn where, also of long runs and of odd figures."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncrl.report.page.points import Grid, running_mean
from asyncrl.report.page.scales import Scale, scale_for, step_ticks, time_ticks

FIGURES = st.none() | st.floats()
FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


# -- grids


def test_of_a_short_run_every_record_is_a_point():
    grid = Grid.of([1, 2, 3], [1.0, None, 3.0])
    assert (grid.steps, grid.times, len(grid)) == ([1, 2, 3], [1.0, 1.0, 3.0], 3)
    column = grid.column([0.5, float("nan"), None])
    assert (column.means, column.is_band, column.bounds) == ([0.5, None, None], False, (0.5, 0.5))


def test_of_a_long_run_a_point_keeps_mean_least_and_largest():
    grid = Grid.of(list(range(1, 8)), [float(at) for at in range(7)], max_points=3)
    assert (grid.steps, grid.times, grid.starts) == ([2, 4, 7], [1.0, 3.0, 6.0], [0, 2, 4, 7])
    column = grid.column([1, 3, None, None, 5, None, 9])
    assert (column.means, column.lows, column.highs) == ([2, None, 7], [1, None, 5], [3, None, 9])
    assert column.is_band and column.bounds == (1, 9)


def test_times_that_fall_stay_at_the_newest():
    assert Grid.of([1, 2, 3], [5.0, 2.0, 6.0]).times == [5.0, 5.0, 6.0]


@given(st.lists(FIGURES, max_size=60), st.integers(1, 20))
def test_no_figure_is_lost_between_records_and_points(figures, max_points):
    grid = Grid.of(list(range(len(figures))), [0.0] * len(figures), max_points)
    column = grid.column(figures)
    known = [figure for figure in figures if figure is not None and math.isfinite(figure)]
    assert len(grid) == min(len(figures), max_points) == len(column.means)
    assert (column.bounds is None) == (not known)
    if known:
        clamped = [min(1e300, max(-1e300, figure)) for figure in known]
        assert column.bounds == (min(clamped), max(clamped))


def test_a_running_mean_is_over_what_was_measured():
    assert running_mean([1.0, 3.0, None, 5.0, 9.0], 3) == [1.0, 2.0, None, 4.0, 7.0]


# -- scales


@given(st.lists(FINITE, max_size=8), st.booleans())
@example([-5e-324], False)
@example([0.0, 1e-310], False)
def test_every_scale_has_all_figures_between_its_ends_and_some_ticks(figures, log):
    scale = scale_for(figures, log=log)
    assert scale.low < scale.high and math.isfinite(scale.high - scale.low)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(0.0 <= tick.place <= 1.0 for tick in ticks)
    for figure in figures:
        if not log or figure > 1e-300:
            slack = 1e-3 * (scale.high - scale.low)
            assert scale.low - slack <= figure <= scale.high + slack


@pytest.mark.parametrize(
    ("figures", "log", "ends"),
    [
        ([0.2, 0.95], False, (0.0, 1.0)),
        ([98.0, 99.0], False, (98.0, 99.0)),
        ([0.2, 1.0000001], False, (0.0, 1.0)),
        ([5.0], False, (0.0, 10.0)),
        ([-0.3, 0.4], False, (-0.4, 0.4)),
        ([], False, (0.0, 1.0)),
        ([0.0], False, (0.0, 1.0)),
        ([1.1, 3.0], True, (1.0, 5.0)),
        ([2e-7, 0.03], True, (2e-7, 0.05)),
        ([0.0, 0.0], True, (1.0, 10.0)),
    ],
)
def test_a_scale_ends_at_round_figures(figures, log, ends):
    scale = scale_for(figures, log=log)
    assert (scale.low, scale.high) == pytest.approx(ends)


def test_places_on_both_kinds_of_scales():
    assert [Scale(0.0, 4.0).place(figure) for figure in (-1.0, 0.0, 1.0, 4.0, 9.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [Scale(1.0, 100.0, log=True).place(figure) for figure in (0.0, 1.0, 10.0)] == pytest.approx([0.0, 0.0, 0.5])


@pytest.mark.parametrize(
    ("seconds", "last"),
    [(0.0, "0 s"), (90.0, "80 s"), (600.0, "10 min"), (7200.0, "120 min"), (36_000.0, "10 h"), (864_000.0, "10 d")],
)
def test_times_are_told_in_the_unit_that_fits(seconds, last):
    ticks = time_ticks(seconds)
    assert ticks[0].place == 0.0 and ticks[-1].text == last
    assert len(ticks) <= 8


def test_steps_are_whole_numbers():
    assert [tick.text for tick in step_ticks(3)] == ["0", "1", "2", "3 steps"]
    assert [tick.text for tick in step_ticks(0)] == ["0 steps"]
    assert [tick.text for tick in step_ticks(100_000)][-1] == "100,000 steps"
