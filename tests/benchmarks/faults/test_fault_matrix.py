"""The fault matrix: its judgement on made-up cells, and a few real ones."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from asyncrl.storage.records import StepTaken
from asyncrl.weights.plan.planner import COMMIT_REPEAT_S
from benchmarks.faults.commits import CommitLog
from benchmarks.faults.fault_judge import Seen, TrainedGroup, complaints, survivor_delays, tainted
from benchmarks.faults.fault_matrix import Cell, Matrix, Outcome, main, read_training
from benchmarks.faults.fleet import FleetError
from tests.benchmarks.faults.journal_records import stored, write_journal
from tests.benchmarks.scripts import run_script

DEADLINE_S = 5.0
FAULT_AT = 100.0


def event(name, at, **details):
    return {"event": name, "at": at, **details}


def sync(version, at, *, attempt=0, commit=True):
    """What one generator notes of one sync."""
    noted = [event("offer", at, version=version, attempt=attempt)]
    if commit:
        noted += [
            event("swap", at + 0.1, version=version, attempt=attempt),
            event("commit", at + 0.2, version=version, attempt=attempt),
            event("held", at + 0.2, version=version),
        ]
    return noted


def cell(fault="corrupt", phase="STAGE", *, sick=(), survivor=(), steps=(), **changes):
    """A cell that passes: the fault hits version 7 of g0 at 100 s, and all is well again with version 8."""
    events = {
        "g0": [event("started", 1.0, incarnation=1), *sync(7, 99.9, commit=False), *(sick or sync(8, 105.2))],
        "g1": [event("started", 1.0, incarnation=1), *(survivor or sync(7, 100.1))],
    }
    values = {
        "version": 7,
        "fault_at": FAULT_AT,
        "until": 107.5,
        "learner_said": "stage: digest",
        "steps": list(steps or [(100.5, 8), (101.0, 9), (106.0, 10), (107.0, 11)]),
    }
    return Seen(fault, phase, "g0", DEADLINE_S, events, **{**values, **changes})


def alone(**changes):
    """The same with no survivor."""
    seen = cell(**changes)
    del seen.events["g1"]
    return seen


@pytest.mark.parametrize("seen", [cell(), alone()], ids=["with a survivor", "alone"])
def test_a_cell_in_which_everything_went_as_it_should_passes(seen):
    assert complaints(seen) == []


@pytest.mark.parametrize(
    ("seen", "complaint"),
    [
        (cell(version=None), "the fault did not happen"),
        (cell(sick=[event("held", 100.4, version=7), *sync(8, 105.2)]), "g0 committed version 7 in the sync with"),
        (
            cell(sick=[event("commit", 100.4, version=7, attempt=0), *sync(8, 105.2)]),
            "the learner told g0 to commit version 7",
        ),
        (cell(learner_said=""), "the learner did not notice that g0 failed"),
        (cell(survivor=sync(6, 99.0)), "g1 committed version 7 never"),
        (cell(survivor=sync(7, 107.0)), "g1 committed version 7 7.2 s after the fault, allowed 7"),
        (cell(steps=[(100.5, 8), (120.5, 9)], sick=sync(8, 122.0)), "1 steps in the 20.0 s in which g0 was out"),
        (cell("stop", resumed_at=101.0, steps=[(100.5, 8), (101.5, 9)]), "1 steps in the 1.0 s in which g0 was out"),
        (cell(steps=[(100.5, 8), (106.0, 9)], sick=sync(8, 111.0)), "0 steps after g0 was back"),
        (cell(steps=[(100.5, 8), (101.0, 9), (106.0, 10)], until=166.0), "1 steps after g0 was back"),
        (cell(steps=[(100.5, 8), (101.0, 9), (106.0, 10)], until=166.0), "no step for 60.0 s, allowed 7.0"),
        (cell(steps=[(98.0, 6), (99.0, 7), (108.1, 8), (109.0, 9)]), "no step for 8.1 s, allowed 8.0"),
        (cell(sick=sync(8, 105.2, commit=False), until=130.0), "no step for 23.0 s"),
        (cell("stop", resumed_at=108.0, stood=False), "g0 was stopped and runs all the same"),
        (alone(steps=[(100.5, 8), (101.0, 9), (106.0, 10)]), "1 steps after g0 was back"),
        (alone(steps=[(100.5, 8), (106.0, 9), (114.0, 10)]), "no step for 8.0 s"),
        (cell(sick=sync(8, 105.2, commit=False)), "g0 did not come back"),
        (cell("kill", resumed_at=106.0), "g0 did not come back"),
        (cell(learner_running=False), "the learner ended"),
        (cell(trainer_starts=2), "the trainer was started 2 times"),
        (
            cell("stop", "COMMIT", resumed_at=108.0, sick=[event("held", 104.0, version=7), *sync(8, 109.0)]),
            "g0 committed version 7 in the sync with the fault",
        ),
        (
            cell("drop", "COMMIT", sick=[event("held", 100.4, version=7), *sync(8, 105.2)]),
            "g0 committed version 7 in the sync with the fault",
        ),
        (
            cell("canary", "COMMIT", sick=[event("commit", 100.4, version=7, attempt=0), *sync(8, 105.2)]),
            "the learner told g0 to commit version 7",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cell_that_must_fail_fails_and_says_why(seen, complaint):
    assert any(complaint in found for found in complaints(seen)), complaints(seen)


def test_a_commit_that_a_generator_was_stopped_in_counts_afterwards():
    """It was proven; and the learner, which had decided, left nobody out."""
    sick = [event("held", 108.1, version=7), *sync(8, 109.0)]
    steps = [(101.0, 8), (102.0, 9), (106.0, 10), (109.5, 11), (110.0, 12)]
    assert complaints(cell("stop", "COMMIT", resumed_at=108.0, sick=sick, steps=steps, learner_said="")) == []


def test_a_second_commit_of_a_version_that_was_proven_heals_the_loss_of_the_first():
    sick = [event("commit", 103.0, version=7, attempt=0), event("held", 103.0, version=7)]
    steps = [(103.5, 8), (104.0, 9)]
    seen = alone(fault="drop", phase="COMMIT", sick=sick, steps=steps, learner_said="")
    assert complaints(seen) == [] and seen.back_at == 103.0


def test_the_next_sync_of_the_sick_one_is_another_matter():
    assert complaints(cell(sick=sync(7, 105.2, attempt=1))) == []


def test_a_newer_version_counts_for_a_survivor_and_an_earlier_commit_counts_at_once():
    assert survivor_delays(cell(survivor=sync(8, 101.8))) == {"g1": pytest.approx(2.0)}
    assert survivor_delays(cell(survivor=sync(7, 99.0))) == {"g1": 0.0}


def test_one_that_was_back_sooner_than_it_could_be_missed_needs_no_steps_before():
    assert complaints(cell(sick=sync(8, 100.1), steps=[(106.0, 8), (107.0, 9)])) == []
    assert complaints(cell(sick=sync(8, 111.0), steps=[(106.0, 8), (112.0, 9), (113.0, 10)])) == []


def test_with_nobody_left_the_standstill_counts_from_the_return_of_the_sick_one():
    back = sync(8, 160.0)
    assert complaints(alone(fault="kill", resumed_at=101.0, sick=back, steps=[(161.0, 8), (162.0, 9)])) == []


def test_the_longest_time_without_a_step_is_counted_to_the_recovery_or_to_the_end():
    seen = cell(steps=[(90.0, 7), (103.0, 8), (104.0, 9), (110.0, 10), (111.0, 11), (150.0, 12)])
    assert seen.standstill_s(FAULT_AT) == 6.0
    assert cell(steps=[(99.0, 7), (107.5, 8), (108.0, 9)]).standstill_s(FAULT_AT) == 7.5
    assert cell(steps=[(99.0, 7), (107.5, 8)], until=127.5).standstill_s(FAULT_AT) == 20.0


# -- what was trained on


def trained(key, versions, generator="g0", incarnation=1, batch=20):
    return TrainedGroup(key, generator, incarnation, frozenset(versions), batch)


def test_tokens_of_a_version_that_the_learner_never_committed_for_this_life_are_found_whatever_the_generator_says():
    events = {"g0": [*cell().events["g0"], *sync(7, 108.0), event("started", 110.0, incarnation=2), *sync(9, 112.0)]}
    commits = {("g0", 1, 8): 6, ("g0", 2, 9): 7, ("g1", 1, 7): 6}
    good = [trained((0, 0), {8}), trained((1, 0), {9}, incarnation=2)]
    assert tainted(good, commits, events) == {}
    found = tainted([*good, trained((2, 0), {7, 8})], commits, events)
    assert set(found) == {("g0", 7)} and "version 7, which the learner never committed for g0 (incarnation 1)" in str(
        found
    )
    assert set(tainted([*good, trained((3, 0), {8}, incarnation=2)], commits, events)) == {("g0", 8)}


def test_a_commit_after_the_step_that_was_taken_with_its_tokens_is_too_late():
    commits = {("g0", 1, 8): 10}
    assert tainted([trained((0, 0), {8}, batch=10)], commits, {}) == {}
    (why,) = tainted([trained((0, 0), {8}, batch=9)], commits, {}).values()
    assert "committed for g0 (incarnation 1) after it had taken the step to 10" in why


def test_commits_are_read_from_the_learners_log_and_come_after_what_was_there_at_the_look_before():
    log = CommitLog()
    lines = ["10:00:00 INFO trainer started", "10:00:01 DEBUG g0 (incarnation 3) committed version 7"]
    log.look(4, lines)
    log.look(5, [*lines, "10:00:02 DEBUG g-1 (incarnation 1) committed version 8"])
    log.look(9, [*lines, "10:00:02 DEBUG g-1 (incarnation 1) committed version 8", lines[1]])
    assert log.commits == {("g0", 3, 7): 0, ("g-1", 1, 8): 4}


def test_a_group_begun_under_wrong_weights_is_found_although_its_version_was_proven_later():
    late = event("tainted group", 106.0, key=["train", 4, 0], versions=[7])
    events = {"g0": [event("started", 1.0, incarnation=1), *sync(7, 105.0, attempt=1), late]}
    commits = {("g0", 1, 7): 6}
    assert tainted([trained((5, 0), {7})], commits, events) == {}
    assert set(tainted([trained((4, 0), {7})], commits, events)) == {("g0", 7)}


def test_a_group_that_is_missing_or_trained_twice_is_told_and_the_others_are_read(tmp_path):
    records = [stored(0, (0, 0)), StepTaken(0, ((0, 0),)), StepTaken(1, ((0, 0),))]
    write_journal(tmp_path, *records, StepTaken(2, ((9, 0),)), stored(1, (1, 2)), StepTaken(3, ((1, 0),)))
    groups, faults = read_training(tmp_path)
    assert [(group.key, group.batch, set(group.versions)) for group in groups] == [
        ((0, 0), 0, {0}),
        ((1, 0), 3, {1, 2}),
    ]
    twice, missing = faults
    assert twice == (1, "prompt 0 was trained on twice, the second time as (0, 0)")
    assert missing == (2, "trained on group (9, 0), which is not in the journal")
    assert "no step" in str(read_training(tmp_path / "none"))


# -- what goes wrong with the matrix itself


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """Without processes: what a cell does is put in by the test."""
    options = SimpleNamespace(config=tmp_path, model=tmp_path, set=[], senders=1)
    matrix = Matrix(tmp_path / "matrix", options)
    for name in ("start_learner", "start_generator", "kill9", "close"):
        monkeypatch.setattr(matrix.fleet, name, lambda *_: None)
    for name in ("_resize", "_look"):
        monkeypatch.setattr(matrix, name, lambda *_: None)
    write_journal(matrix.fleet.run_dir / "journal", stored(0, (0, 0)), StepTaken(0, ((0, 0),)))
    matrix._commits.commits["g0", 1, 0] = 0
    return matrix


CELLS = [Cell("stop", "STAGE", 3), Cell("drop", "CANARY", 3), Cell("kill", "SWAP", 1)]


def test_an_error_in_one_cell_is_its_complaint_and_the_others_are_tried(matrix, monkeypatch):
    def run_cell(cell, order_id):
        if order_id == "cell-2":
            raise FleetError("g1 did not end within 30 s of SIGTERM\n--- its log")
        return Outcome(cell, [], version=7)

    monkeypatch.setattr(matrix, "_cell", run_cell)
    matrix.run(CELLS)
    assert [outcome.complaints for outcome in matrix.outcomes] == [[], ["g1 did not end within 30 s of SIGTERM"], []]


def test_a_run_that_is_broken_off_writes_what_there_is_and_has_not_passed(matrix, monkeypatch, tmp_path, capsys):
    def run_cell(cell, order_id):
        if order_id == "cell-2":
            raise KeyboardInterrupt
        return Outcome(cell, [], version=7, back_s=1.0)

    monkeypatch.setattr(matrix, "_cell", run_cell)
    monkeypatch.setattr("benchmarks.faults.fault_matrix.Matrix", lambda *_: matrix)
    monkeypatch.setattr("benchmarks.faults.fault_matrix.make_base_model", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["fault_matrix", "--quick", "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        main()
    record = json.loads((tmp_path / "fault_matrix.quick.json").read_text())
    assert (record["passed"], record["cells"], len(record["outcomes"])) == (1, 4, 1)
    assert "broken off: 3 cells were not tried" in capsys.readouterr().out


def test_what_was_trained_on_is_blamed_on_the_cell_before_it_and_on_all_where_it_cannot_be_read(matrix, monkeypatch):
    matrix.outcomes = [Outcome(cell, [], version) for cell, version in zip(CELLS, (2, 8, None), strict=True)]
    del matrix._commits.commits["g0", 1, 0]
    matrix._judge_training()
    assert [len(outcome.complaints) for outcome in matrix.outcomes] == [1, 0, 0]
    assert matrix._blame(8) is matrix._blame(11) is matrix.outcomes[1]
    monkeypatch.setattr("benchmarks.faults.fault_matrix.read_training", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        matrix._judge_training()
    assert all("what was trained on is not known" in str(outcome.complaints) for outcome in matrix.outcomes)


def test_help_tells_what_the_faults_are():
    done = run_script("faults.fault_matrix", "--help")
    assert done.returncode == 0, done.stderr
    assert "kill, stop" in done.stdout and "the deadline + 2 s + a step" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(650)
def test_a_few_real_cells_pass(tied_model_dir, tmp_path):
    done = run_script("faults.fault_matrix", "--quick", "--model", str(tied_model_dir), "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "fault_matrix.quick.json").read_text())
    assert record["passed"] == record["cells"] == len(record["outcomes"]) == 4
    assert all(outcome["what"] and not outcome["complaints"] for outcome in record["outcomes"])
    assert "4 of 4 cells passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(650)
def test_a_lost_commit_is_said_again_when_no_newer_version_can_come(tied_model_dir, tmp_path):
    cells = ["--faults", "drop", "--phases", "COMMIT", "--generators", "1", "--set", "staleness.max_age=0"]
    folders = ["--model", str(tied_model_dir), "--results", str(tmp_path), "--folder", str(tmp_path / "run")]
    done = run_script("faults.fault_matrix", *cells, *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "faults" / "g0.events.jsonl").read_text().splitlines()]
    fault = next(index for index, event in enumerate(events) if event["event"] == "fault")
    again, held = events[fault + 1 : fault + 3]
    assert (again["event"], held["event"]) == ("commit", "held"), "a newer version came first"
    assert again["version"] == held["version"] == events[fault]["version"]
    assert again["at"] - events[fault]["at"] > COMMIT_REPEAT_S - 0.5  # of its way here the learner knows nothing
