"""Two trainer ranks: one is killed, and both start again. Then the learner is killed, and goes on with three, then one.

The generator lives through all of it.
"""

from __future__ import annotations

import os
import re
import signal
from ast import literal_eval
from dataclasses import dataclass
from pathlib import Path

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

pytestmark = pytest.mark.slow

STEPS = 20


@dataclass
class Story:
    """The learners that there were one after the other, by their number of ranks, and the only generator."""

    run: Run
    two: Daemon
    three: Daemon
    one: Daemon
    generator: Daemon


@pytest.fixture(scope="module")
def story(module_run: Run) -> Story:
    run = module_run.configure(
        run={"steps": STEPS},
        # Many passes make a step long: the kill comes in the middle of one.
        learner={"ranks": 2, "micro_batch_tokens": 64},
        log={"level": "debug"},  # which says what each rank sent
        task={"args": {"delay_s": 0.03}},
        checkpoint={"every": 3},
        generator={"unreachable_timeout_s": 300.0},
    )
    two, generator = run.learner(), run.generator()
    run.wait_for_version(4, two, generator, timeout_s=START_S)
    os.kill(pids_by_rank(run)[1], signal.SIGKILL)
    run.wait_for_version(8, two, generator, timeout_s=START_S)
    three = after_a_kill(run, two, generator, ranks=3)
    one = after_a_kill(run, three, generator, ranks=1)
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", [one])
    one.exit_code(STEP_S)
    generator.exit_code(STEP_S)
    return Story(run, two, three, one, generator)


def after_a_kill(run: Run, learner: Daemon, generator: Daemon, *, ranks: int) -> Daemon:
    """The learner with another number of ranks that goes on where kill -9 met the one before."""
    reached = run.version()
    learner.signal(signal.SIGKILL)
    wait_until(lambda: not pids_by_rank(run), STEP_S, "the end of its ranks")
    learner = run.learner(f"learner.ranks={ranks}")
    run.wait_for_version(reached + 3, learner, generator, timeout_s=START_S)
    return learner


def pids_by_rank(run: Run) -> dict[int, int]:
    found = {}
    for pid, line in run.processes().items():
        if "asyncrl.trainer.rank" in line:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found[next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))] = pid
    return found


def test_the_run_ends_well(story):
    assert story.one.exit_code() == story.generator.exit_code() == 0
    assert story.run.version() == STEPS
    assert (story.run.run_dir / "export" / "config.json").is_file()


def test_the_killed_rank_is_named_and_costs_one_restart(story):
    assert "trainer died (rank 1: exit code -9 (SIGKILL))" in story.two.stderr
    assert story.two.stderr.count("trainer started") == 2
    assert "ranks [0, 1]" in story.two.stderr


def test_another_number_of_ranks_goes_on_from_the_checkpoint_and_says_so(story):
    log = (story.run.run_dir / "trainer.log").read_text()
    assert "was written by 2 ranks and 3 go on from it" in log
    assert "was written by 3 ranks and 1 go on from it" in log
    assert story.generator.stderr.count("welcome from") == 3, "the generator outlived two learners"


def test_no_rollout_is_lost_and_every_prompt_is_trained_once(story):
    check_every_ordinal_once(story.run, STEPS)
    check_results_have_no_gap(story.run)
    assert sum(record["rollouts_dropped"] for record in story.run.records("step")) == 0


def test_the_first_rank_tells_how_long_it_waited_for_the_others(story):
    told = [step["learner_time_s"] for step in story.run.records("step")]
    assert told[1]["ranks"] > 0.0, "of two ranks"
    assert "ranks" not in told[-1], "of one"


def test_generators_compute_what_all_ranks_together_hold(story):
    syncs = [record for record in story.run.records("sync") if record["generators_committed"]]
    assert len(syncs) >= STEPS // 2
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)


def test_weights_come_from_all_ranks_in_about_equal_parts(story):
    log = (story.run.run_dir / "trainer.log").read_text()
    sent = [literal_eval(found) for found in re.findall(r"bytes sent by each rank: (\{.*\})", log)]
    assert {2, 3} <= {len(by_rank) for by_rank in sent}
    for by_rank in sent:
        assert by_rank.keys() == set(range(len(by_rank)))
        even = sum(by_rank.values()) / len(by_rank)
        assert all(0.6 * even < share < 1.4 * even for share in by_rank.values()), by_rank
