"""Trainer ranks of a second host, as far as one machine can show it: they meet at an address that is not loopback.

Each host holds a copy of the model.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys

import pytest

from tests.e2e.daemons import MARK, START_S, STEP_S, Daemon, Run, check_every_ordinal_once, free_port, wait_until

pytestmark = pytest.mark.slow

STEPS = 8


def private_address() -> str:
    """An IPv4 address of this machine that other hosts of its network could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))  # a datagram socket: nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address = str(probe.getsockname()[0])
    if ipaddress.ip_address(address).is_global or ipaddress.ip_address(address).is_loopback:
        pytest.skip(f"{address} is no private address")
    return address


def start_node(run: Run) -> Daemon:
    environment = {**os.environ, MARK: run.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "asyncrl.cli.trainer_node", str(run.config_file), "--node", "1"]
    node = Daemon(command, run.folder, "node", environment)
    run.daemons.append(node)
    return node


def rank_of_the_node(run: Run) -> int:
    (pid,) = (pid for pid, line in run.processes().items() if line.rstrip().endswith("config.yaml -"))
    return pid


def test_a_killed_rank_of_another_host_costs_one_restart_on_both_sides(make_run):
    run = make_run().configure(
        run={"steps": STEPS},
        learner={"ranks": 1, "nodes": 2, "replicas": 2, "port": free_port(), "micro_batch_tokens": 64},
        weights={"host": private_address()},
        task={"args": {"delay_s": 0.03}},
    )
    learner, generator = run.learner(), run.generator()
    node = start_node(run)
    run.wait_for_version(3, learner, generator, node, timeout_s=START_S)
    os.kill(rank_of_the_node(run), signal.SIGKILL)
    wait_until(lambda: run.version() >= STEPS, START_S, "the last step", [learner])
    assert learner.exit_code(STEP_S) == generator.exit_code(STEP_S) == node.exit_code(STEP_S) == 0
    assert "no sign of life of rank 1" in learner.stderr
    assert learner.stderr.count("trainer started") == node.stderr.count("started; they meet rank 0 at") == 2
    check_every_ordinal_once(run, STEPS)
