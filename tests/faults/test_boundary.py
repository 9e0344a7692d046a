"""What a frame does wrong costs its sender, never the run."""

from __future__ import annotations

import logging

import pytest

from asyncrl.desk.boundary import Boundary
from asyncrl.desk.desk import FROM_GENERATOR
from asyncrl.errors import JournalError, ProtocolError
from asyncrl.host.repeats import SUMMARY_EVERY_S, Repeats
from asyncrl.link import messages
from asyncrl.link.codec import encode
from tests.desk.desk_parts import MEBIBYTE, beat, hello
from tests.desk.test_generators import World


class Inbox:
    """Stands for the ROUTER: hands out frames."""

    max_frame_bytes = MEBIBYTE

    def __init__(self, *frames):
        self.frames = [(b"a.1", frame) for frame in frames]

    def receive(self):
        taken, self.frames = self.frames, []
        return taken


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.parts.journal.close()


def frame(message):
    return encode(message, max_bytes=MEBIBYTE)


def received(world, boundary, handle, *frames, now=1.0):
    boundary.from_generators(Inbox(*frames), FROM_GENERATOR, handle, now)


def broken(peer, message, frame, now):
    raise KeyError("nobody thought of this")


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), OverflowError("x"), RecursionError("x")])
def test_R3_an_exception_out_of_a_message_fences_its_generator_and_the_others_go_on(world, caplog, error):
    def handle(peer, message, frame, now):
        raise error

    world.join("a", wanted=8)
    world.join("b", wanted=8)
    boundary = Boundary(world.generators)
    world.generators.grant(1.0)
    received(world, boundary, handle, frame(beat()), frame(beat()))
    assert [session.generator_id for session in world.generators.alive()] == ["b"]
    assert {record.holder for record in world.parts.leases.running()} <= {"b"}
    ((peer, refusal), *_) = world.wire.take(messages.Refusal)
    assert (peer, refusal.code) == (b"a.1", "fenced")
    with_traceback = [record for record in caplog.records if record.exc_info]
    assert [record.levelno for record in with_traceback] == [logging.ERROR]


def test_R3_a_fenced_process_is_refused_and_its_next_incarnation_admitted(world):
    world.join("a")
    received(world, Boundary(world.generators), broken, frame(beat()))
    world.wire.take(messages.Refusal)
    world.generators.hello(b"again", hello("a"), 2.0)
    ((_, refusal),) = world.wire.take(messages.Refusal)
    assert (refusal.code, refusal.expected) == ("fenced", ">= 2")
    world.join("a", incarnation=2)
    assert [session.incarnation for session in world.generators.alive()] == [2]


@pytest.mark.parametrize("error", [JournalError("disk full"), OSError("disk gone"), MemoryError()])
def test_R3_our_own_disk_and_memory_still_end_the_run(world, error):
    def handle(peer, message, frame, now):
        raise error

    world.join("a")
    with pytest.raises(type(error)):
        received(world, Boundary(world.generators), handle, frame(beat()))
    assert len(world.generators.alive()) == 1


def test_R3_what_the_protocol_does_not_allow_costs_nothing_but_the_frame(world):
    def handle(peer, message, frame, now):
        raise ProtocolError("out of turn")

    world.join("a")
    received(
        world, Boundary(world.generators), handle, frame(beat()), b"garbage", frame(messages.Nack(1, 1, "hello", ""))
    )
    assert len(world.generators.alive()) == 1


def test_R3_an_exception_out_of_a_rank_ends_the_run(world):
    with pytest.raises(KeyError):
        Boundary(world.generators).from_ranks(Inbox(frame(beat())), FROM_GENERATOR, broken, 0.0)


def test_R14_hostile_frames_are_counted_and_said_once_a_minute(world, caplog):
    world.join("a")
    boundary = Boundary(world.generators)
    lines = []

    def minute(now, number):
        caplog.clear()
        for _ in range(number):
            received(world, boundary, broken, b"garbage", now=now)
        boundary.summarise(now)
        lines.append([record.getMessage() for record in caplog.records])

    minute(0.0, 1000)
    minute(SUMMARY_EVERY_S - 1, 1000)
    minute(SUMMARY_EVERY_S, 0)
    minute(SUMMARY_EVERY_S + 1, 5)
    minute(2 * SUMMARY_EVERY_S, 0)
    minute(3 * SUMMARY_EVERY_S, 0)
    minute(3 * SUMMARY_EVERY_S, 1)
    said = "a generator's frame dropped: "
    bad = "a: frame of 7 bytes, must be 32 to 1048576"
    assert lines == [
        [said + bad],
        [],
        [f"{said}1999 more in 60 s, the newest: {bad}"],
        [],
        [f"{said}5 more in 60 s, the newest: {bad}"],
        [],
        [said + bad],
    ]


def test_R14_what_a_peer_wrote_is_printable_in_the_log(caplog):
    repeats = Repeats(logging.getLogger("test"))
    for now in (0.0, 1.0):
        repeats.warn("a hello refused", "evil\n2026 ERROR lost\x1b[2J", now)
    repeats.summarise(SUMMARY_EVERY_S)
    assert [record.getMessage() for record in caplog.records] == [
        "a hello refused: evil\\n2026 ERROR lost\\x1b[2J",
        "a hello refused: 1 more in 60 s, the newest: evil\\n2026 ERROR lost\\x1b[2J",
    ]
