"""SIGTERM while code of the task blocks, in whichever process that is: the daemon ends in good order and in time."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.e2e.daemons import START_S, Daemon, Run, wait_until
from tests.waits import LATE_S

pytestmark = pytest.mark.slow

LEARNER_END_S = 5.0  # it waits for nothing of the task's
GENERATOR_END_S = 8.0  # generator.drain_timeout_s and 2 s
NOT_READY_S = 3600.0


def blocked_run(make_run, folder: Path, **args: object) -> Run:
    folder.mkdir()
    return make_run().configure(
        task={"path": "unruly_task:Unruly", "args": {"marks": str(folder), **args}},
        generator={"reward_timeout_s": NOT_READY_S, "lease_timeout_s": 2 * NOT_READY_S},
        eval={"prompts": 2},
    )


def wait_for_block(folder: Path, daemon: Daemon, others: int = 0) -> None:
    """Returns once one more process than `others` is about to block."""
    wait_until(lambda: len(list(folder.iterdir())) > others, START_S, "a call that blocks", [daemon])


def check_end(run: Run, daemon: Daemon, limit_s: float) -> None:
    stopped_at = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0, daemon.last_words()
    assert time.monotonic() - stopped_at < limit_s + LATE_S, daemon.last_words()
    assert "Traceback" not in daemon.stderr and " ERROR " not in daemon.stderr, daemon.last_words()


@pytest.mark.parametrize("how", ["block", "swallow"])
@pytest.mark.parametrize("where", ["constructor", "eval_fault", "faults"])
def test_the_learner_ends_while_its_task_blocks(make_run, tmp_path, where, how):
    run = blocked_run(make_run, tmp_path / "marks", **{where: {"all": how} if where == "faults" else how})
    learner = run.learner()
    wait_for_block(tmp_path / "marks", learner)
    check_end(run, learner, LEARNER_END_S)
    assert run.processes() == {}


def test_the_generator_ends_while_the_constructor_blocks_in_its_reward_worker(make_run, tmp_path):
    run = blocked_run(make_run, tmp_path / "marks", constructor="block")
    learner = run.learner()
    wait_for_block(tmp_path / "marks", learner)
    generator = run.generator()
    wait_for_block(tmp_path / "marks", generator, others=1)
    check_end(run, generator, GENERATOR_END_S)  # in the middle of vLLM's import, which nobody can break off
    check_end(run, learner, LEARNER_END_S)
    assert run.processes() == {}


@pytest.mark.parametrize("how", ["block", "swallow"])
def test_both_end_while_a_reward_blocks(make_run, tmp_path, how):
    run = blocked_run(make_run, tmp_path / "marks", reward_fault=how)
    learner, generator = run.learner(), run.generator()
    wait_for_block(tmp_path / "marks", generator)
    check_end(run, generator, GENERATOR_END_S)
    check_end(run, learner, LEARNER_END_S)
    assert run.processes() == {}


def test_a_signal_before_the_daemon_is_up_ends_it_at_once_and_its_helper_too(make_run, tmp_path):
    """The names of the reward's parts are asked for before anything is started."""
    run = blocked_run(make_run, tmp_path / "marks", constructor="swallow").configure(reward={"weights": {"exact": 2.0}})
    for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
        others = len(list((tmp_path / "marks").iterdir()))
        learner = run.learner()
        wait_for_block(tmp_path / "marks", learner, others)
        learner.signal(number)
        assert learner.exit_code() == code
        assert "Traceback" not in learner.stderr
        wait_until(lambda: run.processes() == {}, LATE_S, "the end of the helper")
