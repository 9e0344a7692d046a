"""Manifests on the wire; channels of real processes that die and hang."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import msgpack
import psutil
import pytest
import torch

from asyncrl.errors import BindError, ChannelError, ProtocolError
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import ChannelSpec, WeightLayout, WeightManifest
from asyncrl.weights.bytes.layout import plan_buckets
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import WeightStore
from tests.waits import LATE_S
from tests.warm_processes import WarmProcess
from tests.weights.bytes.test_snapshot import tied_parameters
from tests.weights.channels.members import in_threads, pair

SPEC = ChannelSpec("127.0.0.1", 0, "epoch/1", 0, 2, "gloo", 10.0)


# -- layout and manifest -----------------------------------------------------------------------------------


def test_manifest_survives_the_wire():
    manifest = SnapshotBuffer(tied_parameters(), 128).manifest(7)
    assert from_plain(WeightManifest, msgpack.unpackb(msgpack.packb(to_plain(manifest)))) == manifest


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("digests"),
        lambda d: d["digests"].pop(),
        lambda d: d["layout"].update(total_bytes=64),
        lambda d: d["layout"]["tensors"][0].__setitem__(1, "float31"),
        lambda d: d["layout"]["tensors"][0].__setitem__(2, [1 << 40]),
        lambda d: d["layout"]["tensors"][0].__setitem__(2, [-1, -1]),
        lambda d: d["layout"]["tensors"][0].__setitem__(3, -64),
        lambda d: d["layout"]["buckets"].pop(0),
        lambda d: d["layout"]["buckets"].append([0, 64]),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(damage):
    data = msgpack.unpackb(msgpack.packb(to_plain(SnapshotBuffer(tied_parameters(), 128).manifest(1))))
    damage(data)
    with pytest.raises(ProtocolError):
        from_plain(WeightManifest, data)


def test_layout_survives_a_dict():
    layout = plan_buckets(tied_parameters(), 128)
    assert from_plain(WeightLayout, to_plain(layout)) == layout


# -- channels ------------------------------------------------------------------------------------------------


def test_a_spec_survives_the_wire_and_nonsense_is_refused():
    assert from_plain(ChannelSpec, msgpack.unpackb(msgpack.packb(to_plain(SPEC)))) == SPEC
    for change in ({"rank": 2}, {"rank": -1}, {"timeout_s": 0.0}, {"timeout_s": None}):
        with pytest.raises(ProtocolError):
            from_plain(ChannelSpec, to_plain(SPEC) | change)


def test_the_store_listens_on_the_given_address_only():
    channel = WeightChannel.host(SPEC)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.laddr.port == channel.store_port]
    assert [c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
    channel.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", channel.store_port), timeout=1.0)


def test_a_port_in_use_is_the_users_to_change():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BindError, match="free port"):
        WeightChannel.host(dataclasses.replace(SPEC, store_port=taken.getsockname()[1]))


def test_a_store_that_cannot_listen_or_does_not_start_leaves_no_socket_behind(monkeypatch):
    def failing(**options):
        os.close(options["master_listen_fd"])  # as torch's server does when it is taken down
        raise RuntimeError("no room for the server\nException raised from C++")

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        before, gc_was_on = descriptors(), gc.isenabled()
        gc.disable()  # it would close what was forgotten
        try:
            errors = []
            for _ in range(3):
                with pytest.raises(BindError, match="free port") as error:
                    WeightStore("127.0.0.1", taken.getsockname()[1])
                errors.append(error)  # with the frames, and what they hold
            monkeypatch.setattr("asyncrl.weights.channels.rendezvous.TCPStore", failing)
            with pytest.raises(BindError, match=r"does not start on 127\.0\.0\.1:\d+: no room for the server$"):
                WeightStore("127.0.0.1")
            assert descriptors() == before
        finally:
            if gc_was_on:
                gc.enable()


def test_an_error_of_our_own_in_the_middle_of_a_broadcast_leaves_a_dead_channel():
    root, member = pair(SPEC)
    sent, taken = torch.zeros(3, 10), torch.zeros(3, 10)

    def broken(num_bytes):
        raise ZeroDivisionError("a bug")

    def send():
        with pytest.raises(ZeroDivisionError):
            root.broadcast(list(sent), 10.0, broken)

    in_threads(send, lambda: member.broadcast([taken[0]], 10.0))
    with pytest.raises(ChannelError, match=r"the channel is dead \(a bug\)"):
        root.broadcast([sent[0]], 10.0)
    for channel in (member, root):  # the root still has two parts under way
        channel.close()


def test_members_in_threads_receive_what_was_sent_and_channels_can_follow_each_other():
    for epoch in range(3):
        root = WeightChannel.host(dataclasses.replace(SPEC, prefix=f"epoch/{epoch}", world_size=3))
        members = [WeightChannel(root.spec.for_rank(rank)) for rank in (1, 2)]
        sent = torch.randint(0, 256, (5, 1000), dtype=torch.uint8)
        received = torch.zeros(2, 5, 1000, dtype=torch.uint8)

        def take(member, rows):
            member.join()
            for row in rows:
                member.broadcast([row], 10.0)

        threads = [threading.Thread(target=take, args=pair) for pair in zip(members, received, strict=True)]
        for thread in threads:
            thread.start()
        root.join()
        root.join()  # joined already: nothing to do
        sockets = psutil.Process().net_connections("tcp")
        assert {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        for row in sent:
            root.broadcast([row], 10.0)
        for thread in threads:
            thread.join(10.0)
        assert (received == sent).all()
        for member in [root, *members]:
            member.close()
            member.close()
            with pytest.raises(ChannelError, match="dead"):
                member.broadcast([sent[0]], 1.0)


def test_a_channel_that_nobody_joins_fails_at_its_deadline():
    channel = WeightChannel.host(SPEC)
    started = time.monotonic()
    with pytest.raises(ChannelError, match="forming weight channel 'epoch/1' as rank 0 of 2"):
        channel.join(1.0)
    assert 0.9 < time.monotonic() - started < 1.0 + LATE_S
    with pytest.raises(ChannelError, match="dead"):
        channel.join(1.0)
    channel.close()


def test_abort_from_another_thread_ends_a_wait():
    channel = WeightChannel.host(SPEC)
    threading.Timer(0.3, channel.abort).start()
    started = time.monotonic()
    with pytest.raises(ChannelError, match="aborted"):
        channel.join(30.0)
    assert time.monotonic() - started < 0.3 + LATE_S
    channel.close()


def test_a_backend_that_does_not_exist_is_refused_at_once():
    with pytest.raises(ChannelError, match=r"'mpi' is none of \['gloo', 'ipc', 'nccl'\]"):
        WeightChannel(dataclasses.replace(SPEC, backend="mpi"))


def test_nccl_without_a_gpu_is_refused_at_once():
    with pytest.raises(ChannelError, match="needs a cuda device"):
        WeightChannel(dataclasses.replace(SPEC, backend="nccl"))


MEMBER = """
import json, os, signal, sys, time, torch
from asyncrl.errors import ChannelError
from asyncrl.link.field_checks import from_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
spec, timeout_s = json.loads(sys.argv[1]), float(sys.argv[2])
faults = json.loads(sys.argv[3])
channel = WeightChannel(from_plain(ChannelSpec, spec))
channel.join()
flat = torch.zeros(1 << 20, dtype=torch.uint8)
for bucket in range(1000):
    if str(bucket) in faults:
        os.kill(os.getpid(), getattr(signal, faults[str(bucket)]))
    started = time.monotonic()
    try:
        channel.broadcast([flat], timeout_s)
    except ChannelError as error:
        print(json.dumps({"bucket": bucket, "elapsed_s": time.monotonic() - started}), flush=True)
        break
"""


@pytest.mark.parametrize(("fault", "timeout_s", "limit_s"), [("SIGKILL", 30.0, LATE_S), ("SIGSTOP", 2.0, 2.0 + LATE_S)])
def test_a_member_that_dies_or_hangs_ends_the_broadcast_for_all_in_time(fault, timeout_s, limit_s):
    """A death is seen; for one that hangs the others wait until their deadline."""
    root = WeightChannel.host(dataclasses.replace(SPEC, world_size=3, timeout_s=30.0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(rank, faults):
        spec = json.dumps(to_plain(root.spec.for_rank(rank)))
        command = [sys.executable, "-c", MEMBER, spec, str(timeout_s), json.dumps(faults)]
        return WarmProcess(command, stdout=subprocess.PIPE, env=environment)

    healthy, faulty = start(1, {}), start(2, {"3": fault})
    try:
        root.join()
        flat = torch.ones(1 << 20, dtype=torch.uint8)
        started = time.monotonic()

        def broadcast_until_it_fails() -> None:
            nonlocal started
            for _ in range(100):
                started = time.monotonic()
                root.broadcast([flat], timeout_s)

        with pytest.raises(ChannelError):
            broadcast_until_it_fails()
        assert time.monotonic() - started < limit_s
        root.close()
        report = json.loads(healthy.stdout.readline())
        assert report["elapsed_s"] < limit_s
    finally:
        for process in (healthy, faulty):
            process.send_signal(signal.SIGKILL)
            process.wait()
