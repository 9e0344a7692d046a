"""One run in which trainer, desk and generator are each killed with -9. Nothing is lost or repeated.

The order: trainer (the desk starts it again) → desk (the generator lives on and reconnects to the next one) → generator
(a second one joins and is caught up) → the run ends by itself.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass

import pytest

from tests.e2e.daemons import (
    START_S,
    STEP_S,
    Daemon,
    Run,
    check_every_ordinal_once,
    check_results_have_no_gap,
    wait_until,
)
from tests.waits import LATE_S

STEPS = 22


@dataclass
class Story:
    """What was seen while it happened."""

    run: Run
    first_learner: Daemon
    second_learner: Daemon
    first_generator: Daemon
    second_generator: Daemon
    trainer_outlived_the_desk_s: float
    acked_before_the_desk_died: int
    version_when_the_desk_died: int
    version_when_the_generator_died: int


@pytest.fixture(scope="module")
def story(module_run: Run) -> Story:
    run = module_run.configure(
        run={"steps": STEPS},
        # Slow rewards pace the run: about half a second a step, so that what happens to it happens in the middle.
        task={"args": {"delay_s": 0.03}},
        checkpoint={"every": 5},
        generator={"unreachable_timeout_s": 300.0},
    )
    learner, generator = run.learner(), run.generator("generator.id=first")
    run.wait_for_version(2, learner, generator, timeout_s=START_S)

    os.kill(trainer_pid(run), signal.SIGKILL)
    run.wait_for_version(run.version() + 6, learner, generator)

    before = run.version()
    acked = sum(record["rollouts_acked"] for record in run.records("step"))
    trainer, killed_at = trainer_pid(run), time.monotonic()
    learner.signal(signal.SIGKILL)
    wait_until(lambda: trainer not in run.processes(), STEP_S, "the trainer's end")
    outlived_s = time.monotonic() - killed_at

    second_learner = run.learner()
    run.wait_for_version(before + 3, second_learner, generator)

    at_death = run.version()
    generator.signal(signal.SIGKILL)
    generator.process.wait()
    second_generator = run.generator("generator.id=second")
    wait_until(lambda: run.version() >= STEPS, START_S + STEP_S, "the last step", [second_learner])
    second_learner.exit_code()
    second_generator.exit_code()
    return Story(run, learner, second_learner, generator, second_generator, outlived_s, acked, before, at_death)


def trainer_pid(run: Run) -> int:
    (pid,) = (pid for pid, line in run.processes().items() if "asyncrl.trainer.rank" in line)
    return pid


def test_the_run_ends_well(story):
    assert story.second_learner.exit_code() == 0
    assert story.second_generator.exit_code() == 0
    assert story.run.version() == STEPS
    assert (story.run.run_dir / "export" / "config.json").is_file()


def test_a_killed_trainer_is_started_again_by_its_desk(story):
    log = story.first_learner.stderr
    assert "trainer died (exit code -9)" in log
    assert log.count("trainer started") == 2


def test_a_killed_desk_takes_its_trainer_along(story):
    assert story.trainer_outlived_the_desk_s < LATE_S


def test_the_generator_outlives_the_desk_and_joins_the_next_one(story):
    assert story.first_generator.stderr.count("welcome from") == 2
    assert "generator first joined (incarnation 1)" in story.second_learner.stderr


def test_the_second_learner_resumes_from_checkpoint_and_journal(story):
    found = re.search(r"resuming: checkpoint at version (\d+), (\d+) steps to train again", story.second_learner.stderr)
    assert found
    checkpoint, again = map(int, found.groups())
    assert checkpoint > 0
    assert checkpoint % 5 == 0
    assert checkpoint + again >= story.version_when_the_desk_died


def test_the_version_never_goes_back(story):
    versions = [record["version"] for record in story.run.records("step")]
    assert versions == sorted(set(versions))
    assert versions[-1] == STEPS
    assert story.version_when_the_generator_died > story.version_when_the_desk_died > 2


def test_a_second_generator_takes_the_place_of_a_killed_one(story):
    log = story.second_learner.stderr
    assert "generator second joined (incarnation 1)" in log
    assert re.search(r"generator first is dead.*leases go back", log)
    assert story.version_when_the_generator_died < STEPS


def test_no_acknowledged_result_is_lost(story):
    """Everything the first desk had acknowledged is in the journal that the second one left."""
    from asyncrl.storage.records import StoredGroup

    stored = [record for record in story.run.journal() if isinstance(record, StoredGroup)]
    assert sum(len(record.num_tokens) for record in stored) >= story.acked_before_the_desk_died > 0
    check_results_have_no_gap(story.run)


def test_the_second_learner_takes_what_the_generator_brings_before_its_trainer_is_up(story):
    assert "refused (invalid)" not in story.second_learner.stderr


def test_every_prompt_is_trained_exactly_once(story):
    check_every_ordinal_once(story.run, STEPS)


def test_every_commit_was_proven_and_no_token_was_too_old(story):
    syncs = [record for record in story.run.records("sync") if record["generators_committed"]]
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)
    assert max(record["policy_age_max"] for record in story.run.records("step")) <= 2


def test_no_second_of_the_learner_counts_twice_or_is_missing_where_a_trainer_was_killed(story):
    """Of a learner's first step `start` is from before its interval began."""
    steps = story.run.records("step")
    killed = [step for step in steps if "restart" in step["learner_time_s"]]
    assert len(killed) == 1, "one trainer died while its desk lived"
    assert killed[0]["learner_time_s"]["restart"] >= 1.0, "the desk waits so long before it starts another"
    firsts = [step["version"] for step in steps if "start" in step["learner_time_s"] and step is not killed[0]]
    assert len(firsts) == 2, "of two learners"
    rest = [step for step in steps if step["version"] not in firsts]
    measured_s = sum(step["interval_s"] for step in rest)
    assert sum(sum(step["learner_time_s"].values()) for step in rest) == pytest.approx(measured_s, rel=0.01)


def test_no_second_of_a_generator_counts_twice_where_one_is_killed_and_one_joins_late(story):
    """There was never more than one; a beat or two may be missing where each came or went, and at the end."""
    steps = story.run.records("step")
    told_s = sum(sum(step["generator_time_s"].values()) for step in steps)
    assert told_s <= steps[-1]["wall_s"] + 1.5
    assert told_s >= 0.5 * sum(step["interval_s"] for step in steps)


def test_nothing_is_left_behind(story):
    wait_until(lambda: not story.run.processes(), 10.0, f"no process of the run: {story.run.processes()}")
