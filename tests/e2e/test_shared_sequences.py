"""Two trainer ranks that share the tokens of each sequence train a run to its end."""

from __future__ import annotations

import pytest

from tests.e2e.daemons import START_S, STEP_S, Run, check_every_ordinal_once, wait_until

pytestmark = pytest.mark.slow

STEPS = 5


@pytest.fixture(scope="module")
def run(module_run: Run) -> Run:
    run = module_run.configure(
        run={"steps": STEPS}, learner={"ranks": 2, "sequence_parallel": 2}, checkpoint={"every": 2}
    )
    learner, generator = run.learner(), run.generator()
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", [learner])
    assert learner.exit_code(STEP_S) == generator.exit_code(STEP_S) == 0
    return run


def test_every_prompt_is_trained_once_and_both_ranks_had_one_share(run):
    check_every_ordinal_once(run, STEPS)
    steps = run.records("step")
    assert len(steps) == STEPS
    fresh = [record["logprob_gap_age0"] for record in steps if record.get("logprob_gap_age0") is not None]
    assert fresh and all(gap < 1e-4 for gap in fresh), "both compute what the generator computed"
    assert (run.run_dir / "export" / "config.json").is_file()


def test_generators_compute_what_both_ranks_hold(run):
    syncs = [record for record in run.records("sync") if record["generators_committed"]]
    assert syncs
    assert all(sync["canary_max_abs_diff"] <= 1e-4 for sync in syncs)
