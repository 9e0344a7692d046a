"""The lines of metrics.jsonl as typed records, also those of other versions of the program."""

import ast
import json
from dataclasses import fields
from pathlib import Path

import pytest

from asyncrl.errors import UserError
from asyncrl.metrics import METRICS_FILE
from asyncrl.metrics.declaring import LINE, REPORT, SUMMARY
from asyncrl.metrics.types import DERIVED, EvalMetrics, StepMetrics, SyncMetrics
from asyncrl.report.run_records import (
    EvalRecord,
    RunRecords,
    StepRecord,
    SyncRecord,
    mean,
    measured,
    middle,
    total,
)
from asyncrl.report.summary import write_summary

ROOT = Path(__file__).parents[2]
RECORD_OF = {StepMetrics: StepRecord, SyncMetrics: SyncRecord, EvalMetrics: EvalRecord}


@pytest.fixture
def run_of(tmp_path):
    """The records of a run whose metrics file holds these objects, one per line."""

    def run_of(*lines):
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return RunRecords(tmp_path)

    return run_of


# -- lines of other versions


def test_a_line_of_an_older_version_lacks_figures_and_one_of_a_newer_has_more(run_of):
    run = run_of({"kind": "step", "version": 1}, {"kind": "step", "version": 2, "reward_mean": 0.5, "vibes": "good"})
    assert run.steps == [StepRecord(version=1), StepRecord(version=2, reward_mean=0.5)]
    assert write_summary(run).outcome.reward_last == 0.5


def test_null_is_a_figure_that_was_not_measured(run_of):
    line = {"kind": "step", "version": 1, "reward_mean": None, "rollouts_failed": None, "alarms": None}
    assert run_of(line).steps == [StepRecord(version=1)]


def test_kinds_that_are_not_known_are_left_out(run_of):
    run = run_of({"kind": "heartbeat", "version": 3, "wall_s": 9.0}, {"kind": "eval", "version": 1})
    assert (run.steps, run.syncs, run.evals) == ([], [], [EvalRecord(version=1)])


@pytest.mark.parametrize("line", [{}, {"kind": "step"}, {"kind": "step", "version": "one"}])
def test_a_line_without_a_version_is_unreadable(run_of, line):
    run = run_of(line, {"kind": "step", "version": 1})
    assert (run.unreadable_lines, len(run.step_lines)) == (1, 1)


# -- order


def test_of_a_version_trained_again_the_newest_line_counts(run_of):
    run = run_of(*({"kind": "step", "version": version, "reward_mean": reward} for version, reward in
                   [(1, 0.1), (2, 0.2), (2, 0.3), (1, 0.4)]))  # fmt: skip
    assert [(step.version, step.reward_mean) for step in run.steps] == [(1, 0.4), (2, 0.3)]
    assert [line.reward_mean for line in run.step_lines] == [0.1, 0.2, 0.3, 0.4]


def test_ages_come_young_first(run_of):
    health = {"4-7": {"tokens": 1}, "64+": {"tokens": 2}, "0": {"tokens": 3}}
    ages = run_of({"kind": "step", "version": 1, "age_health": health}).by_age()
    assert list(ages.items()) == [("0", [{"tokens": 3}]), ("4-7", [{"tokens": 1}]), ("64+", [{"tokens": 2}])]


def test_steps_that_a_restart_took_back_are_not_in_force_until_they_are_trained_again(run_of):
    versions = [1, 2, 3, 4, 2, 3]
    run = run_of(*({"kind": "step", "version": version, "wall_s": float(at)} for at, version in enumerate(versions)))
    assert [(step.version, step.wall_s) for step in run.steps_in_force] == [(1, 0.0), (2, 4.0), (3, 5.0)]
    assert [(step.version, step.wall_s) for step in run.returns()] == [(2, 4.0)]
    assert run_of().steps_in_force == []


# -- figures over records


def test_what_was_not_measured_is_left_out_of_totals_and_means():
    assert measured([1, None, 0]) == [1, 0]
    assert (total([None, 2, 3]), mean([None, 2, 4]), middle([None, 1, 9, 2])) == (5, 3.0, 2)
    assert (total([]), mean([None]), middle([])) == (0, None, None)


# -- what the types say of the report


@pytest.mark.parametrize("kind", RECORD_OF)
def test_every_figure_of_a_record_is_a_metric(kind):
    metrics = {entry.name for entry in fields(kind)} | (set(DERIVED) if kind is StepMetrics else set())
    assert {entry.name for entry in fields(RECORD_OF[kind])} <= metrics


def nodes_of(path):
    return list(ast.walk(ast.parse((ROOT / path).read_text())))


def attributes_read(path):
    return {node.attr for node in nodes_of(path) if isinstance(node, ast.Attribute)}


def names_used(path):
    """Attributes, keywords and texts of a module: the figures that it shows are among them."""
    keywords = {node.arg for node in nodes_of(path) if isinstance(node, ast.keyword)}
    texts = {node.value for node in nodes_of(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    through_run_records = {"alarms", "age_health", "wall_s"}  # by its methods
    return attributes_read(path) | keywords | texts | through_run_records


PAGE = "asyncrl/report/page"
MODULES_OF = {
    LINE: ["asyncrl/metrics/sinks.py"],
    SUMMARY: ["asyncrl/report/summary.py", "asyncrl/report/lengths.py"],
    REPORT: [
        "asyncrl/report/lengths.py",
        f"{PAGE}/charts.py",
        f"{PAGE}/curves.py",
        f"{PAGE}/lanes.py",
        f"{PAGE}/headline.py",
    ],
}


def declared_places():
    for kind in RECORD_OF:
        yield from ((kind, entry.name, entry.metadata["shown"]) for entry in fields(kind))
    yield from ((StepMetrics, name, derived.shown) for name, derived in DERIVED.items())


@pytest.mark.parametrize("place", MODULES_OF)
def test_figures_that_are_declared_to_be_shown_somewhere_are_used_there(place):
    declared = {name for _, name, shown in declared_places() if place in shown}
    assert declared - set().union(*map(names_used, MODULES_OF[place])) == set()


@pytest.mark.parametrize("place", MODULES_OF)
def test_figures_that_are_read_somewhere_are_declared_to_be_shown_there(place):
    names = [name for _, name, _ in declared_places()]
    unambiguous = {name for name in names if names.count(name) == 1}
    declared = {name for _, name, shown in declared_places() if place in shown}
    assert (set().union(*map(attributes_read, MODULES_OF[place])) & unambiguous) - declared == set()


# -- a run that goes on


def line(version, **figures):
    return json.dumps({"kind": "step", "version": version, **figures}).encode() + b"\n"


def test_a_run_that_goes_on_is_read_on_from_where_the_last_reading_ended(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(line(1) + line(2)[:9])
    run = RunRecords(tmp_path, follow=True)
    assert ([step.version for step in run.steps], run.unreadable_lines) == ([1], 0), "the torn line may get its end"
    assert not run.read_on()
    with path.open("ab") as file:
        file.write(line(2)[9:] + line(3) + b"\n")
    assert run.read_on()
    assert ([step.version for step in run.steps], run.unreadable_lines) == ([1, 2, 3], 0)


def test_a_file_that_became_shorter_is_read_from_its_beginning(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(line(1) + line(2))
    run = RunRecords(tmp_path, follow=True)
    path.write_bytes(line(7))
    assert run.read_on()
    assert [step.version for step in run.steps] == [7]
    path.write_bytes(b"")
    assert run.read_on() and run.steps == []
    path.unlink()
    with pytest.raises(UserError, match="there is no such file"):
        run.read_on()


def test_figures_that_were_nan_are_counted_by_name(run_of):
    lines = [{"kind": "step", "version": version, "non_finite": ["loss", "entropy"][:version]} for version in (1, 2)]
    assert run_of(*lines).non_finite == {"loss": 2, "entropy": 1}
