"""What a large fleet and a long run cost the desk: CPU time of its thread, files read, things kept in memory."""

from __future__ import annotations

import gc
import time
from collections import Counter, deque

import pytest

from asyncrl.desk.desk import FROM_GENERATOR
from asyncrl.desk.generators import GRANTS_AT_ONCE
from asyncrl.host import garbage
from asyncrl.host.garbage import rare_collections
from asyncrl.link import limits, messages
from asyncrl.link.codec import decode, encode
from asyncrl.link.trainer_messages import TrainerHello, TrainerWelcome
from asyncrl.storage.journal import Journal
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import StepTaken
from benchmarks.faults.stub_fleet import make_stub_desk
from benchmarks.speed.desk_load import settings
from tests.desk.desk_parts import beat, hello
from tests.desk.test_desk import World as DeskWorld
from tests.replay.replay_making import make_group

MAX_BYTES = 2**24
# The bars are those of a machine that does nothing else. One whose cores are shared with others, or that counts lines
# for a coverage report, takes several times the CPU time for the same work.
RESTART_CPU_S = 1.0
TICK_CPU_S = 0.020
BUSY_MACHINE = 4.0


@pytest.fixture
def world(tmp_path):
    world = DeskWorld(tmp_path)
    yield world
    world.close()


# -- R17: a trainer that comes back is answered at once, however long the journal


def append_step(journal, version):
    """Two groups, and the step that trains them."""
    groups = [make_group(2 * version + number, version=version) for number in range(2)]
    for record in (*groups, StepTaken(version, tuple((group.ordinal, group.attempt) for group in groups))):
        journal.append(record, now=0.0)


def test_R17_a_trainer_that_comes_back_is_told_its_steps_without_a_look_at_the_disk(world, monkeypatch):
    journal = world.parts.journal
    for version in range(50):
        append_step(journal, version)
    journal.make_durable()
    told = []
    monkeypatch.setattr(world.ranks, "_send", lambda rank, message: told.append(message))
    monkeypatch.setattr(JournalReader, "__iter__", lambda self: 1 / 0)
    world.ranks.hello(b"trainer", TrainerHello(rank=0, world_size=1, version=47, pid=1))
    assert [type(message) for message in told] == [TrainerWelcome]
    assert told[0].replay_to == 50
    assert [journal.read_group(place).ordinal for place in world.ranks._dealer._again[48].places] == [96, 97]


def test_R17_what_the_journal_keeps_in_memory_grows_with_the_checkpoints_not_with_the_run(tmp_path):
    journal = Journal.open(tmp_path, segment_bytes=20_000, flush=lambda fd: None)
    kept = []
    for version in range(2_000):
        append_step(journal, version)
        if version % 10 == 9:
            journal.delete_before(version - 9)
            kept.append((len(journal.index), len(journal.index._segment_of_step), len(journal.index._segments)))
    journal.close()
    groups_and_steps, places_of_steps, segments = map(max, zip(*kept, strict=True))
    assert groups_and_steps == 10 * 3
    assert places_of_steps == 11
    assert segments <= 3


# -- R17: a restart under a large fleet


class QueuedFrames:
    """Stands for the ROUTER: hands out what generators sent, counts what is sent to them."""

    max_frame_bytes = max_sent_bytes = MAX_BYTES
    handshakes_refused = malformed_messages = 0
    keys = None

    def __init__(self):
        self.arrived = deque()
        self.grants = []
        self.last = {}  # peer -> what it was sent last

    def put(self, name, message):
        self.arrived.append((name.encode(), encode(message, max_bytes=MAX_BYTES)))

    def receive(self):
        return [self.arrived.popleft() for _ in range(min(len(self.arrived), limits.DESK_DRAIN_FRAMES))]

    def send_message(self, peer, message):
        frame = encode(message, max_bytes=MAX_BYTES)
        self.last[peer.decode()] = type(message)
        if isinstance(message, messages.LeaseGrant):
            self.grants.append((peer.decode(), frame))
        return True

    def reaches(self, peer, message):
        return True


class LargeFleet:
    """A desk, and generators that only say what a test has them say. Each tick notes its CPU time and its grants."""

    def __init__(self, folder, num_generators, num_leases, run_epoch):
        self.desk = make_stub_desk(folder, settings(num_leases), run_epoch)
        self.desk.generators.socket.close()
        self.socket = self.desk.generators.socket = QueuedFrames()
        self.names = [f"g{number}" for number in range(num_generators)]
        self.room = 4 * -(-num_leases // num_generators)
        self.cpu_s, self.granted = [], []

    def tick(self, now):
        granted, started = len(self.socket.grants), time.thread_time()
        self.desk.boundary.from_generators(self.socket, FROM_GENERATOR, self.desk._from_generator, now)
        self.desk._tick(now)
        self.cpu_s.append(time.thread_time() - started)
        self.granted.append(len(self.socket.grants) - granted)

    def tick_until(self, condition, now):
        while not condition():
            self.tick(now)
            assert len(self.cpu_s) < 5_000, "it gets nowhere"

    def join(self, now, active=None):
        """All say hello and beat; `active` are the leases that they have in hand, by name, with their tickets."""
        for name in self.names:
            self.socket.put(name, stub_hello(name))
        self.tick_until(lambda: not self.socket.arrived, now)
        for name in self.names:
            in_hand = (active or {}).get(name, [])
            listed = {
                "active": [messages.ActiveLease(*lease.key, lease.issued_version) for lease in in_hand],
                "tickets": [lease.ticket for lease in in_hand],
            }
            self.socket.put(name, beat(self.desk.state.run_epoch, sequences_wanted=self.room, **listed))
        self.tick_until(lambda: not self.socket.arrived, now)
        for receiver in self.desk.versions._planner.receivers.values():
            receiver.held_version = 0

    def close(self):
        self.desk.ranks.socket.close()
        self.desk.state.journal.close()


def stub_hello(name):
    greeting = hello(name)
    fields = {field: getattr(greeting, field) for field in greeting.__slots__}
    return type(greeting)(**fields | {"task": "stub:Task"})


@pytest.fixture
def fleet_of(tmp_path):
    """Makes the fleets of a test's run epochs."""
    made = []

    def make(run_epoch):
        if made:
            made.pop().close()
        made.append(LargeFleet(tmp_path, 1000, 12_288, run_epoch))
        return made[-1]

    yield make
    made[-1].close()


@pytest.fixture
def full_walks():
    """Counts the collector's walks over all objects."""
    walks = []

    def note(phase, info):
        if phase == "start" and info["generation"] == 2:
            walks.append(info)

    gc.callbacks.append(note)
    yield walks
    gc.callbacks.remove(note)


def test_R17_after_a_restart_12288_leases_run_again_within_a_second_and_no_tick_is_long(fleet_of, full_walks):
    fleet = fleet_of(run_epoch=2)
    book = fleet.desk.state.leases
    book._learn_of(12_287)  # they were leased before
    with rare_collections():
        full_walks.clear()
        fleet.join(1.0)
        fleet.tick_until(lambda: book.num_running == 12_288, 1.0)
    assert not full_walks
    assert max(fleet.granted) == GRANTS_AT_ONCE and sum(fleet.granted) == 12_288
    no_grants = sum(granted == 0 for granted in fleet.granted)
    assert no_grants <= 2 * 1000 / limits.DESK_DRAIN_FRAMES + 2, (
        "prompts are made in the order in which they are leased"
    )
    assert len(fleet.granted) - no_grants == 12_288 / GRANTS_AT_ONCE
    held = Counter(name for name, _ in fleet.socket.grants)
    assert max(held.values()) == 13
    assert sum(fleet.cpu_s) <= BUSY_MACHINE * RESTART_CPU_S
    assert max(fleet.cpu_s) <= BUSY_MACHINE * TICK_CPU_S


def test_R17_the_leases_that_a_fleet_has_in_hand_are_taken_over_as_fast(fleet_of, full_walks):
    first = fleet_of(run_epoch=1)
    first.join(1.0)
    first.tick_until(lambda: first.desk.state.leases.num_running == 12_288, 1.0)
    active = {}
    for name, frame in first.socket.grants:
        active.setdefault(name, []).append(decode(frame, max_bytes=MAX_BYTES))
    fleet = fleet_of(run_epoch=2)
    with rare_collections():
        full_walks.clear()
        fleet.join(1.0, active)
    assert not full_walks
    assert fleet.desk.state.leases.num_running == 12_288 and not fleet.socket.grants
    assert set(fleet.socket.last.values()) == {messages.Ack}
    assert max(fleet.cpu_s) <= 0.15 * sum(fleet.cpu_s), "a few frames at a time"
    assert sum(fleet.cpu_s) <= BUSY_MACHINE * RESTART_CPU_S
    assert max(fleet.cpu_s) <= BUSY_MACHINE * TICK_CPU_S


def test_R17_the_collector_walks_over_everything_only_when_millions_of_objects_came(full_walks):
    with rare_collections():
        full_walks.clear()
        kept = [[] for _ in range(200_000)]
        assert not full_walks and gc.get_freeze_count() > 0
        for _ in range(100_000):  # garbage that only the collector finds
            knot = []
            knot.append(knot)
        assert gc.collect(1) < 20_000, "it is collected all the same"
    assert len(kept) == 200_000 and gc.get_freeze_count() == 0


def test_R17_a_desk_that_serves_has_the_collector_set_so_and_sets_it_back(world):
    before, seen = gc.get_threshold(), []
    world.desk._timeout = lambda now: 0.0
    world.desk._over = lambda now: not seen.append((gc.get_threshold(), gc.get_freeze_count() > 0))
    assert world.desk.run() == 0
    assert seen == [(garbage.THRESHOLDS, True)]
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, 0)
