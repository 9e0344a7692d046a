"""Publisher, planner and receivers together: when a version travels whole and when as a delta, and what repairs it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from asyncrl.desk.counters import Counters
from asyncrl.link.codec import decode, encode
from asyncrl.link.trainer_messages import SnapshotWanted
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels import rendezvous
from asyncrl.weights.publisher import Publisher
from tests.weights.weight_world import CANARY, MAX_BYTES, SCORES, TIMEOUT_S, Receiver, World


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


def test_the_first_version_is_dense_and_what_changes_little_is_a_delta(world):
    world.join("a")
    world.join("b")
    assert world.publish() == ["dense"]
    for _ in range(3):
        world.step()
        assert world.publish() == ["delta"]
        ended = world.ended[-1]
        assert ended.num_bytes < 0.05 * ended.dense_bytes and ended.encode_ms > 0
    figures = [Counters().sync_metrics(ended) for ended in world.ended]
    assert [sync.encoding for sync in figures] == ["dense", *["delta"] * 3]
    assert [sync.encode_ms is None for sync in figures] == [True, *[False] * 3]
    assert figures[0].num_bytes == figures[0].dense_bytes == figures[-1].dense_bytes > figures[-1].num_bytes
    assert world.receivers["a"].encodings == world.receivers["b"].encodings == ["dense", *["delta"] * 3]


def test_a_difference_is_kept_no_longer_than_somebody_may_ask_for_it(world):
    world.join("a")
    world.publish()
    for _ in range(4):
        world.step()
        assert world.publish() == ["delta"]
        # What was sent is counted as read until the publisher's thread has taken the report.
        world.wait(lambda: not any(slot.readers for slot in world.publisher._slots))
        assert len([slot for slot in world.publisher._slots if slot.delta is not None and not slot.readers]) == 1
    assert world.publisher._offered.delta is not None and len(world.publisher._slots) == 3


def test_a_store_that_does_not_start_is_an_answer_to_the_desk_and_the_publisher_goes_on(world, monkeypatch):
    real, calls = rendezvous.TCPStore, []

    def failing_first(**options):
        calls.append(options["is_master"])
        if len(calls) == 1:
            raise RuntimeError("the server socket has failed to listen\nException raised from C++")
        return real(**options)

    monkeypatch.setattr(rendezvous, "TCPStore", failing_first)
    world.join("a")
    world.publish_to("a")
    assert "the server socket has failed to listen" in world.failed[0].reason


def test_a_joiner_is_caught_up_whole_and_takes_deltas_with_the_others_from_then_on(world):
    world.join("a")
    world.publish()
    world.step()
    world.publish()
    world.join("b")
    assert world.settle() == ["dense"]
    world.step()
    assert world.publish() == ["delta"]
    assert (world.receivers["a"].encodings, world.receivers["b"].encodings) == (
        ["dense", "delta", "delta"],
        ["dense", "delta"],
    )


def test_a_joiner_is_caught_up_whole_beside_the_deltas_of_the_others(world):
    world.join("a")
    world.publish()
    world.step()
    world.join("b")
    assert sorted(world.publish()) == ["delta", "dense"]
    world.step()
    assert world.publish() == ["delta"]


def test_a_delta_damaged_on_the_way_is_followed_by_the_whole_version_and_then_by_deltas_again(world):
    world.join("a")
    world.publish()
    world.step()

    def damage():
        world.publisher._offered.delta.payload[20] ^= 2

    world.before_offer = damage
    assert world.publish() == ["delta", "dense"]
    assert "damaged on the way" in world.failed[0].reason
    world.before_offer = lambda: None
    world.step()
    assert world.publish() == ["delta"]


def test_a_base_damaged_in_a_receivers_memory_costs_one_dense_sync(world):
    for name in ("a", "b"):
        world.join(name)
    world.publish()
    world.receivers["b"].held.buffer[1234] ^= 1
    world.step()
    encodings = world.publish()
    assert encodings == ["delta", "dense"]
    assert [failed.name for failed in world.failed] == ["b"], "a was not affected"
    world.step()
    assert world.publish() == ["delta"]


def test_a_restarted_generator_holds_no_base(world):
    world.join("a")
    world.publish()
    world.step()
    world.receivers["a"].close()
    world.receivers["a"] = Receiver("a", world.replies)
    world.planner.joined("a", 2, 1, time.monotonic())
    assert world.publish() == ["dense"]


def test_a_version_that_reached_nobody_leaves_the_base_of_the_one_before(world):
    world.join("a")
    world.publish()
    world.planner.set_busy({"a"})
    for _ in range(2):
        world.step()
        world.offer()
    world.planner.set_busy(set())
    assert world.settle() == ["delta"]
    assert world.ended[-1].base_version == 0


def test_weights_that_all_change_stay_dense_and_take_no_third_buffer():
    world = World(torch.float32)
    try:
        world.join("a")
        world.publish()
        for seed in range(3):
            with torch.no_grad():
                world.weight.add_(torch.randn(world.weight.shape, generator=torch.Generator().manual_seed(seed)))
            assert world.publish() == ["dense"]
        assert world.publisher._base is None and len(world.publisher._slots) == 2
        assert world.ended[-1].encode_ms == 0.0
        world.step()  # and as soon as it pays:
        assert world.publish() == ["delta"]
    finally:
        world.close()


def test_an_offer_is_repeated_until_the_desk_answers_and_when_its_answer_shows_that_it_did_not_come():
    world = World(idle_wait_s=0.1)

    def offered():
        deadline = time.monotonic() + TIMEOUT_S
        while not (frames := world.socket.poll(0.05)):
            assert time.monotonic() < deadline
        world._peer = frames[0][0]
        return {decode(frame, max_bytes=MAX_BYTES).version for _, frame in frames}

    def answer(version):
        world.socket.send(world._peer, encode(SnapshotWanted(version, []), max_bytes=MAX_BYTES))

    try:
        world.publisher.publish(0, SCORES)
        assert [offered() for _ in range(3)] == [{0}] * 3
        answer(0)
        world.publisher.publish(1, SCORES)
        while offered() == {0}:
            pass
        assert not world.socket.poll(0.5), "heard: it does not repeat by itself any more"
        answer(0)
        assert offered() == {1}
    finally:
        world.close()


def test_a_snapshot_that_is_begun_is_not_offered_before_it_is_there():
    """The training loop has named the slot to other ranks: what was in it before is gone."""
    buffer = SnapshotBuffer([("w", torch.zeros(4))], 1024)
    publisher = Publisher("inproc://x", buffer, CANARY, host="127.0.0.1")
    publisher.publish(0, SCORES)
    free_slot = publisher._free_slot
    publisher._free_slot = lambda base: (publisher.begin(), free_slot(base))[1]  # while it is about to be offered
    assert not publisher._rotate() and publisher._offered.version is None
    publisher._free_slot = free_slot
    assert publisher.begin() == 0
    publisher.publish(1, SCORES)
    assert publisher._rotate() and publisher._offered.version == 1 and publisher.begin() == 1


# -- several channels at once


def test_a_member_that_is_deaf_stalls_its_cell_alone_and_its_memory_stays_until_it_is_done_with():
    timeout_s = 12.0
    world = World(cell_size=1, timeout_s=timeout_s)
    try:
        world.join("a")
        world.join("b")
        world.publish()
        world.receivers["b"].deaf = True
        started = time.monotonic()
        for _ in range(3):
            world.step(1.0)  # everything changes: each is sent whole
            world.publish_to("a")
        took_s = time.monotonic() - started
        assert took_s < timeout_s, "one grace of cells at most, not b's deadline"
        assert not world.failed and [c.channel_epoch for c in world.planner.rounds.values()] == [2]
        assert len(world.publisher._slots) == 3, "b's version is kept beside the newest and the next"
        assert [slot.version for slot in world.publisher._slots if slot.readers] == [1]
        world.wait(lambda: world.failed)
        (failed,) = world.failed
        assert (failed.name, failed.version, failed.phase) == ("b", 1, "stage")
        world.receivers["b"].deaf = False
        world.settle()
        world.wait(lambda: not any(slot.readers for slot in world.publisher._slots))
    finally:
        world.close()


def test_a_late_cell_gets_the_bytes_of_the_version_it_was_offered():
    """While the channel of `b` sends version 1, version 2 and 3 are taken, offered and sent to `a`."""
    world = World(cell_size=1, timeout_s=15.0)
    try:
        world.join("a")
        world.join("b")
        world.publish()
        gate, b = threading.Event(), world.receivers["b"]
        stage = b._stage

        def late(offer):
            gate.wait(20.0)
            stage(offer)

        b._stage = late
        for _ in range(3):
            world.step(1.0)
            world.publish_to("a")
        gate.set()
        world.wait(lambda: b.held is not None and b.held.version == 1)
        assert not world.failed, "digests agree"
        world.settle()
    finally:
        world.close()


def test_closing_a_channel_breaks_off_what_is_sent_in_it():
    world = World(cell_size=1, timeout_s=TIMEOUT_S)
    try:
        world.join("a")
        world.receivers["a"].deaf = True
        world.offer()
        world.wait(lambda: any(slot.readers for slot in world.publisher._slots))
        world.wait(lambda: any(not current.opening for current in world.planner.rounds.values()))
        started = time.monotonic()
        world.planner.left("a", started, "is dead")
        world.wait(lambda: not any(slot.readers for slot in world.publisher._slots))
        assert time.monotonic() - started < TIMEOUT_S / 2
    finally:
        world.close()
