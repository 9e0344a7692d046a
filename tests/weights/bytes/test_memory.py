"""Memory that other processes read in place: what can be opened, and that nothing of it is left anywhere."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.weights.bytes.memory import Opened, Place, handle_of, place, shared_buffer
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from tests.warm_processes import WarmProcess

CPU = torch.device("cpu")
FAR = 1e12  # a deadline that never comes

OWNER = """
import json, sys, time, torch
from asyncrl.weights.bytes.memory import handle_of, shared_buffer
buffer = shared_buffer(50_000, "cpu")
buffer.copy_((torch.arange(50_000) % 251).to(torch.uint8))
print(json.dumps(handle_of(buffer)[0]), flush=True)
sys.stdin.read()
"""


def expected(start, stop):
    return (torch.arange(start, stop) % 251).to(torch.uint8)


def start_owner():
    process = WarmProcess([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, json.loads(process.stdout.readline())


def end(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(scope="module")
def owner():
    """A process with shared memory, and its handle."""
    process, handle = start_owner()
    yield process, handle
    end(process)


def test_another_process_reads_the_bytes_where_they_are(owner):
    process, handle = owner
    opened, copy = Opened(handle, CPU), torch.zeros(1000, dtype=torch.uint8)
    opened.copy(777, copy, FAR)
    assert torch.equal(copy, expected(777, 1777))
    for offset in (-1, 49_001):
        with pytest.raises(ChannelError, match="not in shared memory of 50000 bytes"):
            opened.copy(offset, copy, FAR)


def test_what_is_mapped_outlives_its_owner_and_leaves_no_name_behind():
    before = {path.name for path in Path("/dev/shm").iterdir()}
    process, handle = start_owner()
    opened, copy = Opened(handle, CPU), torch.zeros(50_000, dtype=torch.uint8)
    end(process)
    opened.copy(0, copy, FAR)
    assert torch.equal(copy, expected(0, 50_000))
    assert not [name for name in {path.name for path in Path("/dev/shm").iterdir()} - before if "asyncrl" in name]
    with pytest.raises(ChannelError, match="run learner and generator as one user in one PID namespace"):
        Opened(handle, CPU)


def test_a_receiver_cannot_write_to_the_learners_memory(owner):
    with pytest.raises(ValueError, match="read-only"):
        Opened(owner[1], CPU)._memory[0] = 1


def test_a_descriptor_that_became_another_file_is_not_taken_for_the_memory(owner, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 50_000)
    with (tmp_path / "file").open("rb") as file:
        handle = owner[1] | {"pid": os.getpid(), "fd": file.fileno()}
        with pytest.raises(ChannelError, match="its owner dropped it"):
            Opened(handle, CPU)


@pytest.mark.parametrize("damage", [{"pid": None}, {"fd": "../../etc"}, {"bytes": "many"}])
def test_a_handle_of_nonsense_is_refused(owner, damage):
    with pytest.raises(ChannelError, match="malformed"):
        Opened(owner[1] | damage, CPU)


def test_more_bytes_than_there_are_cannot_be_mapped(owner):
    with pytest.raises(ChannelError):
        Opened(owner[1] | {"bytes": 1 << 30}, CPU)


def test_a_part_is_found_in_its_buffer_and_other_memory_is_not():
    buffer = shared_buffer(1000, CPU)
    assert buffer.dtype == torch.uint8 and not buffer.any()
    handle, offset = handle_of(buffer[100:200])
    assert (handle["bytes"], offset) == (1000, 100)
    assert handle_of(torch.zeros(1000, dtype=torch.uint8)) is None


def test_a_snapshot_buffer_and_its_twin_can_be_shared():
    parameters = [("a", torch.nn.Parameter(torch.randn(300))), ("b", torch.nn.Parameter(torch.randn(7, 7)))]
    buffer = SnapshotBuffer(parameters, 512, shared=True)
    handles = []
    for shared in (buffer, buffer.twin()):
        shared.snapshot()
        for bucket in shared.buckets():
            handle, offset = handle_of(bucket)
            copy = torch.zeros_like(bucket)
            Opened(handle, CPU).copy(offset, copy, FAR)
            assert torch.equal(copy, bucket) and bucket.any()
        handles.append(handle["name"])
    assert handles[0] != handles[1]


def test_dropped_buffers_give_their_descriptors_and_memory_back():
    def descriptors():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(20):
        buffer = shared_buffer(10_000, CPU)
        opened = Opened(handle_of(buffer)[0], CPU)
        opened.copy(0, torch.zeros(10_000, dtype=torch.uint8), FAR)
    assert descriptors() > before
    del buffer, opened
    assert descriptors() == before
    assert "memfd:asyncrl" not in Path("/proc/self/maps").read_text()


def test_a_place_is_the_same_for_a_process_beside_this_one():
    code = "import dataclasses, json, torch\nfrom asyncrl.weights.bytes.memory import place\n"
    code += "print(json.dumps(dataclasses.asdict(place(torch.device('cpu')))))"
    beside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert Place(**json.loads(beside.stdout)) == place(CPU)
