"""Charts made of plans and records: shares that add up, and rounds of weight sync by version."""

from asyncrl.report.page.chart import COLORS
from asyncrl.report.page.charts import ChartPlan
from asyncrl.report.page.curves import Source, charts, slowest_rounds
from asyncrl.report.page.drawing import Axes, figure_of
from asyncrl.report.run_records import StepRecord, SyncRecord
from tests.report.pages import Page

SHARES = ChartPlan("time", "Time", "by activity", parts=lambda step: step.reward_parts, stacked=True, percent=True)


def stacked(*rows):
    steps = [
        StepRecord(version=version, wall_s=float(version), reward_parts=row) for version, row in enumerate(rows, 1)
    ]
    return charts([SHARES], [Source("", steps, [], [])])


def test_shares_lie_on_each_other_the_largest_at_the_bottom():
    (chart,) = stacked({"small": 1.0, "large": 3.0}, {"small": 2.0, "large": 6.0})
    assert [(curve.label, curve.column.means) for curve in chart.curves] == [
        ("large", [0.75] * 2),
        ("small", [0.25] * 2),
    ]
    by_step = Page(figure_of(chart, Axes(2, 2.0))).root.one("svg", of="by-step")
    assert [layer.attributes["d"] for layer in by_step.all("path", of="layer")] == [
        "M1000,250 2000,250 2000,1000 1000,1000Z",
        "M1000,0 2000,0 2000,250 1000,250Z",
    ]


def test_of_a_step_without_any_there_is_no_share_and_one_that_lacks_a_name_has_0_of_it():
    (chart,) = stacked({"a": 1.0, "b": 1.0}, {}, {"b": 5.0})
    assert [curve.column.means for curve in chart.curves] == [[0.5, None, 1.0], [0.5, None, 0.0]]


def test_of_many_names_the_smallest_are_one_layer():
    (chart,) = stacked({f"n{number}": float(number) for number in range(1, 12)})
    assert [curve.label for curve in chart.curves] == ["n11", "n10", "n9", "n8", "n7", "n6", "n5", "4 others"]
    assert [curve.color for curve in chart.curves] == list(COLORS)
    assert sum(curve.column.means[0] for curve in chart.curves) == 1.0


def test_one_name_alone_says_no_more_than_the_whole():
    assert stacked({"only": 1.0}) == []


def test_of_each_version_the_slowest_round_counts():
    rounds = [(2, 50.0), (1, 90.0), (2, 70.0), (1, None)]
    found = slowest_rounds([SyncRecord(version=version, total_ms=total_ms) for version, total_ms in rounds])
    assert [(sync.version, sync.total_ms) for sync in found] == [(1, 90.0), (2, 70.0)]
