"""The worker's receiver over channels that come and go: what it holds is the base of deltas until a stage fails."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from asyncrl.link.weight_records import BitsInUse, ChannelSpec, Patch
from asyncrl.weights.base_weights import BaseWeights
from asyncrl.weights.bytes.boxes import Box
from asyncrl.weights.bytes.delta import encode_delta
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.receiver import WeightReceiver
from tests.model_folders import TENSORS, make_model_folder
from tests.waits import wait_until

TIMEOUT_S = 20.0


class Bench:
    """A receiver, and the learner's end of its channel."""

    def __init__(self, bucket_bytes=4096, **options):
        device = torch.device("cpu")
        self.receiver = WeightReceiver(
            device, BaseWeights("/nowhere", device), lambda manifest, tensors: None, **options
        )
        self.weight = torch.nn.Parameter(torch.randn(5000).bfloat16())
        self.buffer = SnapshotBuffer([("weight", self.weight)], bucket_bytes)
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

    def stage(self, version, *, base=None, broadcast=True, wrong=()):
        """The job of staging the snapshot as `version`, whole or as the delta to `base`; `wrong`: damaged buckets."""
        manifest, parts = self.buffer.manifest(version), list(self.buffer.buckets())
        for index in wrong:
            parts[index] = parts[index] ^ 1
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
    from asyncrl.generator.engines.vllm.jobs import slowest_ms

    jobs = [
        {"elapsed_ms": 9.0, "timings_ms": {"receive_ms": 2.0, "verify_ms": 7.0}},
        {"elapsed_ms": 8.0, "timings_ms": {"receive_ms": 5.0, "verify_ms": 3.0}},
    ]
    assert slowest_ms(jobs) == {"stage_ms": 9.0, "receive_ms": 5.0, "verify_ms": 7.0}


class Half:
    """A worker that needs the second half of the weight, as one of two tensor-parallel ones would."""

    def __init__(self):
        self.bench = None
        self.told = {"weight": Box((5000,), 0, 2500, 5000)}
        self.can_prepare = True

    def boxes(self):
        return self.told

    def live_are(self, version, named):
        ((name, slices),) = named
        return name == "weight" and torch.equal(slices, self.bench.weight.detach()[2500:])

    def prepare_slices(self, manifest, named):
        return dict(named) if self.can_prepare else None


@pytest.fixture
def half():
    """A bench whose receiver needs slices; a version has more buckets than there are slots for them."""
    slicing = Half()
    bench = Bench(bucket_bytes=1024, slicing=slicing, spare=torch.full((8000,), 255, dtype=torch.uint8))
    slicing.bench = bench
    assert len(list(bench.buffer.buckets())) == 10
    bench.join()
    yield bench, slicing
    bench.close()


def check(bench):
    bench.receiver.begin_check(lambda version, tensors: BitsInUse(version, len(list(tensors)), [], []))
    assert bench.wait().error == ""
    return bench.receiver.poll().in_use.differing


def assert_slices_are_staged(bench, job):
    assert (job.error, bench.receiver.holds_slices) == ("", True)
    ((_, slices),) = bench.receiver.tensors()
    assert torch.equal(slices, bench.weight.detach()[2500:]) and bench.receiver.staging_bytes == 5056
    assert torch.equal(bench.receiver.prepared["weight"], slices)


def test_after_a_whole_version_that_was_compared_slices_are_kept(half):
    bench, _ = half
    bench.assert_staged(bench.stage(0), 0)
    assert bench.receiver.staging_bytes == bench.buffer.layout.total_bytes
    assert check(bench) == []
    assert bench.receiver.staging_bytes == 0
    for version in (1, 2):
        bench.step()
        job = bench.stage(version)
        assert_slices_are_staged(bench, job)
        assert job.digests == list(bench.buffer.manifest(version).digests)
        assert set(job.timings_ms) == {"receive_ms", "verify_ms", "decode_ms", "prepare_ms"}
        assert check(bench) == []


def test_a_bit_of_staged_slices_that_changes_is_found(half):
    bench, _ = half
    bench.stage(0)
    check(bench)
    bench.step()
    bench.stage(1)
    bench.receiver._held.buffer[77] ^= 4
    assert check(bench) == ["staged slices of weight (changed since it was verified)"]


def test_a_damaged_bucket_is_named_when_all_have_come_and_the_channel_lives_on(half):
    bench, _ = half
    bench.stage(0)
    check(bench)
    bench.step()
    assert "bucket 4 of version 1: digest" in bench.stage(1, wrong=(4, 7)).error
    assert bench.receiver.staged is None and not bench.receiver.holds_slices
    assert_slices_are_staged(bench, bench.stage(2))


def test_no_slices_are_kept_that_are_not_what_is_in_use(half):
    bench, slicing = half
    slicing.told = {"weight": Box((5000,), 0, 2499, 4999)}
    for version in (0, 1):
        bench.assert_staged(bench.stage(version), version)
        assert check(bench) == []
        bench.step()


def test_slices_that_cannot_be_put_in_place_fail_once_and_then_all_comes(half):
    bench, slicing = half
    bench.stage(0)
    check(bench)
    slicing.can_prepare = False
    assert "staged in slices, which cannot be put in place" in bench.stage(1).error
    bench.assert_staged(bench.stage(2), 2)


def test_all_of_a_version_is_staged_where_it_is_asked_for_or_the_boxes_are_of_another_model(half):
    bench, slicing = half
    bench.stage(0)
    check(bench)
    bench.receiver.begin_stage(bench.buffer.manifest(1), TIMEOUT_S, whole=True)
    bench.channel.broadcast(list(bench.buffer.buckets()), TIMEOUT_S)
    bench.assert_staged(bench.wait(), 1)
    slicing.told = {"weight": Box((5000,), 0, 2500, 5000)}  # of another plan: compared with nothing yet
    bench.assert_staged(bench.stage(2), 2)


def test_the_spare_memory_is_used_where_it_is_large_enough():
    spare = torch.full((20_000,), 255, dtype=torch.uint8)
    bench = Bench(spare=spare)
    bench.join()
    bench.assert_staged(bench.stage(0), 0)
    assert bench.receiver._held.buffer.data_ptr() == spare.data_ptr()
    assert math.ceil(bench.receiver.staging_bytes / 64) * 64 == bench.buffer.layout.total_bytes
    bench.close()


def test_a_patch_is_staged_beside_its_base_and_gives_up_the_spare_memory(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    slicing, device = Half(), torch.device("cpu")
    trained = torch.nn.Parameter(torch.randn(TENSORS["norm"]))
    base = tuple((name, digest(torch.zeros(shape))) for name, shape in TENSORS.items() if name != "norm")
    buffer = SnapshotBuffer([("norm", trained)], 1024, patch=Patch(base))
    buffer.snapshot()
    bench = Bench()
    bench.buffer = buffer
    bench.receiver = WeightReceiver(
        device, BaseWeights(str(folder), device), lambda manifest, tensors: None,
        slicing=slicing, spare=torch.empty(20_000, dtype=torch.uint8),
    )  # fmt: skip
    bench.join()
    job = bench.stage(0)
    assert job.error == "" and "decode_ms" not in job.timings_ms, "no slots: where the base is, adapters must be, too"
    assert bench.receiver._memory.spare is None
    found = dict(bench.receiver.tensors())
    assert found.keys() == TENSORS.keys() and torch.equal(found["norm"], trained.detach())
    bench.close()
