"""Layout and digests against slow references; groups of real processes that die and hang."""

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
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import BindError, ChannelError, ProtocolError, ShapeError
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import ChannelSpec, WeightLayout, WeightManifest
from asyncrl.weights.bytes.layout import new_buffer, tensor_views
from asyncrl.weights.channels.channel import SnapshotBuffer, WeightChannel, WeightStore, digest, plan_buckets
from tests.weights.channels.members import in_threads, pair

SPEC = ChannelSpec("127.0.0.1", 0, "epoch/1", 0, 2, "gloo", 10.0)


def slow_digest(data: bytes) -> int:
    """The documented formula with Python's own integers."""
    total = len(data)
    for index in range(0, len(data), 8):
        word = int.from_bytes(data[index : index + 8].ljust(8, b"\0"), "little", signed=True)
        total += (word ^ (word >> 32)) * (2 * (index // 8) + 1) * 0x9E3779B97F4A7C15
    return int.from_bytes((total % 2**64).to_bytes(8, "little"), "little", signed=True)


def flat_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


# -- digest ------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_digest_is_the_documented_sum(data):
    assert digest(flat_bytes(data)) == slow_digest(data)


def test_digest_over_many_chunks_is_the_documented_sum():
    data = torch.randint(0, 256, (3 * 8 * (1 << 15) + 13,), dtype=torch.uint8)
    assert digest(data) == slow_digest(bytes(data.tolist()))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_bit_changes_the_digest(data, draw):
    position = draw.draw(st.integers(0, len(data) * 8 - 1))
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    assert digest(flat_bytes(bytes(changed))) != digest(flat_bytes(data))


@settings(max_examples=50)
@given(st.integers(0, 8191), st.integers(0, 8191))
def test_swapping_two_unequal_weights_changes_the_digest(left, right):
    # Ones among zeros differ in high bits only, the hard case for a sum of products.
    weights = torch.zeros(8192)
    weights[::3] = 1.0
    before = digest(weights)
    values = weights[left].item(), weights[right].item()
    weights[right], weights[left] = values
    assert (digest(weights) == before) == (values[0] == values[1])


def test_length_is_part_of_the_digest():
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(128, dtype=torch.uint8))


# -- layout and snapshot -----------------------------------------------------------------------------------


def tied_parameters():
    shared = torch.nn.Parameter(torch.randn(10, 7))
    return [
        ("embed.weight", shared),
        ("norm.weight", torch.nn.Parameter(torch.randn(7))),
        ("mlp.weight", torch.nn.Parameter(torch.randn(7, 33))),
        ("lm_head.weight", shared),
    ]


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [64, 200, 1 << 20])
def test_a_snapshot_comes_out_of_its_buffer_under_every_name(bucket_bytes, wire_dtype):
    named = tied_parameters()
    buffer = SnapshotBuffer(named, bucket_bytes, wire_dtype)
    buffer.snapshot()
    received = torch.cat(list(buffer.buckets()))  # what a receiver ends up with
    assert all(bucket.numel() <= bucket_bytes for bucket in buffer.buckets())
    views = dict(tensor_views(buffer.layout, received))
    assert list(views) == [name for name, _ in named]
    for name, parameter in named:
        expected = parameter.detach().to(wire_dtype or parameter.dtype)
        torch.testing.assert_close(views[name], expected, atol=0, rtol=0)
    offsets = {entry.name: entry.offset for entry in buffer.layout.tensors}
    assert offsets["embed.weight"] == offsets["lm_head.weight"], "a tied parameter travels once"


def test_a_snapshot_does_not_follow_the_parameters():
    named = tied_parameters()
    buffer = SnapshotBuffer(named, 128)
    buffer.snapshot()
    manifest = buffer.manifest(3)
    with torch.no_grad():
        named[2][1].add_(1.0)
    assert buffer.manifest(3) == manifest
    buffer.snapshot()
    assert buffer.manifest(3).digests != manifest.digests


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


def test_a_snapshot_of_other_tensors_is_refused():
    from asyncrl.weights.channels.channel import snapshot

    named = tied_parameters()
    layout = plan_buckets(named, 128)
    with pytest.raises(ShapeError):
        snapshot(named[::-1], layout, new_buffer(layout))
    with pytest.raises(ShapeError):
        snapshot(named[:2], layout, new_buffer(layout))
    other = [(name, torch.zeros(2, 2)) for name, _ in named]
    with pytest.raises(ShapeError):
        snapshot(other, layout, new_buffer(layout))
    with pytest.raises(ShapeError):
        snapshot(named, layout, torch.zeros(64, dtype=torch.uint8))


def test_layout_survives_a_dict():
    layout = plan_buckets(tied_parameters(), 128)
    assert from_plain(WeightLayout, to_plain(layout)) == layout


# -- groups ------------------------------------------------------------------------------------------------


def test_a_spec_survives_the_wire_and_nonsense_is_refused():
    assert from_plain(ChannelSpec, msgpack.unpackb(msgpack.packb(to_plain(SPEC)))) == SPEC
    for change in ({"rank": 2}, {"rank": -1}, {"timeout_s": 0.0}, {"timeout_s": None}):
        with pytest.raises(ProtocolError):
            from_plain(ChannelSpec, to_plain(SPEC) | change)


def test_the_store_listens_on_the_given_address_only():
    group = WeightChannel.host(SPEC)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.laddr.port == group.store_port]
    assert [c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN] == ["127.0.0.1"]
    group.close()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", group.store_port), timeout=1.0):
        pass


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
            monkeypatch.setattr(dist, "TCPStore", failing)
            with pytest.raises(BindError, match=r"does not start on 127\.0\.0\.1:\d+: no room for the server$"):
                WeightStore("127.0.0.1")
            assert descriptors() == before
        finally:
            if gc_was_on:
                gc.enable()


def test_an_error_of_our_own_in_the_middle_of_a_broadcast_leaves_a_dead_group():
    root, member = pair(SPEC, WeightChannel)
    sent, taken = torch.zeros(3, 10), torch.zeros(3, 10)

    def broken(num_bytes):
        raise ZeroDivisionError("a bug")

    def send():
        with pytest.raises(ZeroDivisionError):
            root.broadcast(list(sent), 10.0, broken)

    in_threads(send, lambda: member.broadcast([taken[0]], 10.0))
    with pytest.raises(ChannelError, match=r"the group is dead \(a bug\)"):
        root.broadcast([sent[0]], 10.0)
    for group in (member, root):  # the root still has two parts under way
        group.close()


def test_members_in_threads_receive_what_was_sent_and_groups_can_follow_each_other():
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


def test_a_group_that_nobody_joins_fails_at_its_deadline():
    group = WeightChannel.host(SPEC)
    started = time.monotonic()
    with pytest.raises(ChannelError, match="forming weight channel 'epoch/1' as rank 0 of 2"):
        group.join(1.0)
    assert 0.9 < time.monotonic() - started < 3.0
    with pytest.raises(ChannelError, match="dead"):
        group.join(1.0)
    group.close()


def test_abort_from_another_thread_ends_a_wait():
    group = WeightChannel.host(SPEC)
    threading.Timer(0.3, group.abort).start()
    started = time.monotonic()
    with pytest.raises(ChannelError, match="aborted"):
        group.join(30.0)
    assert time.monotonic() - started < 2.0
    group.close()


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
group = WeightChannel(from_plain(ChannelSpec, spec))
group.join()
flat = torch.zeros(1 << 20, dtype=torch.uint8)
for bucket in range(1000):
    if str(bucket) in faults:
        os.kill(os.getpid(), getattr(signal, faults[str(bucket)]))
    started = time.monotonic()
    try:
        group.broadcast([flat], timeout_s)
    except ChannelError as error:
        print(json.dumps({"bucket": bucket, "elapsed_s": time.monotonic() - started}), flush=True)
        break
"""


@pytest.mark.parametrize(("fault", "limit_s"), [("SIGKILL", 1.0), ("SIGSTOP", 4.0)])
def test_a_member_that_dies_or_hangs_ends_the_broadcast_for_all_in_time(fault, limit_s):
    timeout_s = 2.0
    root = WeightChannel.host(dataclasses.replace(SPEC, world_size=3, timeout_s=30.0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(rank, faults):
        spec = json.dumps(to_plain(root.spec.for_rank(rank)))
        command = [sys.executable, "-c", MEMBER, spec, str(timeout_s), json.dumps(faults)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    healthy, faulty = start(1, {}), start(2, {"3": fault})
    try:
        root.join()
        flat = torch.ones(1 << 20, dtype=torch.uint8)
        with pytest.raises(ChannelError):
            for _ in range(100):
                started = time.monotonic()
                root.broadcast([flat], timeout_s)
        assert time.monotonic() - started < limit_s
        root.close()
        report = json.loads(healthy.stdout.readline())
        assert report["elapsed_s"] < limit_s
    finally:
        for process in (healthy, faulty):
            process.send_signal(signal.SIGKILL)
            process.wait()
