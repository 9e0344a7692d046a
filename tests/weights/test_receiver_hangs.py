"""A worker's receiver in channels that hang: it ends in time, and goes on with the next as if nothing had been."""

from __future__ import annotations

import contextlib
import functools
import threading
import time

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.base_weights import BaseWeights
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import SLACK_S
from asyncrl.weights.receiver import WeightReceiver
from tests.waits import LATE_S, wait_until
from tests.weights.channels.hanging_transport import hanging

TIMEOUT_S = 2.0
LIMIT_S = TIMEOUT_S + SLACK_S + LATE_S


class Bench:
    """A receiver, and the learner's ends of its channels."""

    def __init__(self, hangs):
        self.options, device = hangs.options, torch.device("cpu")
        self.receiver = WeightReceiver(
            device,
            BaseWeights("/nowhere", device),
            lambda manifest, tensors: None,
            open_channel=functools.partial(WeightChannel, **self.options),
        )
        self.weight = torch.nn.Parameter(torch.zeros(5000))
        self.buffer = SnapshotBuffer([("weight", self.weight)], 4096)
        self.version = 0

    def join(self):
        """Both sides try; the receiver's job and how long it took to end."""
        self.version += 1
        spec = ChannelSpec("127.0.0.1", 0, f"hang/{self.version}", 0, 2, "hanging", TIMEOUT_S)
        self.channel, started = WeightChannel.host(spec, **self.options), time.monotonic()
        root = threading.Thread(target=quietly, args=(self.channel.join,), daemon=True)
        root.start()
        self.receiver.begin_join(self.channel.spec.for_rank(1))
        assert time.monotonic() - started < 0.9 * TIMEOUT_S, "the engine waits for this call"
        job = self.wait()
        root.join()
        return job, time.monotonic() - started

    def stage(self):
        with torch.no_grad():
            self.weight.fill_(float(self.version))
        self.buffer.snapshot()
        started = time.monotonic()
        self.receiver.begin_stage(self.buffer.manifest(self.version), TIMEOUT_S)
        sender = threading.Thread(target=quietly, args=(self._send,), daemon=True)
        sender.start()
        job = self.wait()
        sender.join()
        return job, time.monotonic() - started

    def _send(self):
        self.channel.broadcast(list(self.buffer.buckets()), TIMEOUT_S)

    def wait(self):
        wait_until(lambda: self.receiver.poll().state != "running", "the receiver")
        return self.receiver.poll()

    def leave(self):
        started = time.monotonic()
        self.receiver.leave()
        assert time.monotonic() - started < 0.9 * TIMEOUT_S, "the engine waits for this call"
        quietly(self.channel.close)

    def assert_the_next_sync_works(self):
        assert self.join()[0].error == ""
        assert self.stage()[0].error == ""
        self.assert_staged()

    def assert_staged(self):
        assert self.receiver.staged.version == self.version
        (name, tensor), *_ = self.receiver.tensors()
        assert name == "weight" and (tensor == float(self.version)).all()


def quietly(call):
    with contextlib.suppress(ChannelError):  # the test looks at the receiver
        call()


@pytest.fixture
def hangs():
    with hanging() as hangs:
        yield hangs


@pytest.fixture
def bench(hangs):
    bench = Bench(hangs)
    yield bench
    bench.leave()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_form_that_hangs_costs_one_deadline_and_the_next_channel_works(bench, hangs, rank):
    hangs.places = {("form", rank)}
    job, elapsed_s = bench.join()
    assert "forming weight channel 'hang/1' as rank 1" in job.error and elapsed_s < LIMIT_S
    hangs.places = set()
    bench.leave()
    bench.assert_the_next_sync_works()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broadcast_that_hangs_costs_one_deadline_and_what_is_abandoned_spoils_nothing(bench, hangs, rank):
    bench.assert_the_next_sync_works()
    bench.leave()
    assert bench.join()[0].error == ""
    hangs.places = {("broadcast", rank)}
    job, elapsed_s = bench.stage()
    assert "broadcast of 20032 bytes in weight channel 'hang/2'" in job.error and elapsed_s < LIMIT_S
    assert bench.receiver.staged is None
    hangs.places = set()
    bench.leave()
    bench.assert_the_next_sync_works()
    hangs.release()  # an abandoned receiver now writes garbage to the buffer it was given
    bench.assert_staged()


@pytest.mark.parametrize("method", ["abort", "close"])
def test_an_end_that_hangs_holds_up_neither_the_engine_nor_the_next_channel(bench, hangs, method):
    bench.assert_the_next_sync_works()
    hangs.places = {(method, 1)}
    bench.leave()
    bench.assert_the_next_sync_works()
    hangs.release()
    bench.assert_staged()
