"""Copies: of a generator's state folder, of a run folder. Two processes with one number are told apart, and refused."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil

import pytest

from asyncrl.config import Config
from asyncrl.desk.opening import restoring
from asyncrl.errors import PeerUnreachable
from asyncrl.generator.identity import claim_identity
from asyncrl.generator.learner_link import LearnerLink
from asyncrl.link import limits
from asyncrl.link.codec import decode
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.messages import Ack, Hello, Refusal, Welcome
from asyncrl.link.sockets import AsyncClientSocket
from asyncrl.link.wire_types import RefusalCode
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import GeneratorAdmitted
from asyncrl.types import Frontier
from tests.desk.desk_parts import MEBIBYTE, hello, make_parts
from tests.desk.test_generators import World


class Process:
    """A process of generator g, as it is started on a folder with its count of starts."""

    def __init__(self, folder):
        identity = claim_identity(folder, "g")
        identity.lock.close()
        self.incarnation = identity.incarnation
        first = dataclasses.replace(hello("g", identity.incarnation), instance="")
        self.session = GeneratorSession(first, run_name="run", outbox_bytes=MEBIBYTE, max_frame_bytes=MEBIBYTE, now=0.0)

    def hello(self) -> Hello:
        return decode(self.session._encode(self.session._current_hello()), max_bytes=MEBIBYTE)

    def says_hello_to(self, sessions, now=0.0):
        """What the desk answers; the generator takes it in."""
        self.session.reconnected(now)
        peer = self.session._hello.instance.encode()
        reply = sessions.hello(peer, self.hello(), version=0, now=now).reply
        self.session.receive(reply, now)
        return reply


@pytest.fixture
def sessions_of(tmp_path):
    """Makes the sessions of learners, each on a folder of its own."""
    made = []

    def make(run_epoch=1):
        made.append(make_parts(tmp_path / f"learner{len(made)}", run_epoch=run_epoch))
        return made[-1].sessions

    yield make
    for parts in made:
        parts.journal.close()


def copies(folder):
    """Two processes of one generator that count the same number of starts: of its folder, and of a copy of that."""
    folder.mkdir()
    Process(folder)
    shutil.copytree(folder, folder.parent / "copy")
    pair = Process(folder), Process(folder.parent / "copy")
    assert pair[0].incarnation == pair[1].incarnation == 2
    return pair


# -- of a generator


def test_R13_a_second_process_with_an_equal_count_of_starts_is_refused_with_what_to_do(tmp_path, sessions_of):
    first, second = copies(tmp_path / "generators")
    sessions = sessions_of()
    assert isinstance(first.says_hello_to(sessions), Welcome)
    refusal = second.says_hello_to(sessions)
    assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.FENCED
    assert "two processes call themselves g and count 2 starts: give each its own generator.id" in refusal.reason
    assert second.session.next_due(0.0) == float("inf"), "it ends"
    assert isinstance(first.says_hello_to(sessions), Welcome), "the first one is not disturbed"
    assert isinstance(Process(tmp_path / "copy").says_hello_to(sessions), Welcome), "started again, it counts on"


def test_R13_a_restarted_learner_still_knows_which_process_was_first(tmp_path, sessions_of, monkeypatch):
    """Without a checkpoint in between, and without a result: the journal says it."""
    first, second = copies(tmp_path / "generators")
    world = World(tmp_path)
    world.generators.hello(b"first", first.hello(), 0.0)
    assert len(world.wire.take(Welcome)) == 1
    world.parts.journal.make_durable()
    world.parts.journal.close()
    journal = Journal.open(tmp_path / "journal")
    plan = replay_plan(0, Frontier(), journal.read_all())
    journal.close()
    monkeypatch.setattr(restoring, "make_sessions", lambda config, run_epoch: sessions_of(run_epoch))
    sessions = restoring._restore_sessions(None, 2, {}, plan)
    assert isinstance(second.says_hello_to(sessions), Refusal)
    assert isinstance(first.says_hello_to(sessions), Welcome)


def test_R13_each_process_is_in_the_journal_once_and_is_no_use_of_the_run_folder(tmp_path):
    world = World(tmp_path)
    try:
        for _ in range(3):
            world.join("a")
        world.join("a", incarnation=2)
        world.parts.journal.make_durable()
        records = [entry.record for entry in world.parts.journal.read_all()]
        assert records == [GeneratorAdmitted("a", 1, "a.1"), GeneratorAdmitted("a", 2, "a.2")]
        assert replay_plan(0, Frontier(), world.parts.journal.read_all()).num_records == 0
    finally:
        world.parts.journal.close()


# -- of a run folder


def test_R13_a_generator_of_another_learner_with_an_equal_run_epoch_is_refused_with_what_to_do(tmp_path, sessions_of):
    generator = Process(tmp_path)
    live, copy, next_start = sessions_of(3), sessions_of(3), sessions_of(4)
    assert isinstance(generator.says_hello_to(live), Welcome)
    refusal = generator.says_hello_to(copy)
    assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.RUN_EPOCH
    assert "another learner of run epoch 3" in refusal.reason
    assert "start the generator again, or this learner" in refusal.reason
    assert copy.superseded_by is None
    assert isinstance(generator.says_hello_to(live), Welcome), "the refusal is not final"
    assert isinstance(generator.says_hello_to(next_start), Welcome), "the learner that was started again counts on"


def test_R13_a_generator_that_is_refused_says_why_and_not_that_nobody_answers(tmp_path, sessions_of, caplog):
    generator = Process(tmp_path)
    assert isinstance(generator.says_hello_to(sessions_of(3)), Welcome)
    assert isinstance(generator.says_hello_to(sessions_of(3)), Refusal)

    async def run():
        socket = AsyncClientSocket(f"ipc://{tmp_path}/nobody.sock", max_frame_bytes=MEBIBYTE)
        link = LearnerLink(Config(), generator.session, socket)
        link._said_at = 0.0
        link._check_reachable(20.0)
        with pytest.raises(PeerUnreachable, match="refuses this generator: .* another learner of run epoch 3"):
            link._check_reachable(1e6)
        await link.close()

    asyncio.run(run())
    assert "it refuses this generator: the generator knows another learner of run epoch 3" in caplog.text


def test_R13_a_generator_that_comes_back_to_its_learner_is_welcome_however_long_it_was_gone(tmp_path, sessions_of):
    generator, sessions = Process(tmp_path), sessions_of(3)
    assert isinstance(generator.says_hello_to(sessions), Welcome)
    sessions.tick(1e6)
    assert isinstance(generator.says_hello_to(sessions, 1e6), Welcome)
    sessions.bye(sessions.get("g"))
    assert isinstance(generator.says_hello_to(sessions, 2e6), Welcome)
    ack = Ack(3, 0, [], MEBIBYTE)
    assert generator.session.receive(ack, 2e6)


def test_R13_a_generator_that_was_forgotten_for_lack_of_room_is_welcome(tmp_path, sessions_of, monkeypatch):
    monkeypatch.setattr(limits, "MAX_GENERATORS", 2)
    generator, sessions = Process(tmp_path), sessions_of(3)
    assert isinstance(generator.says_hello_to(sessions), Welcome)
    for name in "abc":
        sessions.hello(name.encode(), hello(name), version=0, now=1.0)
    assert sessions.get("g") is None
    assert isinstance(generator.says_hello_to(sessions, 2.0), Welcome)
