"""The worker's receiver over groups that come and go: what it holds is the base of deltas until a stage fails."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from asyncrl.generator.base_weights import BaseWeights
from asyncrl.transport.weight_delta import encode_delta
from asyncrl.transport.weight_group import SnapshotBuffer, WeightGroup, WeightGroupSpec

TIMEOUT_S = 20.0


class Bench:
    """A receiver, and the learner's end of its group."""

    def __init__(self):
        from asyncrl.generator.weights import WeightReceiver  # brings vLLM

        device = torch.device("cpu")
        self.receiver = WeightReceiver(device, BaseWeights("/nowhere", device), lambda manifest, tensors: None)
        self.weight = torch.nn.Parameter(torch.randn(5000).bfloat16())
        self.buffer = SnapshotBuffer([("weight", self.weight)], 4096)
        self.buffer.snapshot()
        self.base = None
        self.group, self.epochs = None, 0

    def join(self):
        self.close()
        self.epochs += 1
        self.group = WeightGroup.host(WeightGroupSpec("127.0.0.1", 0, f"epoch/{self.epochs}", 0, 2, "gloo", TIMEOUT_S))
        self.receiver.begin_join(self.group.spec.for_rank(1))
        self.group.join()
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
        for part in parts if broadcast else ():
            self.group.broadcast(part, TIMEOUT_S)
        return self.wait()

    def wait(self):
        deadline = time.monotonic() + TIMEOUT_S
        while self.receiver.poll().state == "running":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return self.receiver.poll()

    def assert_staged(self, job, version):
        assert (job.error, self.receiver.staged.version) == ("", version)
        (name, tensor), *_ = self.receiver.tensors()
        assert name == "weight" and torch.equal(tensor.view(torch.int16), self.weight.detach().view(torch.int16))

    def close(self):
        self.receiver.leave()
        if self.group is not None:
            self.group.close()


@pytest.fixture
def bench():
    bench = Bench()
    bench.join()
    yield bench
    bench.close()


def test_what_is_held_outlives_its_group_but_cannot_be_swapped_in(bench):
    bench.assert_staged(bench.stage(0), 0)
    bench.join()
    assert bench.receiver.staged is None
    bench.step()
    bench.assert_staged(bench.stage(1, base=0), 1)


def test_after_a_stage_that_failed_nothing_is_held(bench):
    bench.stage(0)
    bench.step()
    assert "staging holds version 0" in bench.stage(2, base=1, broadcast=False).error
    assert bench.receiver.staged is None
    assert "staging holds nothing" in bench.stage(2, base=0, broadcast=False).error
    bench.assert_staged(bench.stage(2), 2)
