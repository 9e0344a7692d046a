"""DAPO's dynamic sampling by the two commands: every third prompt has the same reward whatever comes.

The learner is killed with -9 in the middle: what it had filtered stays filtered. And a run whose rewards are never
different, which must end all the same; and one whose groups carry the reward of a greedy completion.
"""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.records import GroupFiltered, StepTaken, StoredGroup
from asyncrl.types import Group
from tests.e2e.daemons import START_S, STEP_S, Run, check_every_ordinal_once, check_results_have_no_gap, wait_until
from tests.e2e.letters_task import LEAST_REWARD

pytestmark = pytest.mark.slow

STEPS = 12
FLAT_EVERY = 3


@dataclass
class Story:
    """What was seen while it happened."""

    run: Run
    scored: Path
    filtered_before: set[int]  # on disk when the learner was killed


def filtered(run: Run) -> list[int]:
    return [record.ordinal for record in run.journal() if isinstance(record, GroupFiltered)]


def groups(run: Run) -> dict[tuple[int, int], Group]:
    stored = (record for record in run.journal() if isinstance(record, StoredGroup))
    return {(item.ordinal, item.attempt): result_to_group(decode_body(GroupResult, item.body)) for item in stored}


def trained(run: Run) -> list[tuple[int, int]]:
    return [group for record in run.journal() if isinstance(record, StepTaken) for group in record.groups]


@pytest.fixture(scope="module")
def story(module_run: Run) -> Story:
    scored = module_run.folder / "scored"
    run = module_run.configure(
        run={"steps": STEPS},
        algorithm={"name": "dapo"},
        task={"args": {"delay_s": 0.03, "flat_every": FLAT_EVERY, "scored": str(scored)}},
        checkpoint={"every": 3},
        generator={"unreachable_timeout_s": 300.0},
    )
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(5, learner, generator, timeout_s=START_S)
    learner.signal(signal.SIGKILL)
    learner.process.wait()
    filtered_before = set(filtered(run))
    learner = run.learner()
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", [learner])
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    return Story(run, scored, filtered_before)


def test_no_group_with_equal_rewards_is_trained_on(story):
    stored = groups(story.run)
    for key in trained(story.run):
        rewards = [rollout.reward for rollout in stored[key].rollouts]
        assert min(rewards) < max(rewards)
        assert key[0] % FLAT_EVERY


def test_every_prompt_is_trained_once_or_filtered_once(story):
    check_every_ordinal_once(story.run, STEPS)
    check_results_have_no_gap(story.run)


def test_every_prompt_without_a_signal_was_filtered(story):
    last = max(ordinal for ordinal, _ in trained(story.run))
    assert set(range(0, last, FLAT_EVERY)) <= set(filtered(story.run))


def test_what_was_filtered_before_the_kill_was_not_leased_again(story):
    """Measured where the work is done: its four completions were scored, and no fifth one."""
    times_scored = Counter(map(int, story.scored.read_text().split()))
    assert len(story.filtered_before) >= 5
    assert {times_scored[ordinal] for ordinal in story.filtered_before} == {4}


def test_filtered_groups_are_counted(story):
    """Those after the last metrics line before the kill have no line to be in."""
    steps = story.run.records("step")
    counted = sum(record["groups_filtered"] for record in steps)
    assert 0 < counted <= len(filtered(story.run))
    assert counted >= len(filtered(story.run)) - len(story.filtered_before)
    assert any(0 < record["filtered_token_share"] < 1 for record in steps)
    assert all(record["groups_zero_variance"] == 0 for record in steps)


def test_no_token_was_too_old(story):
    assert max(record["policy_age_max"] for record in story.run.records("step")) <= 2
    assert sum(record["rollouts_dropped"] for record in story.run.records("step")) == 0


def test_a_task_whose_rewards_are_all_equal_comes_to_its_end_and_says_so(make_run):
    run = make_run().configure(
        run={"steps": 2},
        algorithm={"name": "dapo"},
        learner={"groups_per_step": 2},
        staleness={"max_age": 0},
        task={"args": {"flat_every": 1}},
        eval={"prompts": 0},
    )
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(1, learner, generator, timeout_s=START_S)
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    assert learner.stderr.count("32 groups had equal rewards and were filtered, 0 had not") == 1
    assert len(filtered(run)) == 64
    assert [record["groups_zero_variance"] for record in run.records("step")] == [2, 2]
    check_every_ordinal_once(run, 2)


def test_groups_carry_the_reward_of_a_greedy_completion_when_it_is_the_baseline(make_run):
    run = make_run().configure(run={"steps": 3}, algorithm={"name": "remax"})
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(1, learner, generator, timeout_s=START_S)
    assert learner.exit_code(STEP_S) == 0
    assert generator.exit_code() == 0
    stored = groups(run)
    assert all(group.baseline_reward >= LEAST_REWARD for group in stored.values())
    # Greedy is another policy than the one sampled from: its reward is no constant and no copy.
    assert len({group.baseline_reward for group in stored.values()}) > 1
    assert any(group.baseline_reward not in [r.reward for r in group.rollouts] for group in stored.values())
    check_every_ordinal_once(run, 3)
