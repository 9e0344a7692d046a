"""The worker's receiver over channels that come and go: what it holds is the base of deltas until a stage fails."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.base_weights import BaseWeights
from asyncrl.weights.bytes.delta import encode_delta
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.receiver import WeightReceiver
from tests.waits import wait_until

TIMEOUT_S = 20.0


class Bench:
    """A receiver, and the learner's end of its channel."""

    def __init__(self):
        device = torch.device("cpu")
        self.receiver = WeightReceiver(device, BaseWeights("/nowhere", device), lambda manifest, tensors: None)
        self.weight = torch.nn.Parameter(torch.randn(5000).bfloat16())
        self.buffer = SnapshotBuffer([("weight", self.weight)], 4096)
        self.buffer.snapshot()
        self.base = None
        self.channel, self.epochs = None, 0

    def join(self):
        self.close()
        self.epochs += 1
        self.channel = WeightChannel.host(ChannelSpec("127.0.0.1", 0, f"epoch/{self.epochs}", 0, 2, "gloo", TIMEOUT_S))
        self.receiver.begin_join(self.channel.spec.for_rank(1))
        self.channel.join()
        assert self.wait().error == ""

    def step(self):
        self.base = self.buffer.flat.clone()
        with torch.no_grad():
            self.weight.view(torch.int16)[::50] += 1
        self.buffer.snapshot()

    def stage(self, version, *, base=None, broadcast=True):
        """The job of staging the snapshot as `version`; whole, or as the delta to `base`."""
        manifest, parts = self.buffer.manifest(version), list(self.buffer.buckets())
        if base is not None:
            delta = encode_delta(self.buffer.layout, self.base, self.buffer.flat, base)
            manifest, parts = dataclasses.replace(manifest, delta=delta.info), [delta.payload]
        self.receiver.begin_stage(manifest, TIMEOUT_S)
        if broadcast:
            self.channel.broadcast(parts, TIMEOUT_S)
        return self.wait()

    def wait(self):
        wait_until(lambda: self.receiver.poll().state != "running", "the receiver", TIMEOUT_S)
        return self.receiver.poll()

    def assert_staged(self, job, version):
        assert (job.error, self.receiver.staged.version) == ("", version)
        (name, tensor), *_ = self.receiver.tensors()
        assert name == "weight" and torch.equal(tensor.view(torch.int16), self.weight.detach().view(torch.int16))

    def close(self):
        self.receiver.leave()
        if self.channel is not None:
            self.channel.close()


@pytest.fixture
def bench():
    bench = Bench()
    bench.join()
    yield bench
    bench.close()


def test_what_is_held_outlives_its_channel_but_cannot_be_swapped_in(bench):
    bench.assert_staged(bench.stage(0), 0)
    bench.join()
    assert bench.receiver.staged is None
    bench.step()
    bench.assert_staged(bench.stage(1, base=0), 1)


def test_a_job_tells_its_phase_and_how_many_bytes_have_come(bench):
    job, total_bytes = bench.stage(0), bench.buffer.layout.total_bytes
    assert (job.phase, job.received_bytes, job.total_bytes) == ("stage", total_bytes, total_bytes)
    bench.step()
    delta = bench.stage(1, base=0)
    assert 0 < delta.received_bytes == delta.total_bytes < 1000
    manifest, first = bench.buffer.manifest(2), next(iter(bench.buffer.buckets()))
    bench.receiver.begin_stage(manifest, 0.5)
    bench.channel.broadcast([first], TIMEOUT_S)
    failed = bench.wait()
    assert failed.error and (failed.received_bytes, failed.total_bytes) == (first.nbytes, total_bytes)
    assert 0 < first.nbytes < total_bytes


def test_after_a_stage_that_failed_nothing_is_held(bench):
    bench.stage(0)
    bench.step()
    assert "staging holds version 0" in bench.stage(2, base=1, broadcast=False).error
    assert bench.receiver.staged is None
    assert "staging holds nothing" in bench.stage(2, base=0, broadcast=False).error
    bench.assert_staged(bench.stage(2), 2)


def test_a_stage_tells_what_its_parts_took(bench):
    job = bench.stage(0)
    assert set(job.timings_ms) == {"receive_ms", "verify_ms", "prepare_ms"}
    assert 0 < sum(job.timings_ms.values()) <= job.elapsed_ms
    assert job.to_dict()["timings_ms"] == job.timings_ms
    bench.step()
    assert set(bench.stage(1, base=0).timings_ms) == {"receive_ms", "decode_ms", "verify_ms", "prepare_ms"}


def test_what_workers_took_is_that_of_the_slowest_part_by_part():
    from asyncrl.generator.engines.vllm.engine import _slowest_ms

    jobs = [
        {"elapsed_ms": 9.0, "timings_ms": {"receive_ms": 2.0, "verify_ms": 7.0}},
        {"elapsed_ms": 8.0, "timings_ms": {"receive_ms": 5.0, "verify_ms": 3.0}},
    ]
    assert _slowest_ms(jobs) == {"stage_ms": 9.0, "receive_ms": 5.0, "verify_ms": 7.0}
