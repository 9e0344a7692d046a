"""`asyncrl run` with the real daemons: one command trains, mends a generator, and leaves nothing when it ends."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from tests.e2e.daemons import START_S, Run, check_every_ordinal_once, wait_until

STOP_S = 10.0  # what is promised for one signal


def pids_of(run: Run, module: str) -> list[int]:
    """Processes of the run that were started as `python -m module`; their children may show the same."""
    return sorted(pid for pid, command in run.processes().items() if f"-m {module} " in command)


@pytest.mark.slow
def test_one_command_trains_mends_a_dead_generator_and_ends_within_10_s_of_a_signal(make_run):
    run = make_run().configure(run={"steps": 1000})
    command = run.one_host("transport.address=auto")
    run.wait_for_version(1, command, timeout_s=START_S)
    assert "nothing is pinned" in command.stderr
    os.kill(pids_of(run, "asyncrl.cli.generator")[0], signal.SIGKILL)
    command.wait_for_log("generator was ended by SIGKILL")
    command.wait_for_log("generator starts again")
    reached = run.version()
    run.wait_for_version(reached + 4, command, timeout_s=START_S)  # more than what was in the buffer at its death
    began = time.monotonic()
    command.signal(signal.SIGINT)
    assert command.exit_code() == 0
    assert time.monotonic() - began < STOP_S, command.last_words()
    assert run.processes() == {}
    assert (run.run_dir / "checkpoints").is_dir()
    assert "checkpoint of version" in command.stderr
    assert (run.run_dir / "report.html").is_file(), "after a signal too"
    assert f"report       {run.run_dir}/report.html" in command.stdout
    check_every_ordinal_once(run, max(record["version"] for record in run.records("step")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_it_is_ended_while_all_are_starting(make_run, number):
    run = make_run()
    command = run.one_host("transport.address=auto")
    for module in ("asyncrl.cli.learner", "asyncrl.cli.generator", "asyncrl.trainer.rank"):
        wait_until(lambda module=module: pids_of(run, module), 60.0, module, [command])
    began = time.monotonic()
    command.signal(number)
    assert command.exit_code() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not run.processes(), 10.0, f"the end of {run.processes()}")
    assert time.monotonic() - began < STOP_S
    assert "did not end in time" not in command.stderr, command.last_words()


def test_a_generator_that_cannot_start_ends_the_run_and_says_why(make_run):
    run = make_run()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = run.one_host(f"generator.http=127.0.0.1:{port}")
        assert command.exit_code() == 2
    assert f"generator.http=127.0.0.1:{port} cannot be had here (Address already in use)" in command.stderr
    assert "no generator is left" in command.stderr
    assert run.processes() == {}
