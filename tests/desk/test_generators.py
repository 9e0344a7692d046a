"""Generators come, get leases as far as they have room, and go; what they held goes back."""

from __future__ import annotations

import dataclasses

import pytest

from asyncrl.desk.generators import ORDINAL_SEED_STRIDE, SAY_STRANGERS_EVERY_S, Generators
from asyncrl.desk.versions import Versions
from asyncrl.link import limits, messages
from asyncrl.link.codec import decode, encode
from asyncrl.link.messages import ActiveLease
from asyncrl.link.weight_records import Placement
from asyncrl.types import LeaseKey, LeaseKind
from asyncrl.weights.plan.planner import SyncPlanner
from tests.desk.desk_parts import MEBIBYTE, beat, hello, make_parts, small_config


def train(ordinal: int) -> ActiveLease:
    """The first attempt at a prompt, in hand and leased under version 0."""
    return ActiveLease(LeaseKind.TRAIN, ordinal, 0, 0)


class Wire:
    """Stands for the ROUTER: keeps what was sent."""

    max_frame_bytes = MEBIBYTE
    handshakes_refused = 0
    malformed_messages = 0
    keys = None

    def __init__(self):
        self.sent = []
        self.gone = set()  # peers without a connection

    def send_message(self, peer, message):
        self.sent.append((peer, decode(encode(message, max_bytes=MEBIBYTE), max_bytes=MEBIBYTE)))
        return peer not in self.gone

    def reaches(self, peer, message):
        return self.send_message(peer, message)

    def take(self, kind):
        """What was sent of one kind, by peer; it is forgotten."""
        found = [(peer, message) for peer, message in self.sent if isinstance(message, kind)]
        self.sent = [item for item in self.sent if not isinstance(item[1], kind)]
        return found


def versions_over(planner, parts):
    """The door to a planner whose outputs nobody carries out: there are neither publisher nor evaluations."""
    return Versions(
        planner=planner,
        socket=None,
        state=parts.state,
        proofs=None,
        evaluator=None,
        metrics=None,
        on_first_proof=lambda now: None,
    )


class World:
    def __init__(self, folder, run_epoch=1, **changes):
        self.parts = make_parts(folder, small_config(**changes), run_epoch)
        self.wire = Wire()
        self.planner = SyncPlanner(run_epoch=1, run_name="run", timeout_s=10.0, tolerance=1e-4, cell_size=8)
        self.generators = Generators(
            self.parts.config,
            socket=self.wire,
            state=self.parts.state,
            prompts=self.parts.prompts,
            acknowledgements=self.parts.acknowledgements,
            versions=versions_over(self.planner, self.parts),
        )

    def join(self, name, wanted=0, incarnation=1, now=0.0, version=0, **changes):
        """Hello, first beat, and the proof of `version`."""
        peer = f"{name}.{incarnation}".encode()
        self.generators.hello(peer, hello(name, incarnation), now)
        session = self.generators.session_of(peer, now)
        self.generators.beat(session, beat(sequences_wanted=wanted, **changes), now)
        if name in self.planner.receivers:
            self.planner.receivers[name].held_version = version
        return session

    def grants(self):
        return [(peer.decode(), message.ordinal) for peer, message in self.wire.take(messages.LeaseGrant)]


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.parts.journal.close()


def test_a_generator_that_fits_is_welcomed_and_one_that_does_not_is_refused(world):
    world.parts.state.policy.trained = 3
    world.generators.hello(b"p", hello("a"), 0.0)
    ((_, welcome),) = world.wire.take(messages.Welcome)
    assert (welcome.run_epoch, welcome.version) == (1, 3)
    world.generators.hello(b"q", dataclasses.replace(hello("b"), tokenizer_fingerprint="other"), 0.0)
    ((_, refused),) = world.wire.take(messages.Refusal)
    assert (refused.code, refused.expected, refused.got) == ("tokenizer", "tokenizer", "other")
    assert [session.generator_id for session in world.generators.alive()] == ["a"]


def test_strangers_are_counted_in_one_warning_every_thirty_seconds(world, caplog):
    def said():
        world.generators.say_strangers(now)
        lines = [record.getMessage() for record in caplog.records if "refused before a hello" in record.getMessage()]
        caplog.clear()
        return [(line.split()[0], line.partition("), ")[2].split()[0]) for line in lines]

    now = 0.0
    assert said() == []
    world.wire.handshakes_refused = 3
    assert said() == [("3", "0")]
    world.wire.handshakes_refused, world.wire.malformed_messages = 5, 7
    now = SAY_STRANGERS_EVERY_S - 1
    assert said() == []
    now = SAY_STRANGERS_EVERY_S
    assert said() == [("2", "7")]
    assert said() == []


def test_an_unknown_peer_is_asked_to_say_hello(world):
    assert world.generators.session_of(b"stranger", 0.0) is None
    ((_, nack),) = world.wire.take(messages.Nack)
    assert (nack.seq, nack.code) == (0, "hello")


def test_every_beat_is_answered(world):
    world.join("a")
    assert len(world.wire.take(messages.Ack)) == 1


def test_weights_are_offered_only_once_the_engine_is_ready(world):
    session = world.join("a", ready=False)
    assert world.planner.receivers == {}
    world.generators.beat(session, beat(ready=True), 1.0)
    assert list(world.planner.receivers) == ["a"]


def test_leases_fill_the_room_that_a_generator_says_it_has(world):
    """Two groups of four fit into nine sequences; the third is for the one sequence left over."""
    world.join("a", wanted=9)
    world.generators.grant(0.0)
    assert world.grants() == [("a.1", 0), ("a.1", 1), ("a.1", 2)]
    world.generators.grant(0.0)
    assert world.grants() == []


def test_room_is_cumulative_so_that_a_beat_on_its_way_asks_for_nothing_twice(world):
    session = world.join("a", wanted=4)
    world.generators.grant(0.0)
    assert len(world.grants()) == 1
    world.generators.beat(session, beat(sequences_wanted=4, active=[train(0)]), 0.1)
    world.generators.grant(0.1)
    assert world.grants() == []
    world.generators.beat(session, beat(sequences_wanted=8, active=[train(0)]), 0.2)
    world.generators.grant(0.2)
    assert world.grants() == [("a.1", 1)]


def test_pacing_bounds_what_all_generators_get_together(world):
    """(version 0 + max_age 1 + 1) x 2 groups in a step."""
    world.join("a", wanted=100)
    world.join("b", wanted=100)
    world.generators.grant(0.0)
    assert len(world.grants()) == 4


def test_a_generator_that_proved_no_version_gets_no_lease(world):
    world.join("a", wanted=100, version=None)
    world.generators.grant(0.0)
    assert world.grants() == []


def test_a_lease_says_everything_that_is_needed(tmp_path):
    world = World(tmp_path, sampling__repeatable=True, run__seed=2)
    world.join("a", wanted=8)
    world.generators.grant(5.0)
    first, second = (message for _, message in world.wire.take(messages.LeaseGrant))
    assert (first.kind, first.ordinal, first.attempt, first.issued_version) == ("train", 0, 0, 0)
    assert (first.num_rollouts, first.max_new_tokens, first.temperature) == (4, 6, 1.0)
    assert (first.payload, first.prompt) == ({"index": 0}, bytes(8))
    assert first.deadline_s == world.parts.config.generator.lease_timeout_s
    assert second.seed - first.seed == ORDINAL_SEED_STRIDE
    assert first.seed > 0
    world.parts.journal.close()


def test_a_greedy_completion_is_leased_when_it_is_the_baseline_and_counts_as_a_sequence(tmp_path):
    world = World(tmp_path, algorithm__advantage="remax")
    session = world.join("a", wanted=6)
    world.generators.grant(0.0)
    grants = [message for _, message in world.wire.take(messages.LeaseGrant)]
    assert [(grant.num_rollouts, grant.greedy_baseline) for grant in grants] == [(4, True)] * 2
    world.generators.beat(session, beat(sequences_wanted=10, active=[train(0), train(1)]), 0.1)
    world.generators.grant(0.1)
    assert world.grants() == []  # two leases are ten sequences
    world.parts.leases.start_eval(0, 1, 60.0, 0.1)
    world.generators.beat(session, beat(sequences_wanted=11, active=[train(0), train(1)]), 0.2)
    world.generators.grant(0.2)
    ((_, grant),) = world.wire.take(messages.LeaseGrant)
    assert (grant.kind, grant.num_rollouts, grant.greedy_baseline) == ("eval", 1, False)
    world.parts.journal.close()


def test_without_it_no_greedy_completion_is_leased(world):
    world.join("a", wanted=4)
    world.generators.grant(0.0)
    assert [message.greedy_baseline for _, message in world.wire.take(messages.LeaseGrant)] == [False]


def test_what_a_leaving_generator_held_goes_to_another_one_at_once(world):
    leaving = world.join("a", wanted=4)
    world.generators.grant(0.0)
    assert world.grants() == [("a.1", 0)]
    world.generators.bye(leaving, messages.Bye("signal"), 1.0)
    assert world.planner.receivers == {}
    world.join("b", wanted=4)
    world.generators.grant(1.0)
    assert world.grants() == [("b.1", 0)]


def test_a_silent_generator_is_dead_after_its_deadline_and_its_leases_go_back(world):
    world.join("a", wanted=4)
    world.generators.grant(0.0)
    world.generators.expire(limits.DEAD_S - 0.1)
    assert world.parts.leases.num_running == 1
    world.generators.expire(limits.DEAD_S)
    assert world.parts.leases.num_running == 0
    assert world.generators.alive() == []


def looks(world, until, every=0.5, start=0.0):
    """What a desk does that does not stand still."""
    for step in range(int(round((until - start) / every)) + 1):
        world.generators.expire(start + step * every)


def test_leases_of_a_silent_generator_that_keeps_its_connection_go_to_others_before_it_is_dead(world):
    """Stopped: libzmq does not always see it, and its leases would hold the learner up until it is dead."""
    stopped = world.join("a", wanted=4)
    world.generators.grant(0.0)
    assert world.grants() == [("a.1", 0)]
    looks(world, limits.SUSPECT_S - 0.5)
    other = world.join("b", wanted=4, now=limits.SUSPECT_S - 0.5)
    looks(world, limits.SUSPECT_S, start=limits.SUSPECT_S)
    world.generators.grant(limits.SUSPECT_S)
    assert world.grants()[0] == ("b.1", 0)
    # It comes back: it is admitted as before, and learns that it need not finish what the other one has now.
    assert world.generators.session_of(b"a.1", limits.SUSPECT_S + 1) is stopped
    world.generators.beat(stopped, beat(active=[train(0)], tickets=[b""]), limits.SUSPECT_S + 1)
    ((peer, abandon),) = world.wire.take(messages.Abandon)
    assert (peer, [tuple(key) for key in abandon.leases]) == (b"a.1", [(LeaseKind.TRAIN, 0, 0)])
    world.generators.expire(limits.SUSPECT_S + 1)
    assert world.generators.alive() == [stopped, other]


def test_a_silent_generator_keeps_its_leases_where_nobody_else_could_take_them(world):
    world.join("a", wanted=4)
    world.generators.grant(0.0)
    looks(world, limits.DEAD_S - 0.5)
    assert world.parts.leases.num_running == 1


def test_a_desk_that_stood_still_takes_nobodys_leases_for_that(world):
    """What they said meanwhile waits to be read."""
    world.join("a", wanted=4)
    world.generators.grant(0.0)
    looks(world, 1.0)
    world.join("b", now=limits.SUSPECT_S + 3)
    world.generators.expire(limits.SUSPECT_S + 3)
    assert world.parts.leases.num_running == 1


def test_a_silent_generator_without_a_connection_is_dead_long_before_that(world):
    """Killed: its leases would hold the learner up once they are max_age old."""
    session = world.join("a", wanted=4)
    world.generators.grant(0.0)
    world.wire.gone.add(b"a.1")
    world.generators.expire(limits.SUSPECT_S - 0.1)
    assert world.generators.alive() == [session]  # for all we know it is back in a moment
    world.generators.expire(limits.SUSPECT_S)
    assert world.parts.leases.num_running == 0
    assert world.generators.alive() == []


def test_a_connection_that_came_back_in_time_was_never_gone(world):
    world.join("a", wanted=4)
    world.wire.gone.add(b"a.1")
    world.generators.expire(limits.SUSPECT_S - 0.5)
    world.generators.hello(b"a.again", hello("a"), limits.SUSPECT_S - 0.1)
    world.generators.expire(limits.SUSPECT_S)
    assert [session.peer for session in world.generators.alive()] == [b"a.again"]


def test_the_connection_of_a_silent_generator_is_looked_at_once_a_beat(world):
    world.join("a")
    world.wire.take(messages.Ack)
    times = [step * limits.BEAT_S / 10 for step in range(50)]
    for now in times:
        world.generators.expire(now)
    assert len(world.wire.take(messages.Ack)) == 3  # after 2, 3 and 4 beats


def test_the_interval_of_beats_follows_the_fleet_as_it_grows_and_shrinks(world, monkeypatch):
    monkeypatch.setattr(limits, "BEATS_PER_S", 2.0)

    def told(session):
        world.generators.beat(session, beat(), 0.0)
        return [message.beat_s for _, message in world.wire.take(messages.Ack)][-1]

    sessions = [world.join(f"g{number}") for number in range(8)]
    assert told(sessions[0]) == sessions[0].beat_s == 4.0
    for session in sessions[4:]:
        world.generators.bye(session, messages.Bye("done"), 0.0)
    assert told(sessions[0]) == 2.0
    for session in sessions[1:4]:
        world.generators.bye(session, messages.Bye("done"), 0.0)
    assert told(sessions[0]) == limits.BEAT_S


def test_a_generator_that_comes_back_gets_no_more_than_it_has_room_for(world):
    """What it had received before counts: its wish is cumulative."""
    session = world.join("a", wanted=8)
    world.generators.grant(0.0)
    assert len(world.grants()) == 2
    world.generators.expire(limits.DEAD_S)
    back = limits.DEAD_S + 1
    assert world.generators.session_of(b"a.1", back) is session
    world.generators.expire(back)
    world.generators.grant(back)
    assert world.grants() == []  # nothing is known of its room yet
    world.generators.beat(session, beat(sequences_wanted=12, sequences_received=8), back)
    world.planner.receivers["a"].held_version = 0
    world.generators.grant(back)
    assert len(world.grants()) == 1


def test_a_generator_taken_for_dead_that_comes_back_begins_with_the_weights(world):
    session = world.join("a", wanted=4)
    world.generators.expire(limits.DEAD_S)
    assert world.planner.held_version("a") is None
    assert world.generators.session_of(b"a.1", limits.DEAD_S + 1) is session
    world.generators.beat(session, beat(sequences_wanted=4), limits.DEAD_S + 1)
    world.generators.expire(limits.DEAD_S + 1)
    assert world.generators.alive() == [session]
    assert world.planner.receivers["a"].held_version is None
    world.generators.grant(limits.DEAD_S + 1)
    assert world.grants() == []


def test_a_newer_incarnation_takes_the_place_of_the_older_and_of_its_leases(world):
    world.join("a", wanted=4)
    world.generators.grant(0.0)
    world.grants()
    world.join("a", wanted=4, incarnation=2, now=1.0)
    assert world.parts.leases.num_running == 0
    world.generators.grant(1.0)
    assert world.grants() == [("a.2", 0)]
    assert world.generators.session_of(b"a.1", 1.0) is None


def test_a_lease_that_the_generator_does_not_know_is_leased_again(world):
    session = world.join("a", wanted=4)
    world.generators.grant(0.0)
    world.grants()
    world.generators.beat(session, beat(sequences_wanted=4), 1.0)  # too early: the grant may be on its way
    assert world.parts.leases.num_running == 1
    world.generators.beat(session, beat(sequences_wanted=4, held_version=0), 60.0)
    assert world.parts.leases.num_running == 0
    world.generators.grant(60.0)
    assert world.grants() == [("a.1", 0)]


def test_a_lease_that_nobody_wants_is_abandoned_and_one_of_an_earlier_learner_adopted(tmp_path):
    world = World(tmp_path, run_epoch=2)
    active = [train(1), train(9999)]
    tickets = [world.parts.state.tickets.issue(lease.key, 0, "a", 1) for lease in active]
    world.join("a", run_epoch=2, active=active, tickets=tickets)
    ((_, abandon),) = world.wire.take(messages.Abandon)
    assert abandon.leases == [LeaseKey(LeaseKind.TRAIN, 9999, 0)]
    assert [record.key for record in world.parts.leases.running()] == [LeaseKey(LeaseKind.TRAIN, 1, 0)]
    world.parts.journal.close()


def test_an_expired_lease_is_abandoned_by_its_holder_and_leased_again(world):
    session = world.join("a", wanted=4)
    world.generators.grant(0.0)
    world.grants()
    deadline = world.parts.config.generator.lease_timeout_s
    world.generators.beat(session, beat(sequences_wanted=4, active=[train(0)]), deadline - 1)
    world.parts.sessions.of(b"a.1", deadline)
    world.generators.expire(deadline)
    ((_, abandon),) = world.wire.take(messages.Abandon)
    assert abandon.leases == [LeaseKey(LeaseKind.TRAIN, 0, 0)]
    assert world.parts.leases.num_running == 0


def test_all_generators_are_told_when_the_learner_stops(world):
    world.join("a")
    world.join("b")
    world.generators.stop(True, "the run is finished")
    assert [(peer, stop.finished) for peer, stop in world.wire.take(messages.Stop)] == [(b"a.1", True), (b"b.1", True)]


def test_a_generator_that_weights_cannot_reach_is_refused_with_the_reason(world):
    shared = Placement("host", "1@1", ("gpu-0",))
    world.generators._versions.trainer_joined(shared)
    for name, placement in {"a": dataclasses.replace(shared, memory="1@2"), "b": shared}.items():
        peer = name.encode()
        world.generators.hello(peer, dataclasses.replace(hello(name), placement=placement), 0.0)
        world.generators.beat(world.generators.session_of(peer, 0.0), beat(), 0.0)
    world.generators._versions.advance(0.0, world.generators)
    ((peer, refusal),) = world.wire.take(messages.Refusal)
    assert (peer, refusal.code) == (b"a", "config") and "one PID namespace" in refusal.reason
    assert [session.generator_id for session in world.generators.alive()] == ["b"]
    assert {name: receiver.backend for name, receiver in world.planner.receivers.items()} == {"b": "ipc"}


@pytest.mark.parametrize("repeatable", [False, True])
def test_an_evaluation_leases_as_many_completions_at_the_temperature_that_was_asked_for(tmp_path, repeatable):
    world = World(tmp_path, eval__samples=8, eval__temperature=0.6, sampling__repeatable=repeatable)
    world.join("a", wanted=1)
    world.parts.leases.start_eval(0, 1, 60.0, 0.1)
    world.generators.grant(0.2)
    ((_, grant),) = world.wire.take(messages.LeaseGrant)
    assert (grant.kind, grant.num_rollouts, grant.temperature) == ("eval", 8, 0.6)
    assert (grant.seed is not None) == repeatable
    world.parts.journal.close()
