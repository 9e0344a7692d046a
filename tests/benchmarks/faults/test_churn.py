"""The churn benchmark judges what it saw by these rules; its runs themselves are a slow test."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from asyncrl.storage.records import StepTaken, StoredGroup
from benchmarks.faults.churn_account import (
    DOWN,
    LEAVING,
    OUT,
    READY,
    STARTING,
    STOPPED,
    Offer,
    Rates,
    check_journal,
    compare_rewards,
    gaps,
    ready_spans,
    tokens_between,
)
from benchmarks.faults.churn_picture import draw
from benchmarks.faults.churn_run import Disturber
from benchmarks.faults.commits import Commit
from tests.benchmarks.faults.journal_records import stored, write_journal
from tests.benchmarks.scripts import run_script

# -- hangs


def test_a_gap_counts_while_one_generator_or_more_is_ready():
    changes = [(0, "a", READY), (5, "b", READY), (10, "a", STOPPED), (20, "b", DOWN), (30, "a", READY)]
    assert ready_spans(changes, 0, 50) == [(0, 20), (30, 50)]
    assert ready_spans(changes, 2, 40) == [(2, 20), (30, 40)]
    assert ready_spans([(0, "a", STARTING)], 0, 10) == []


def test_the_longest_stretch_without_a_version_is_found_and_nobody_waits_for_a_generator_that_is_not_there():
    spans = [(0.0, 20.0), (30.0, 50.0)]
    assert gaps(spans, [1.0, 2.0, 18.0, 25.0, 31.0, 49.0])[:2] == [(31.0, 18.0), (2.0, 16.0)]
    assert gaps(spans, []) == [(0.0, 20.0), (30.0, 20.0)]


# -- throughput


def test_a_ready_generator_is_offered_all_time_but_that_in_which_others_had_the_cpu():
    offer = Offer()
    offer.add(1.0, [(READY, 0.2, 0.3), (STARTING, 0.5, 0.5), (STOPPED, 0.0, 0.0)])
    offer.add(1.0, [(READY, 0.0, 0.0), (READY, 1.0, 0.0), (DOWN, 0.0, 0.0)])  # one waits for weights: it counts
    offer.add(1.0, [(LEAVING, 0.4, 0.6), (OUT, 0.1, 0.0)])
    assert offer.offered_s == pytest.approx({(1, True): 0.7, (2, False): 2.0, (0, False): 0.5})
    assert offer.wall_s == pytest.approx({(1, True): 1.0, (2, False): 1.0, (0, False): 1.0})
    rates = Rates(one=100.0, one_in_a_crowd=50.0, two_in_a_crowd=30.0, three=80.0)
    assert rates.allowed_tokens(offer) == pytest.approx(0.7 * 50 + 2.0 * 90 + 0.5 * 100)
    assert [rates.of((n, True)) for n in range(4)] == [50.0, 50.0, 30.0, 30.0]


def test_tokens_are_those_acknowledged_and_kept_shared_out_over_their_interval():
    steps = [
        {"t": 10.0, "interval_s": 2.0, "rollouts_acked": 12, "rollouts_dropped": 2, "completion_tokens_mean": 5.0},
        {"t": 14.0, "interval_s": 4.0, "rollouts_acked": 8, "rollouts_dropped": 0, "completion_tokens_mean": 10.0},
    ]
    assert tokens_between(steps, 0.0, 20.0) == pytest.approx(130.0)
    assert tokens_between(steps, 9.0, 11.0) == pytest.approx(25.0 + 20.0)


# -- reward


def noisy_curve(seed: int, shift: float = 0.0) -> list[float]:
    noise = np.random.default_rng(seed).normal(0.0, 0.03, 400)
    return list(0.3 + 0.5 * np.linspace(0, 1, 400) + shift * np.linspace(0, 1, 400) + noise)


@pytest.mark.parametrize("num_calm", [1, 2, 3])
def test_a_curve_of_the_same_kind_passes_and_one_that_learns_less_does_not(num_calm):
    calm = [noisy_curve(seed) for seed in range(num_calm)]
    alike, worse = compare_rewards(noisy_curve(9), calm), compare_rewards(noisy_curve(9, shift=-0.1), calm)
    assert alike["passed"] and not worse["passed"]
    assert worse["end_difference"] == pytest.approx(-0.09, abs=0.02)


def test_a_steep_rise_is_not_taken_for_noise_when_there_is_one_undisturbed_run():
    def steep(seed: int, shift: float = 0.0) -> list[float]:
        return [value + shift + 2.0 * step / 400 for step, value in enumerate(noisy_curve(seed))]

    alike, lower = compare_rewards(steep(9), [steep(0)]), compare_rewards(steep(9, shift=-0.04), [steep(0)])
    assert alike["passed"] and not lower["passed"]
    assert alike["std"] == pytest.approx(0.03 / 10**0.5, rel=0.3)  # of the mean of 10 steps


def test_too_few_steps_are_no_comparison():
    assert compare_rewards([0.1] * 9, [[0.1] * 500]) is None
    assert compare_rewards([0.1] * 500, []) is None


# -- journal


def check(folder: Path, *records: StoredGroup | StepTaken, commits: dict[Commit, int] | None = None) -> list[str]:
    write_journal(folder, *records)
    return check_journal(folder, groups_per_step=1, max_age=1, commits=commits).faults


def test_a_journal_with_every_step_and_its_groups_has_no_fault(tmp_path):
    records = (stored(0, (0, 0)), StepTaken(0, ((0, 0),)), stored(1, (0, 1)), StepTaken(1, ((1, 0),)))
    assert check(tmp_path, *records, commits={("g0", 1, 0): 0, ("g0", 1, 1): 1}) == []


@pytest.mark.parametrize(
    ("fault", "records"),
    [
        ("comes the batch of version 2", (stored(0, (0, 0)), StepTaken(2, ((0, 0),)))),
        ("is not in the journal", (StepTaken(0, ((0, 0),)),)),
        ("has 0 groups", (StepTaken(0, ()),)),
        (
            "was trained before",
            (stored(0, (0, 0)), StepTaken(0, ((0, 0),)), stored(0, (0, 0), 1), StepTaken(1, ((0, 1),))),
        ),
        ("out of order", (stored(0, (0, 1)), StepTaken(0, ((0, 0),)))),
        ("do not cover", (stored(0, (0, 0), stop=3), StepTaken(0, ((0, 0),)))),
        (
            "which the learner never committed for g0 (incarnation 1)",
            (stored(0, (0, 0)), StepTaken(0, ((0, 0),)), stored(1, (0, 1)), StepTaken(1, ((1, 0),))),
        ),
    ],
)
def test_every_fault_of_a_journal_is_named(tmp_path, fault, records):
    assert fault in check(tmp_path, *records, commits={("g0", 1, 0): 0})[0]


def test_a_version_that_was_committed_after_its_tokens_were_trained_on_is_a_fault(tmp_path):
    records = (stored(0, (0, 0)), StepTaken(0, ((0, 0),)), stored(1, (0, 1)), StepTaken(1, ((1, 0),)))
    (fault,) = check(tmp_path, *records, commits={("g0", 1, 0): 0, ("g0", 1, 1): 2})
    assert "version 1, which the learner committed for g0 (incarnation 1) after it had taken the step to 2" in fault


def test_prompts_that_were_passed_over_are_told(tmp_path):
    records = [(stored(10 * n, (n, n)), StepTaken(n, ((10 * n, 0),))) for n in range(3)]
    faults = check(tmp_path, *(record for pair in records for record in pair))
    assert faults == ["14 prompts were never trained, 1 first"]


# -- what happens when


def test_events_repeat_with_their_seed_and_fit_the_state_of_whom_they_meet():
    def story(seed: int) -> list[tuple[str, str, float]]:
        states = dict.fromkeys(("g0", "g1", "g2"), READY)
        disturber, moods, events = Disturber(seed, (5.0, 15.0), (1.0, 20.0)), random.Random(1), []
        for _ in range(300):
            assert 5.0 <= disturber.next_in_s() <= 15.0
            kind, name, seconds = disturber.pick(states)
            assert 1.0 <= seconds <= 20.0
            assert (states[name] == DOWN) == (kind == "join")
            assert states[name] not in (STOPPED, LEAVING) or kind == "kill"
            after = {"join": STARTING, "kill": DOWN, "leave": LEAVING, "stop": STOPPED}
            states[name] = after[kind]
            for other, state in states.items():  # time passes
                if moods.random() < 0.7:
                    states[other] = {LEAVING: DOWN, STOPPED: READY, STARTING: READY}.get(state, state)
            events.append((kind, name, seconds))
        return events

    assert story(0) == story(0) != story(1)
    kinds = [kind for kind, _, _ in story(0)]
    assert min(kinds.count(kind) for kind in ("join", "kill", "leave", "stop")) > 30


# -- the whole


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_short_churn_ends_well_and_writes_what_it_saw(tmp_path):
    sizes = ("--minutes", "0.5", "--phase", "5", "--every", "2", "6", "--stop", "1", "8")  # some ten events
    done = run_script("faults.churn", "--quick", "--results", str(tmp_path), *sizes, timeout_s=1400)
    record = json.loads((tmp_path / "churn.quick.json").read_text())
    assert record["bars"]["learner restarts"]["passed"] and record["bars"]["journal"]["passed"], (
        done.stdout + done.stderr
    )
    assert record["bars"]["hangs"]["passed"] and not record["errors"], done.stdout
    assert {"join", "kill", "leave", "stop"} >= set(record["events_by_kind"]) and len(record["timeline"]["events"]) >= 5
    assert record["journal"]["num_groups_trained"] == 32 * record["journal"]["num_steps"] > 0
    assert record["throughput"]["ratio"] > 0  # how high is a matter of a quiet machine and half an hour
    assert "--quick: too short for a result" in done.stdout
    assert (tmp_path / "churn.quick.png").stat().st_size > 10_000
    assert draw(record, tmp_path / "again.png").exists()


def test_help_says_what_the_bars_are():
    done = run_script("faults.churn", "--help")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("--minutes", "--quick", "at least 0.9", "schedstat"))
