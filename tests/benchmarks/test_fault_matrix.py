"""The fault matrix: its judgement on made-up cells, and a few real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scripts import run_script

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # benchmarks are not installed

from benchmarks.fault_judge import Seen, TrainedGroup, complaints, survivor_delays, tainted

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
        (cell(steps=[(100.5, 8), (120.5, 9)]), "1 steps within 20 s of the fault"),
        (cell("stop", resumed_at=101.0, steps=[(100.5, 8), (101.5, 9)]), "1 steps within 20 s of the fault"),
        (alone(steps=[(100.5, 8), (101.0, 9), (106.0, 10)]), "1 steps after g0 was back"),
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
    steps = [(101.0, 8), (102.0, 9)]
    assert complaints(cell("stop", "COMMIT", resumed_at=108.0, sick=sick, steps=steps, learner_said="")) == []


def test_a_second_commit_of_a_version_that_was_proven_heals_the_loss_of_the_first():
    sick = [event("commit", 103.0, version=7, attempt=0), event("held", 103.0, version=7)]
    seen = alone(fault="drop", phase="COMMIT", sick=sick, learner_said="")
    assert complaints(seen) == [] and seen.back_at == 103.0


def test_the_next_sync_of_the_sick_one_is_another_matter():
    assert complaints(cell(sick=sync(7, 105.2, attempt=1))) == []


def test_a_newer_version_counts_for_a_survivor_and_an_earlier_commit_counts_at_once():
    assert survivor_delays(cell(survivor=sync(8, 101.8))) == {"g1": pytest.approx(2.0)}
    assert survivor_delays(cell(survivor=sync(7, 99.0))) == {"g1": 0.0}


def test_the_longest_time_without_a_step_is_counted_from_the_fault_to_the_recovery():
    assert cell(steps=[(90.0, 7), (103.0, 8), (104.0, 9), (110.0, 10), (111.0, 11), (150.0, 12)]).standstill_s == 6.0
    assert cell(steps=[(99.0, 7), (107.5, 8), (108.0, 9)]).standstill_s == 7.5


def trained(key, versions, generator="g0", incarnation=1):
    return TrainedGroup(key, generator, incarnation, frozenset(versions))


def test_tokens_of_a_version_that_this_life_of_the_generator_never_committed_are_found():
    events = {"g0": [*cell().events["g0"], event("started", 110.0, incarnation=2), *sync(9, 112.0)]}
    good = [trained((0, 0), {8}), trained((1, 0), {9}, incarnation=2)]
    assert tainted(good, events) == {}
    assert set(tainted([*good, trained((2, 0), {7, 8})], events)) == {("g0", 7)}
    assert set(tainted([*good, trained((3, 0), {8}, incarnation=2)], events)) == {("g0", 8)}


def test_a_group_begun_under_wrong_weights_is_found_although_its_version_was_proven_later():
    late = event("tainted group", 106.0, key=["train", 4, 0], versions=[7])
    events = {"g0": [event("started", 1.0, incarnation=1), *sync(7, 105.0, attempt=1), late]}
    assert tainted([trained((5, 0), {7})], events) == {}
    assert set(tainted([trained((4, 0), {7})], events)) == {("g0", 7)}


def test_help_tells_what_the_faults_are():
    done = run_script("fault_matrix", "--help")
    assert done.returncode == 0, done.stderr
    assert "kill, stop" in done.stdout and "the deadline + 2 s" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(650)
def test_a_few_real_cells_pass(tied_model_dir, tmp_path):
    done = run_script("fault_matrix", "--quick", "--model", str(tied_model_dir), "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "fault_matrix.quick.json").read_text())
    assert record["passed"] == record["cells"] == len(record["outcomes"]) == 4
    assert all(outcome["what"] and not outcome["complaints"] for outcome in record["outcomes"])
    assert "4 of 4 cells passed" in done.stdout
