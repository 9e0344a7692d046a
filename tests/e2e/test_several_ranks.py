"""Two trainer ranks, from start to end: one is killed on the way, both start again, and nothing else notices."""

from __future__ import annotations

import os
import re
import signal
from ast import literal_eval
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

STEPS = 12


@pytest.fixture(scope="module")
def daemons(module_run: Run) -> tuple[Run, Daemon, Daemon]:
    run = module_run.configure(
        run={"steps": STEPS},
        # Many passes make a step long: the kill comes in the middle of one.
        learner={"ranks": 2, "micro_batch_tokens": 64},
        log={"level": "debug"},  # which says what each rank sent
        task={"args": {"delay_s": 0.03}},
        checkpoint={"every": 3},
    )
    learner, generator = run.learner(), run.generator()
    run.wait_for_version(4, learner, generator, timeout_s=START_S)
    os.kill(pids_by_rank(run)[1], signal.SIGKILL)
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", [learner])
    learner.exit_code(STEP_S)
    generator.exit_code(STEP_S)
    return run, learner, generator


def pids_by_rank(run: Run) -> dict[int, int]:
    found = {}
    for pid, line in run.processes().items():
        if "asyncrl.trainer.rank" in line:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found[next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))] = pid
    return found


def test_the_run_ends_well(daemons):
    run, learner, generator = daemons
    assert learner.exit_code() == generator.exit_code() == 0
    assert run.version() == STEPS
    assert (run.run_dir / "export" / "config.json").is_file()


def test_the_killed_rank_is_named_and_costs_one_restart(daemons):
    _, learner, generator = daemons
    assert "trainer died (rank 1: exit code -9 (SIGKILL))" in learner.stderr
    assert learner.stderr.count("trainer started") == 2
    assert "ranks [0, 1]" in learner.stderr
    assert generator.stderr.count("welcome from") == 1


def test_no_rollout_is_lost_and_every_prompt_is_trained_once(daemons):
    run, _, _ = daemons
    check_every_ordinal_once(run, STEPS)
    check_results_have_no_gap(run)
    steps = run.records("step")
    assert sum(record["rollouts_dropped"] for record in steps) == 0


def test_generators_compute_what_all_ranks_together_hold(daemons):
    run, _, _ = daemons
    syncs = [record for record in run.records("sync") if record["generators_committed"]]
    assert len(syncs) >= STEPS // 2
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)


def test_weights_come_from_both_ranks_in_about_equal_parts(daemons):
    run, _, _ = daemons
    log = (run.run_dir / "trainer.log").read_text()
    sent = [literal_eval(found) for found in re.findall(r"bytes sent by each rank: (\{.*\})", log)]
    assert len(sent) >= len([record for record in run.records("sync") if record["generators_committed"]]) - 1
    for by_rank in sent:
        assert by_rank.keys() == {0, 1}
        assert 0.3 < by_rank[1] / (by_rank[0] + by_rank[1]) < 0.7, by_rank
