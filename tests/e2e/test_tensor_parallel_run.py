"""One run with two kinds of generators: an engine spread over two workers, and later a plain one. All share memory.

Three processes copy every version out of the learner's own buffer (`weights.backend=ipc`); two of them keep a shard.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from asyncrl.storage.records import StoredGroup
from tests.e2e.daemons import STEP_S, Run, check_results_have_no_gap, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# Workers wait for each other without letting go of the CPU: beside other tests that takes minutes.
SPREAD_START_S = 600.0
COMMON_SYNCS = 30  # versions that both generators proved


@dataclass
class Story:
    """What was seen while it happened."""

    run: Run
    processes: list[int]  # of each generator, below its daemon
    exit_codes: list[int]
    left_in_shm: list[str]


@pytest.fixture(scope="module")
def story(module_run: Run) -> Story:
    """From the start until both generators have proved some dozen versions, then SIGTERM to all."""
    run = module_run.configure(
        run={"steps": 100_000},
        task={"args": {"delay_s": 0.02}},
        learner={"lr": 1e-4},
        weights={"backend": "ipc", "timeout_s": 20.0},
        eval={"prompts": 0},
    )
    before = shared_memory()
    learner, spread = run.learner(), run.generator("generator.tensor_parallel_size=2")
    run.wait_for_version(1, learner, spread, timeout_s=SPREAD_START_S)
    plain = run.generator()
    wait_until(lambda: len(common_syncs(run)) >= COMMON_SYNCS, SPREAD_START_S, "syncs of both", run.daemons)
    processes = [len(psutil.Process(daemon.pid).children(recursive=True)) for daemon in (spread, plain)]
    for daemon in run.daemons:
        daemon.signal(signal.SIGTERM)
    exit_codes = [daemon.exit_code(STEP_S) for daemon in run.daemons]
    return Story(run, processes, exit_codes, sorted(shared_memory() - before))


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def common_syncs(run: Run) -> list[dict]:
    return [record for record in run.records("sync") if record["generators_committed"] == 2]


def test_all_end_in_order_and_one_engine_had_a_second_worker(story):
    assert story.exit_codes == [0, 0, 0]
    assert story.processes[0] > story.processes[1]
    wait_until(lambda: not story.run.processes(), 10.0, f"no process of the run: {story.run.processes()}")


def test_no_sync_failed_and_each_was_proven_by_a_canary(story):
    syncs = story.run.records("sync")
    assert [record["version"] for record in syncs if record["generators_failed"]] == []
    for record in syncs:
        assert record["generators_committed"] >= 1 and 0 < record["canary_max_abs_diff"] <= 1e-4
    versions = [record["version"] for record in common_syncs(story.run)]
    assert versions == sorted(set(versions))


def test_groups_of_both_were_taken_under_many_versions(story):
    versions: dict[str, set[int]] = {}
    for record in story.run.journal():
        if isinstance(record, StoredGroup):
            versions.setdefault(record.generator_id, set()).add(record.newest_version)
    assert len(versions) == 2 and all(len(seen) >= 5 for seen in versions.values())
    check_results_have_no_gap(story.run)


def test_the_policy_learned(story):
    rewards = np.array([record["reward_mean"] for record in story.run.records("step")])
    assert rewards[-10:].mean() > rewards[:10].mean() + 0.1


def test_none_of_our_shared_memory_has_a_name(story):
    assert [name for name in story.left_in_shm if "asyncrl" in name or name.startswith("torch_")] == []
