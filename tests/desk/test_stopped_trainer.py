"""A trainer that stands still for longer than a sync may take: the link drops and takes messages along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncrl.host.addresses import parse_address
from asyncrl.link import limits
from asyncrl.link.messages import SyncOffer, SyncSwap
from asyncrl.link.sockets import ServerSocket
from asyncrl.weights.plan.planner import WANTED_REPEAT_S
from tests.link.chaos_proxy import ChaosProxy
from tests.warm_processes import WarmProcess
from tests.weights.weight_world import MAX_BYTES, World

TIMEOUT_S = 3.0
START_S = 60.0
SPARE_S = 10.0


class StoppableWorld(World):
    """As `World`, with the publisher in a process that can be stopped."""

    def __init__(self):
        self.socket = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
        self.proxy = ChaosProxy(parse_address(self.socket.address).port)
        self.proxy.__enter__()
        script = Path(__file__).parents[1] / "weights" / "publisher_process.py"
        self.process = WarmProcess(
            [sys.executable, str(script), self.proxy.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.begin(TIMEOUT_S, cell_size=8)

    def publish(self, timeout_s=START_S):
        """The next version, until all hold it."""
        self._version += 1
        self.tell(self._version)
        self.wait(lambda: self._all_hold(self._version), timeout_s)

    def tell(self, line):
        print(line, file=self.process.stdin, flush=True)

    @property
    def num_open_channels(self):
        self.tell("?")
        return int(self.process.stdout.readline())

    def stop_at(self, phase):
        """Stops the publisher when `a` gets this message, and cuts its link."""
        receiver = self.receivers["a"]
        take = receiver.take

        def stop_and_take(message):
            if isinstance(message, phase):
                receiver.take = take
                os.kill(self.process.pid, signal.SIGSTOP)
                self.proxy.cut()
                if phase is SyncSwap:  # its answer ends the round, and what is said then finds nobody
                    self.wait(self.link_is_down, SPARE_S)
            take(message)

        receiver.take = stop_and_take

    def link_is_down(self):
        return self.socket.disconnects == 1

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        for receiver in self.receivers.values():
            receiver.close()
        self.proxy.__exit__()
        self.socket.close()


@pytest.fixture
def world():
    world = StoppableWorld()
    yield world
    world.close()


@pytest.mark.parametrize("phase", [SyncOffer, SyncSwap])
def test_training_goes_on_after_the_trainer_stood_still_in_a_sync_for_longer_than_its_deadline(world, phase):
    world.join("a")
    world.join("b")
    world.publish()
    world.stop_at(phase)
    num_ended = len(world.ended)
    world.tell(1)
    world.wait(lambda: world.planner.snapshot.version == 1, TIMEOUT_S)
    stopped_at = time.monotonic()
    world.wait(world.link_is_down, SPARE_S)
    world.wait(lambda: len(world.ended) > num_ended, TIMEOUT_S + SPARE_S)
    world.wait(lambda: time.monotonic() >= stopped_at + TIMEOUT_S, TIMEOUT_S + SPARE_S)
    world.planner.left("b", time.monotonic(), "is dead")  # the closing of its channel gets lost
    world.receivers.pop("b").close()
    world._turn()
    assert world.link_is_down(), "it came back by itself"

    os.kill(world.process.pid, signal.SIGCONT)
    world._version = 1
    for _ in range(2):
        world.publish(timeout_s=4 * TIMEOUT_S + limits.RECONNECT_MAX_MS / 1e3 + WANTED_REPEAT_S)
    world.wait(lambda: world.num_open_channels == 1, 2 * WANTED_REPEAT_S)
