"""Channels that share memory: real processes that take, die, stand still and disagree."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.link.field_checks import to_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.memory import shared_buffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.ipc import IpcTransport, _Process
from tests.waits import LATE_S
from tests.warm_processes import WarmProcess
from tests.weights.channels.members import in_threads, members_of, pair

SPEC = ChannelSpec("127.0.0.1", 0, "ipc/1", 0, 2, "ipc", 60.0)
NUM_BYTES = 100_000
NO_PID = 2**22 + 1  # above the kernel's largest


def filled(number, buffer=None):
    buffer = torch.empty(NUM_BYTES, dtype=torch.uint8) if buffer is None else buffer
    return buffer.random_(generator=torch.Generator().manual_seed(number))


def names_of_ours():
    return {path.name for path in Path("/dev/shm").iterdir() if "asyncrl" in path.name}


@pytest.fixture
def open_channel():
    """Makes channels with a process per receiver, and ends all of them."""
    channels, members = [], []

    def make(num_receivers, **options):
        spec = dataclasses.replace(SPEC, prefix=f"ipc/{len(channels)}", world_size=1 + num_receivers)
        channels.append(WeightChannel.host(spec))
        ours = members_of(channels[-1], **({"num_bytes": NUM_BYTES, "timeout_s": 20.0} | options))
        members.extend(ours)
        channels[-1].join()
        return channels[-1], ours

    yield make
    for channel in channels:
        channel.close()
    for member in members:
        member.kill()


def broadcast_until_it_fails(channel, flat, timeout_s):
    for _ in range(100):
        started = time.monotonic()
        try:
            channel.broadcast([flat], timeout_s)
        except ChannelError as error:
            return str(error), time.monotonic() - started
    raise AssertionError("the channel never failed")


def test_processes_take_shared_and_other_memory_and_a_killed_one_ends_the_channel_at_once_and_the_next_channel_works(
    open_channel,
):
    channel, (healthy, doomed) = open_channel(2, faults={2: {7: "SIGKILL"}})
    shared, expected = shared_buffer(3 * NUM_BYTES, "cpu"), []
    for bucket in range(6):  # shared memory at three offsets, memory of the sender's own, and a fresh one each time
        part = shared[bucket * NUM_BYTES :][:NUM_BYTES] if bucket < 3 else None
        flat = filled(bucket, part)
        channel.broadcast([flat], 20.0)
        expected.append(digest(flat))
        flat.zero_()  # at once: receivers must have their copy by now
    for member in (healthy, doomed):
        while "bucket" not in (report := member.report()):
            pass
        digests = [report["digest"], *(member.report()["digest"] for _ in range(5))]
        assert digests == expected

    error, elapsed_s = broadcast_until_it_fails(channel, shared[:NUM_BYTES], 30.0)
    assert f"rank 2 (process {doomed.process.pid}) ended before taken/7/2" in error
    assert elapsed_s < LATE_S, "a death is seen, not waited for"
    channel.close()
    assert healthy.error()["elapsed_s"] < 10.0
    assert names_of_ours() == set()

    channel, (member,) = open_channel(1)
    flat = filled(9, shared[:NUM_BYTES])
    channel.broadcast([flat], 20.0)
    assert [member.report() for _ in range(3)][2] == {"bucket": 0, "digest": digest(flat)}


def test_a_receiver_that_stands_still_costs_one_deadline_and_fails_when_it_wakes(open_channel):
    channel, (healthy, stopped) = open_channel(2, timeout_s=3.0, faults={2: {2: "SIGSTOP"}})
    flat = filled(1, shared_buffer(NUM_BYTES, "cpu"))
    error, elapsed_s = broadcast_until_it_fails(channel, flat, 3.0)
    assert "taken/2/2 of rank 2 did not come in time" in error
    assert 2.9 < elapsed_s < 3.0 + LATE_S
    flat.zero_()  # the sender goes on; whoever wakes now must not take this for bucket 2
    channel.close()
    stopped.signal(signal.SIGCONT)
    reports = [stopped.report() for _ in range(5)]
    assert "error" in reports[-1] and [r["bucket"] for r in reports if "bucket" in r] == [0, 1]
    assert "error" in healthy.error()


SENDER = """
import json, os, signal, sys, torch
from asyncrl.link.field_checks import from_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.bytes.memory import shared_buffer
flat = shared_buffer(100_000, "cpu").fill_(7)
channel = WeightChannel.host(from_plain(ChannelSpec, json.loads(sys.argv[1])))
print(channel.store_port, flush=True)
channel.join()
channel.broadcast([flat], 20.0)
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_sender_that_dies_or_stands_still_ends_the_receivers_by_their_deadline_and_leaves_no_memory(fault):
    before = names_of_ours()
    command = [sys.executable, "-c", SENDER, json.dumps(to_plain(SPEC)), fault]
    sender = WarmProcess(command, stdout=subprocess.PIPE)
    try:
        port = int(sender.stdout.readline())
        member = WeightChannel(dataclasses.replace(SPEC, rank=1, store_port=port))
        member.join()
        flat = torch.zeros(NUM_BYTES, dtype=torch.uint8)
        member.broadcast([flat], 20.0)
        assert (flat == 7).all()
        started = time.monotonic()
        with pytest.raises(ChannelError, match="broadcast of 100000 bytes in weight channel 'ipc/1'"):
            member.broadcast([flat], 2.0)
        assert time.monotonic() - started < 2.0 + LATE_S
        member.close()
    finally:
        sender.kill()
        sender.wait()
        sender.stdout.close()
    assert names_of_ours() == before
    assert "memfd:asyncrl" not in Path("/proc/self/maps").read_text()


def test_a_sender_goes_on_only_when_everybody_took_the_bytes():
    root = WeightChannel.host(dataclasses.replace(SPEC, world_size=3))
    members = [WeightChannel(root.spec.for_rank(rank)) for rank in (1, 2)]
    in_threads(root.join, *(member.join for member in members))
    flat, copies = filled(1), torch.zeros(2, NUM_BYTES, dtype=torch.uint8)
    sent = threading.Event()
    sender = threading.Thread(target=lambda: (root.broadcast([flat], 20.0), sent.set()), daemon=True)
    sender.start()
    members[0].broadcast([copies[0]], 20.0)
    assert not sent.wait(0.3), "one of two has not taken anything"
    members[1].broadcast([copies[1]], 20.0)
    assert sent.wait(10.0)
    assert torch.equal(copies, flat.expand(2, -1))
    for channel in (root, *members):
        channel.close()


def test_channels_send_at_the_same_time_out_of_one_buffer():
    buffer = filled(3, shared_buffer(NUM_BYTES, "cpu"))
    pairs = [pair(dataclasses.replace(SPEC, prefix=f"cell/{i}")) for i in range(3)]
    copies = torch.zeros(3, NUM_BYTES, dtype=torch.uint8)

    def run(channel, flat):
        channel.broadcast(flat.split(NUM_BYTES // 10), 20.0)

    calls = []
    for (root, member), copy in zip(pairs, copies, strict=True):
        calls += [lambda root=root: run(root, buffer), lambda member=member, copy=copy: run(member, copy)]
    in_threads(*calls)
    assert torch.equal(copies, buffer.expand(3, -1))
    for channel in itertools.chain(*pairs):
        channel.close()


def test_memory_is_mapped_once_and_the_store_does_not_grow():
    root, member = pair(SPEC)
    buffer, copy = shared_buffer(NUM_BYTES, "cpu"), torch.zeros(NUM_BYTES, dtype=torch.uint8)
    store, sizes = root._transport._store, []
    for round_number in range(6):
        filled(round_number, buffer)
        for flat in (buffer, buffer[: NUM_BYTES // 2], filled(round_number)[: NUM_BYTES // 2]):
            in_threads(
                lambda flat=flat: root.broadcast([flat], 20.0),
                lambda flat=flat: member.broadcast([copy[: flat.numel()]], 20.0),
            )
            assert torch.equal(copy[: flat.numel()], flat)
        sizes.append(store.num_keys())
    assert len(set(sizes)) == 1
    assert len(member._transport._opened) == 2, "the shared buffer, and the channel's own for the rest"
    maps = Path("/proc/self/maps").read_text().count("memfd:asyncrl")
    root.close()
    member.close()
    assert Path("/proc/self/maps").read_text().count("memfd:asyncrl") < maps


def test_bytes_of_any_dtype_and_shape_arrive():
    root, member = pair(SPEC)
    sent = torch.randn(3, 50, dtype=torch.float64)
    for flat, copy in ((sent, torch.zeros_like(sent)), (sent.bfloat16(), torch.zeros(150, dtype=torch.bfloat16))):
        in_threads(lambda flat=flat: root.broadcast([flat], 20.0), lambda copy=copy: member.broadcast([copy], 20.0))
        assert torch.equal(copy.view(-1), flat.view(-1))
    root.close()
    member.close()


def test_members_that_expect_other_sizes_fail_at_once_on_both_sides():
    root, member = pair(SPEC)
    errors, started = [], time.monotonic()

    def failing(channel, num_bytes):
        with pytest.raises(ChannelError) as failure:
            channel.broadcast([torch.zeros(num_bytes, dtype=torch.uint8)], 30.0)
        errors.append(str(failure.value))

    in_threads(lambda: failing(root, 100), lambda: failing(member, 90))
    assert time.monotonic() - started < LATE_S
    assert all("rank 0 sends 100 bytes, 90 are expected" in error for error in errors)
    for channel in (root, member):
        with pytest.raises(ChannelError, match="dead"):
            channel.broadcast([torch.zeros(100, dtype=torch.uint8)], 1.0)
        channel.close()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("machine", "only learner and generators of one machine share memory"),
        ("pid_namespace", "PID namespaces"),
        ("user", "run them as one"),
        ("device", "put both on one GPU"),
    ],
)
def test_members_that_cannot_share_memory_are_told_why_at_once_on_both_sides(key, words):
    numbers = itertools.count()

    class Elsewhere(IpcTransport):
        def _place(self):
            return dataclasses.replace(super()._place(), **{key: next(numbers)})

        def _put(self, name, record):
            super()._put(name, dataclasses.replace(record, pid=NO_PID) if name == "learner" else record)

    root = WeightChannel.host(SPEC, transports={"ipc": Elsewhere})
    member = WeightChannel(root.spec.for_rank(1), transports={"ipc": Elsewhere})
    started = time.monotonic()

    def failing(channel):
        with pytest.raises(ChannelError, match=f"forming weight channel 'ipc/1' as rank . of 2 .*{words}"):
            channel.join()

    in_threads(lambda: failing(root), lambda: failing(member))
    assert time.monotonic() - started < LATE_S
    root.close()
    member.close()


def test_who_is_missing_is_named():
    root = WeightChannel.host(dataclasses.replace(SPEC, world_size=3))
    member = WeightChannel(root.spec.for_rank(1))

    def failing(channel, missing):
        with pytest.raises(ChannelError, match=f"{missing} did not come in time"):
            channel.join(2.0)

    in_threads(lambda: failing(root, "member/2/0 of rank 2"), lambda: failing(member, "formed/0 of rank 0"))
    root.close()
    member.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_ends_a_wait_on_either_side(rank):
    both = pair(SPEC)
    threading.Timer(0.2, both[rank].abort).start()
    started = time.monotonic()
    with pytest.raises(ChannelError, match="aborted"):
        both[rank].broadcast([torch.zeros(10, dtype=torch.uint8)], 30.0)
    assert time.monotonic() - started < 0.2 + LATE_S
    for channel in both:
        channel.close()


def test_an_answer_of_the_store_that_comes_after_the_deadline_is_not_acted_on():
    """The learner stood still, and has long reused its buffer when the abandoned thread goes on."""
    root, member = pair(SPEC)
    answers, threads, real = threading.Event(), [], member._transport._store

    class LateStore:
        check, set = real.check, real.set

        def get(self, key):
            threads.append(threading.current_thread())
            answers.wait()
            return real.get(key)

    member._transport._store = LateStore()
    sent, flat = filled(1), torch.zeros(NUM_BYTES, dtype=torch.uint8)
    sender = threading.Thread(target=lambda: pytest.raises(ChannelError, root.broadcast, [sent], 20.0), daemon=True)
    sender.start()
    started = time.monotonic()
    with pytest.raises(ChannelError, match="waiting for ready/0 of rank 0; the call was abandoned"):
        member.broadcast([flat], 0.5)
    assert time.monotonic() - started < 0.5 + LATE_S
    answers.set()
    threads[0].join(10.0)
    assert not threads[0].is_alive() and not flat.any()
    root.abort()
    sender.join(10.0)
    for channel in (root, member):
        channel.close()


def test_a_process_that_ended_before_the_channel_was_formed_is_found_out():
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ChannelError, match=f"process {process.pid} ended while the channel was formed"):
        _Process(process.pid)
    assert not _Process(os.getpid()).ended
