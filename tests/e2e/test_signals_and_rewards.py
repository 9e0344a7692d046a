"""One run with rewards that misbehave, stopped by SIGTERM and taken up again; at its end the generator is stopped too.

The order: rewards raise, return NaN, hang, end their process → SIGTERM to the learner, restart → SIGTERM to the whole
process group of the generator (as Ctrl-C in a terminal would) → SIGINT to the learner.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.replay.lease_records import MAX_LONE_FAILURES, MAX_STRIKES
from asyncrl.storage.records import StoredGroup
from tests.e2e.daemons import START_S, Daemon, Run, check_results_have_no_gap, steps_in, wait_until
from tests.e2e.letters_task import LEAST_REWARD, NOT_A_NUMBER, RAISES
from tests.waits import LATE_S

DRAIN_LIMIT_S = 10.0


@dataclass
class Story:
    """What was seen while it happened."""

    run: Run
    first_learner: Daemon
    second_learner: Daemon
    generator: Daemon
    faults: Path
    checkpoint_version: int
    generator_drain_s: float


@pytest.fixture(scope="module")
def story(module_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Story:
    faults = tmp_path_factory.mktemp("faults")
    run = module_run.configure(
        run={"steps": 1000},
        task={"args": {"delay_s": 0.02, "faults": str(faults)}},
        generator={"reward_timeout_s": 2.0, "unreachable_timeout_s": 300.0},
        checkpoint={"every": 0},
    )
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(1, learner, generator, timeout_s=START_S)
    for prompt in (RAISES, NOT_A_NUMBER):
        learner.wait_for_log(f"prompt {prompt} is given up")
    run.wait_for_version(run.version() + 3, learner, generator)

    learner.signal(signal.SIGTERM)
    learner.exit_code()
    latest = (run.run_dir / "checkpoints" / "latest").read_text().strip()

    second_learner = run.learner()
    run.wait_for_version(run.version() + 3, second_learner, generator)

    stopped_at = time.monotonic()
    generator.signal_group(signal.SIGTERM)
    generator.exit_code()
    drain_s = time.monotonic() - stopped_at
    second_learner.wait_for_log("said goodbye")
    second_learner.signal(signal.SIGINT)
    second_learner.exit_code()
    version = int(re.sub(r"\D", "", latest))
    return Story(run, learner, second_learner, generator, faults, version, drain_s)


def failures(run: Run) -> Counter[str]:
    total: Counter[str] = Counter()
    for record in run.records("step"):
        total.update(record["rollouts_failed"])
    return total


# -- rewards


def test_rewards_that_raise_or_are_nan_fail_their_leases_by_reason_until_the_prompt_is_given_up(story):
    """Two prompts, four rollouts in a group; three strikes each, or more where one follows a failure of the other."""
    lost = failures(story.run)["reward_error"]
    assert 2 * MAX_STRIKES * 4 <= lost <= 2 * MAX_LONE_FAILURES * 4
    assert lost % 4 == 0
    log = story.first_learner.stderr
    assert "this prompt cannot be scored" in log
    assert "must be finite" in log
    _, given_up = steps_in(story.run.journal())
    assert given_up == {RAISES, NOT_A_NUMBER}


def test_a_reward_that_hangs_or_ends_its_process_costs_its_rollout_and_a_worker(story):
    assert {path.name for path in story.faults.iterdir()} == {"hang", "exit"}
    log = story.generator.stderr
    assert "no reward within 2 s; its worker was killed" in log
    assert "exit code 7" in log


def test_no_failure_became_a_reward(story):
    """What was trained holds computed rewards only, each at least the constant part."""
    stored = [record for record in story.run.journal() if isinstance(record, StoredGroup)]
    groups = [result_to_group(decode_body(GroupResult, record.body)) for record in stored]
    rewards = [rollout.reward for group in groups for rollout in group.rollouts]
    assert len(rewards) > 50
    assert min(rewards) >= LEAST_REWARD
    assert {len(group.rollouts) for group in groups} <= {3, 4}  # one lost to the hang, one to the exit
    assert sum(len(group.rollouts) == 3 for group in groups) == 2


# -- signals


def test_sigterm_ends_the_learner_with_a_checkpoint_and_exit_code_0(story):
    assert story.first_learner.exit_code() == 0
    assert "Traceback" not in story.first_learner.stderr
    assert story.checkpoint_version > 0
    assert json.loads((story.run.run_dir / "summary.json").read_text())["steps"] >= story.checkpoint_version


def test_the_restarted_learner_goes_on_from_that_checkpoint(story):
    assert f"resuming: checkpoint at version {story.checkpoint_version}, 0 steps to train again" in (
        story.second_learner.stderr
    )
    versions = [record["version"] for record in story.run.records("step")]
    assert versions == list(range(1, versions[-1] + 1))


def test_the_generator_waits_for_a_learner_that_stopped(story):
    assert "the learner went away" in story.generator.stderr
    assert story.generator.stderr.count("welcome from") == 2


def test_a_signal_to_the_whole_group_of_the_generator_is_a_drain_and_not_a_crash(story):
    """The engine's process is out of reach of the signal: it works until the daemon has drained."""
    assert story.generator.exit_code() == 0
    assert story.generator_drain_s < DRAIN_LIMIT_S + LATE_S
    log = story.generator.stderr
    assert not re.search(r"Traceback|ERROR", log), story.generator.last_words()
    assert "failed (engine)" not in story.second_learner.stderr


def test_a_drained_generator_leaves_no_lease_and_no_result_behind(story):
    """It finished or handed back what it had, and said goodbye: there is nothing for the learner to wait for."""
    # Not always 0: leases that were granted in this moment cross with the goodbye, and go back with it.
    assert re.search(r"said goodbye \(signal\); \d+ leases go back", story.second_learner.stderr)
    assert "expired" not in story.second_learner.stderr
    check_results_have_no_gap(story.run)


def test_sigint_ends_the_learner_like_sigterm(story):
    assert story.second_learner.exit_code() == 0
    assert "SIGINT" in story.second_learner.stderr


def test_nothing_is_left_behind(story):
    wait_until(lambda: not story.run.processes(), 10.0, f"no process of the run: {story.run.processes()}")
