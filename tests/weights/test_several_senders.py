"""Ranks that hold a policy together send it together: real fully_shard processes and channels, receivers in threads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asyncrl.link.sockets import ServerSocket
from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.bytes.memory import placement
from asyncrl.weights.plan.planner import SyncPlanner
from tests.waits import LATE_S
from tests.warm_processes import WarmProcess
from tests.weights.weight_world import MAX_BYTES, Receiver, World

PROCESS = Path(__file__).parent / "sender_process.py"
TIMEOUT_S = 20.0


class SenderWorld(World):
    """As `World`, with the publisher in processes of their own."""

    def __init__(self, folder, size, *, dtype="bfloat16", bucket_bytes=2048, backend="gloo", timeout_s=TIMEOUT_S):
        self.folder, self.size = folder, size
        self.socket = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = json.dumps({"vocab": 509, "dtype": dtype, "bucket_bytes": bucket_bytes, "backend": backend})
        self.ranks = [
            WarmProcess(
                [sys.executable, str(PROCESS), str(rank), str(size), str(port), self.socket.address, settings],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]  # fmt: skip
        self.buffer_bytes = [json.loads(process.stdout.readline())["buffer_bytes"] for process in self.ranks]
        self.begin(timeout_s, 8)
        self.place = placement([torch.device("cpu")])
        self.planner = SyncPlanner(
            run_epoch=1, run_name="r", timeout_s=timeout_s, tolerance=1e-6, cell_size=8, backend=backend
        )
        self.planner.trainer_joined(self.place)

    def join(self, name):
        self.receivers[name] = Receiver(name, self.replies)
        self.planner.joined(name, 1, 1, time.monotonic(), self.place)

    def order(self, how):
        """The next version: changed and published by all ranks."""
        self._version += 1
        self.state = self.folder / f"{self._version}.safetensors"
        for process in self.ranks:
            print(f"publish {self._version} {how} {self.state}", file=process.stdin, flush=True)

    def publish(self, how):
        """The next version to everybody; the encodings of its rounds."""
        self.order(how)
        return self.settle()

    def settle(self):
        first = len(self.ended)
        self.wait(lambda: not self.planner.rounds and self._all_hold(self._version))
        for receiver in self.receivers.values():
            self.check(receiver)
        return ["dense" if ended.base_version is None else "delta" for ended in self.ended[first:]]

    def check(self, receiver):
        """What a receiver holds is the whole state, bit for bit."""
        expected = load_file(self.state)
        held = dict(tensor_views(receiver.held.layout, receiver.held.buffer))
        assert held.keys() == expected.keys()
        for name, tensor in expected.items():
            word = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
            assert torch.equal(held[name].view(word), tensor.view(word)), name

    def tell(self, rank, line):
        print(line, file=self.ranks[rank].stdin, flush=True)

    def close(self):
        for process in self.ranks:
            process.stdin.close()
        for process in self.ranks:
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        for receiver in self.receivers.values():
            receiver.close()
        self.socket.close()


def make(tmp_path_factory, **options):
    return SenderWorld(tmp_path_factory.mktemp("senders"), **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two ranks, for tests that leave both alive."""
    world = make(tmp_path_factory, size=2)
    world.join("a")
    world.join("b")
    yield world
    world.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    world = make(tmp_path_factory, size=3, dtype="float32")
    world.join("a")
    yield world
    world.close()


@pytest.mark.parametrize("ranks", ["pair", "three"])
def test_every_version_arrives_bit_for_bit_whole_and_as_deltas(ranks, request):
    world = request.getfixturevalue(ranks)
    assert world.publish("none") == ["dense"]
    layout = world.planner.snapshot.manifest.layout
    own = [sum(b.num_bytes for b in layout.buckets if b.sender == rank) for rank in range(world.size)]
    assert layout.num_senders == world.size and any(len(bucket.pieces) > 1 for bucket in layout.buckets)
    assert max(own) < 1.2 * layout.total_bytes / world.size, "nobody sends much more than its share"
    assert max(world.buffer_bytes) < 1.3 * layout.total_bytes / world.size, "nor holds it"
    assert world.ended[0].num_bytes == sum(own)
    assert world.publish("few") == ["delta"]
    delta = world.planner.snapshot.delta
    assert len(delta.payloads) == world.size and world.ended[-1].num_bytes == delta.num_bytes
    assert world.publish("step") == ["dense"], "an optimizer step of this size changes every word"
    for _ in range(3):
        assert world.publish("few") == ["delta"]
    assert not world.failed


def test_a_sender_whose_bytes_are_not_those_it_measured_is_found_and_the_next_version_comes(pair):
    pair.tell(1, "lie")
    pair.order("step")
    pair.wait(lambda: len(pair.failed) == 2)
    buckets = pair.planner.snapshot.manifest.layout.buckets
    first = next(index for index, bucket in enumerate(buckets) if bucket.sender == 1)
    for failed in pair.failed:
        assert f"bucket {first} of version {pair._version}: digest" in failed.reason and failed.phase == "stage"
    pair.publish("step")
    assert {receiver.held.version for receiver in pair.receivers.values()} == {pair._version}


def test_receivers_copy_out_of_the_memory_of_both_senders(tmp_path_factory):
    world = make(tmp_path_factory, size=2, backend="ipc")
    try:
        world.join("a")
        world.join("b")
        assert [world.publish(how) for how in ("none", "few", "step")] == [["dense"], ["delta"], ["dense"]]
        assert not world.failed
    finally:
        world.close()


@pytest.mark.parametrize(
    ("how", "says"),
    [(signal.SIGKILL, "publisher of rank 1: "), (signal.SIGSTOP, "sender 1 did not say how its part of version 0")],
)
def test_a_sender_that_is_gone_costs_one_deadline_is_named_and_ends_the_publisher(tmp_path_factory, how, says):
    world = make(tmp_path_factory, size=2, timeout_s=2.0)
    try:
        world.join("a")
        world.publish("none")
        started = time.monotonic()
        world.ranks[1].send_signal(how)
        if how is signal.SIGSTOP:
            world.join("b")
            world.wait(lambda: world.failed)
            assert world.failed[0].name == "b" and time.monotonic() - started < 5.0 + LATE_S
        world.tell(0, "crash")
        while "crash" not in (said := json.loads(world.ranks[0].stdout.readline())):
            pass
        assert says in said["crash"]
        assert time.monotonic() - started < 12.0
    finally:
        world.ranks[1].kill()
        world.close()
