"""Versions into a worker's staging buffer over real channels, in a process of its own: whole, as deltas, damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from asyncrl.link.field_checks import to_plain
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.bytes.delta import encode_delta
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from tests.warm_processes import WarmProcess

TIMEOUT_S = 20.0

WORKER = """
import json, sys, torch
from asyncrl.errors import AsyncRLError
from asyncrl.weights.staging import receive
from asyncrl.link.field_checks import from_plain
from asyncrl.link.weight_records import ChannelSpec, WeightManifest
from asyncrl.weights.channels.channel import WeightChannel
channel, held = WeightChannel(from_plain(ChannelSpec, json.loads(sys.argv[1]))), None
channel.join()
print("joined", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["fault"] == "forget":
        held = None
    if order["fault"] == "flip":
        held.buffer[3] ^= 16
    digests, error, before = [], "", held
    kept = None if held is None else held.buffer.clone()
    try:
        held = receive(channel, from_plain(WeightManifest, order["manifest"]), held, torch.device("cpu"), 20.0, digests)
    except AsyncRLError as failure:
        error = str(failure)
    answer = {"digests": digests, "error": error, "version": None if held is None else held.version}
    answer["timed"] = [] if held is None else sorted(name for name, ms in held.timings_ms.items() if ms > 0)
    answer["untouched"] = kept is not None and torch.equal(kept, before.buffer)
    answer["reused"] = before is not None and held is not None and before.buffer is held.buffer
    print(json.dumps(answer), flush=True)
"""


class Bench:
    """A learner's buffer and a worker process that stages what it is sent."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(0)
        self.named = [
            ("embed", torch.nn.Parameter(torch.randn(300, 40, generator=generator).to(dtype))),
            ("norm", torch.nn.Parameter(torch.ones(33, dtype=dtype))),
        ]
        self.buffer = SnapshotBuffer(self.named, 1024)
        self.base = None
        spec = ChannelSpec("127.0.0.1", 0, "epoch/1", 0, 2, "gloo", TIMEOUT_S)
        self.channel = WeightChannel.host(spec)
        command = [sys.executable, "-c", WORKER, json.dumps(to_plain(self.channel.spec.for_rank(1)))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.worker = WarmProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.channel.join()
        assert self.worker.stdout.readline() == "joined\n"

    def close(self):
        self.worker.kill()
        self.worker.wait()
        self.worker.stdin.close()
        self.worker.stdout.close()
        self.channel.close()

    def step(self):
        """Moves one weight in ten by one unit in the last place; the version before becomes the base."""
        self.base = self.buffer.flat.clone()
        with torch.no_grad():
            words = self.named[0][1].view(torch.int16 if self.named[0][1].dtype == torch.bfloat16 else torch.int32)
            words.view(-1)[::10] += 1
        self.buffer.snapshot()

    def send(self, version, *, base=None, fault="", damage=None, part=-1, broadcast=True):
        """Stages the snapshot as `version`; whole, or as the delta to `base`. Returns (manifest, answer)."""
        manifest, parts = self.buffer.manifest(version), list(self.buffer.buckets())
        if base is not None:
            delta = encode_delta(self.buffer.layout, self.base, self.buffer.flat, base)
            assert delta.info.num_bytes < 0.2 * self.buffer.layout.total_bytes
            manifest = dataclasses.replace(manifest, delta=delta.info)
            parts = list(delta.payload.split(self.buffer.layout.bucket_bytes))
            assert len(parts) > 1
        if damage is not None:
            parts[part] = parts[part].clone()
            parts[part][damage] ^= 1
        print(json.dumps({"manifest": to_plain(manifest), "fault": fault}), file=self.worker.stdin, flush=True)
        if broadcast:
            self.channel.broadcast(parts, TIMEOUT_S)
        return manifest, json.loads(self.worker.stdout.readline())


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def bench(request):
    bench = Bench(request.param)
    yield bench
    bench.close()


def assert_staged(outcome):
    manifest, answer = outcome
    assert (answer["error"], answer["version"]) == ("", manifest.version)
    assert answer["digests"] == list(manifest.digests)
    return answer


def test_a_chain_of_deltas_stages_every_version_in_one_buffer(bench):
    bench.step()
    assert_staged(bench.send(0))
    for version in range(1, 5):
        bench.step()
        assert assert_staged(bench.send(version, base=version - 1))["reused"]
    bench.step()
    assert assert_staged(bench.send(9))["reused"], "a whole version goes into the same buffer"


def test_a_damaged_delta_is_refused_before_it_changes_the_base_and_the_whole_version_follows(bench):
    bench.step()
    assert_staged(bench.send(0))
    bench.step()
    _, answer = bench.send(1, base=0, damage=1)
    assert "damaged on the way" in answer["error"]
    assert answer["untouched"] and answer["digests"] == []
    assert_staged(bench.send(1))


def test_a_base_that_changed_in_memory_is_found_by_the_digests_of_the_result(bench):
    bench.step()
    assert_staged(bench.send(0))
    bench.step()
    manifest, answer = bench.send(1, base=0, fault="flip")
    assert "version 0, to which a delta was applied, had changed" in answer["error"]
    assert answer["digests"] == [answer["digests"][0]] and answer["digests"][0] != manifest.digests[0]
    assert_staged(bench.send(1))


@pytest.mark.parametrize("fault", ["forget", "another version"])
def test_a_delta_to_a_version_that_is_not_held_is_refused_before_it_is_received(bench, fault):
    bench.step()
    assert_staged(bench.send(0))
    bench.step()
    _, answer = bench.send(2, base=1 if fault == "another version" else 0, fault=fault, broadcast=False)
    holds = "nothing" if fault == "forget" else "version 0"
    assert f"staging holds {holds}; it must be sent whole" in answer["error"]
    assert_staged(bench.send(2))


def test_a_damaged_bucket_of_a_whole_version_is_named(bench):
    bench.step()
    manifest, answer = bench.send(0, damage=5)
    last = len(manifest.digests) - 1
    assert f"bucket {last} of version 0" in answer["error"] and "damaged on the way" in answer["error"]
    assert len(answer["digests"]) == last + 1


def test_damage_in_the_first_bucket_keeps_nobody_waiting_and_the_channel_stays_of_use(bench):
    bench.step()
    manifest, answer = bench.send(0, damage=5, part=0)
    assert len(manifest.digests) > 1 and "bucket 0 of version 0" in answer["error"]
    assert_staged(bench.send(0))


def test_what_staging_took_is_told_by_its_parts(bench):
    bench.step()
    assert assert_staged(bench.send(0))["timed"] == ["receive_ms", "verify_ms"]
    bench.step()
    assert assert_staged(bench.send(1, base=0))["timed"] == ["decode_ms", "receive_ms", "verify_ms"]
