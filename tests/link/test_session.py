"""The two ends of a session against each other, without sockets or clocks."""

from __future__ import annotations

import dataclasses

import pytest

from asyncrl.errors import FrameError, ProtocolError
from asyncrl.link import codec, limits
from asyncrl.link.desk_session import DeskSessions, Expected, Liveness, Seen
from asyncrl.link.generator_session import GeneratorSession, GeneratorState
from asyncrl.link.messages import (
    PROTOCOL_VERSION,
    Ack,
    ActiveLease,
    Beat,
    GroupResult,
    Hello,
    LeaseFailed,
    LeaseGrant,
    Nack,
    Refusal,
    Stop,
    Welcome,
)
from asyncrl.link.schema.message_base import Message
from asyncrl.link.wire_types import FailureReason, NackCode
from asyncrl.types import LeaseKind

MAX_BYTES = 1 << 20
EXPECTED = Expected("model-1", "tokenizer-1", "tasks:Task")


def hello(**changes) -> Hello:
    base = Hello(
        protocol=PROTOCOL_VERSION,
        generator_id="g",
        incarnation=1,
        max_run_epoch=0,
        model_fingerprint="model-1",
        tokenizer_fingerprint="tokenizer-1",
        task="tasks:Task",
        num_workers=1,
        first_unacked_seq=1,
        instance="i1",
    )
    return dataclasses.replace(base, **changes)


def desk(run_epoch=1, credit_bytes=10_000) -> DeskSessions:
    return DeskSessions(
        run_epoch=run_epoch,
        run_name="run",
        expected=EXPECTED,
        credit_bytes=credit_bytes,
        max_frame_bytes=MAX_BYTES,
    )


def generator(now=0.0, outbox_bytes=10_000, **changes) -> GeneratorSession:
    return GeneratorSession(
        hello(**changes), run_name="run", outbox_bytes=outbox_bytes, max_frame_bytes=MAX_BYTES, now=now
    )


def failed(detail=""):
    return lambda seq, run_epoch: LeaseFailed(seq, run_epoch, LeaseKind.TRAIN, seq, 0, FailureReason.ENGINE, detail)


def beat(active=(), tokens=0) -> Beat:
    return Beat(1, 1, [ActiveLease(*key) for key in active], tokens, 0, 0, 0.0, 0.0, 0)


def sent(session: GeneratorSession, now: float) -> list[Message]:
    return [codec.decode(frame, max_bytes=MAX_BYTES) for frame in session.due(now)]


def connect(session: GeneratorSession, sessions: DeskSessions, now=0.0, peer=b"p"):
    (message,) = sent(session, now)
    admission = sessions.hello(peer, message, version=0, now=now)
    session.receive(admission.reply, now)
    return admission.session


def frame_size(detail="") -> int:
    return len(codec.encode(failed(detail)(1, 1), max_bytes=MAX_BYTES))


# -- from hello to acknowledged


def test_a_result_is_sent_once_welcomed_and_forgotten_once_acknowledged():
    session, sessions = generator(), desk()
    session.put(failed(), 0.0)
    assert [type(message) for message in sent(session, 0.0)] == [Hello]
    known = connect(generator(), sessions)
    session.receive(Welcome(1, "run", 0, 10_000, 0, 1.0, MAX_BYTES), 0.0)
    (result,) = sent(session, 0.0)
    assert sessions.see(known, result.seq, 100) is Seen.NEW
    sessions.mark_durable(known, result.seq)
    assert session.receive(sessions.ack(known), 0.1)
    assert (session.outbox_bytes, session.unacked_leases()) == (0, [])


def test_hello_is_repeated_every_second_until_answered():
    session = generator()
    assert [len(session.due(now)) for now in (0.0, 0.5, 0.99, 1.0, 1.5, 2.0)] == [1, 0, 0, 1, 0, 1]


def test_results_are_resent_with_a_wait_that_doubles_from_half_a_second_to_eight():
    session = generator()
    connect(session, desk())
    session.put(failed(), 0.0)
    times = []
    now = 0.0
    while len(times) < 8:
        if session.due(now):
            times.append(now)
        now = session.next_due(now) if session.next_due(now) > now else now + 100.0
        session.receive(Stop(1, False, "heard"), now)  # keeps the link from looking dead
    waits = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_no_more_bytes_are_under_way_than_the_credit_and_one_result_always_may_be():
    session, sessions = generator(), desk(credit_bytes=2 * frame_size() + 1)
    known = connect(session, sessions)
    for _ in range(5):
        session.put(failed(), 0.0)
    assert [message.seq for message in sent(session, 0.0)] == [1, 2]
    sessions.see(known, 1, frame_size())
    sessions.mark_durable(known, 1)
    session.receive(sessions.ack(known), 0.1)
    assert [message.seq for message in sent(session, 0.1)] == [3]
    session.receive(Ack(1, 5 - 1, [], credit_bytes=1), 0.2)
    assert [message.seq for message in sent(session, 0.2)] == [5]


def test_a_generator_beats_and_waits_as_the_desk_says():
    session, sessions = generator(), desk()
    sessions.fleet_size = 750
    known = connect(session, sessions)
    assert session.beat_s == known.beat_s == 6.0
    assert session.next_due(0.0) == limits.suspect_s(6.0) == 10.0
    assert not session.reconnect_due(9.9) and session.reconnect_due(10.0)
    sessions.fleet_size = 250
    session.receive(sessions.ack(known), 1.0)
    assert session.beat_s == 2.0 and session.next_due(1.0) == 1.0 + limits.suspect_s(2.0)
    session.reconnected(2.0)
    assert session.beat_s == limits.BEAT_S  # hellos come as often, whatever the last learner said


@pytest.mark.parametrize("size", [1, 100, 125, 126, 300, 1000, 1200, limits.MAX_GENERATORS])
def test_silence_is_measured_by_the_beats_that_a_generator_was_asked_for(size):
    sessions = desk()
    sessions.fleet_size = size
    session = sessions.hello(b"p", hello(), version=0, now=0.0).session
    beat_s = limits.beat_s(size)
    assert size / beat_s <= limits.BEATS_PER_S or beat_s == limits.MAX_BEAT_S
    assert (beat_s == limits.BEAT_S) == (size <= 125)
    assert sessions.to_probe(beat_s) == []  # its next beat may be on its way
    assert sessions.tick(2 * beat_s if beat_s <= 2.0 else beat_s + 2.0) == []
    assert sessions.tick(limits.SUSPECT_S + beat_s - 1.01) == []
    assert sessions.tick(limits.SUSPECT_S + beat_s - 1.0) == [(session, Liveness.ALIVE)]
    assert session.liveness is Liveness.SUSPECT
    assert sessions.tick(max(2 * beat_s, limits.DEAD_S + beat_s - 1.01)) == []  # also when one beat was lost
    assert sessions.tick(limits.DEAD_S + beat_s - 1.0) == [(session, Liveness.SUSPECT)]
    assert session.liveness is Liveness.DEAD


def test_when_the_fleet_shrinks_a_silent_generator_is_noticed_as_soon_as_in_a_small_one():
    sessions = desk()
    sessions.fleet_size = 1000
    session = sessions.hello(b"p", hello(), version=0, now=0.0).session
    sessions.fleet_size = 10
    sessions.ack(session)
    assert sessions.next_look() == 2 * limits.BEAT_S
    sessions.tick(limits.SUSPECT_S)
    assert session.liveness is Liveness.SUSPECT
    sessions.tick(limits.DEAD_S)
    assert session.liveness is Liveness.DEAD


def test_credit_zero_stops_all_results():
    session, sessions = generator(), desk(credit_bytes=0)
    connect(session, sessions)
    session.put(failed(), 0.0)
    assert sent(session, 0.0) == []
    assert session.next_due(0.0) == limits.SUSPECT_S
    assert session.blocked and session.has_room


def test_the_outbox_reports_when_its_budget_is_spent_but_takes_finished_work():
    session = generator(outbox_bytes=frame_size())
    assert session.has_room and not session.blocked
    session.put(failed(), 0.0)
    assert not session.has_room and session.blocked
    assert session.put(failed(), 0.0) == 2


def test_a_result_over_the_frame_limit_raises_and_uses_no_seq():
    session = generator()
    large = GroupResult(1, 1, LeaseKind.TRAIN, 1, 0, bytes(4 * MAX_BYTES), [])
    with pytest.raises(FrameError, match=r"GroupResult of \d+ bytes is over the limit"):
        session.put(lambda seq, run_epoch: large, 0.0)
    assert session.put(failed(), 0.0) == 1


def test_single_acks_beyond_the_watermark_free_their_results():
    session, sessions = generator(), desk()
    connect(session, sessions)
    for _ in range(3):
        session.put(failed(), 0.0)
    session.receive(Ack(1, 0, [2], 10_000), 0.0)
    assert [lease.ordinal for lease in session.unacked_leases()] == [1, 3]
    assert [message.seq for message in sent(session, 0.0)] == [1, 3]


def test_an_ack_of_what_was_never_sent_is_a_protocol_error():
    session = generator()
    connect(session, desk())
    for message in (Ack(1, 1, [], 0), Ack(1, 0, [7], 0), Nack(1, 3, NackCode.INVALID, "y")):
        with pytest.raises(ProtocolError, match="the last one sent is 0"):
            session.receive(message, 0.0)


def test_a_nack_drops_its_result_and_counts_once():
    session = generator()
    connect(session, desk())
    session.put(failed(), 0.0)
    assert session.receive(Nack(1, 1, NackCode.INVALID, "nan"), 0.0)
    assert not session.receive(Nack(1, 1, NackCode.INVALID, "nan"), 0.0)
    assert session.outbox_bytes == 0


# -- restarts, silence, fencing


def test_after_a_learner_restart_everything_unacknowledged_is_sent_again_at_once():
    session = generator()
    connect(session, desk(run_epoch=1))
    for _ in range(3):
        session.put(failed(), 0.0)
    session.due(0.0)
    second = desk(run_epoch=2)
    assert second.of(b"p", 1.0) is None
    assert not session.receive(second.unknown_peer(), 1.0)
    known = connect(session, second, now=1.0)
    assert session.run_epoch == 2
    assert [message.seq for message in sent(session, 1.0)] == [1, 2, 3]
    assert known.seqs.watermark == 0


def test_messages_of_a_lower_run_epoch_are_ignored():
    session = generator()
    connect(session, desk(run_epoch=3))
    session.put(failed(), 0.0)
    assert not session.receive(Ack(2, 1, [], 0), 1.0)
    assert not session.receive(Welcome(2, "run", 9, 0, 1, 1.0, 10), 1.0)
    assert not session.receive(LeaseGrant(2, "train", 0, 0, 0, 1.0, b"", {}, 1, 1, 1.0), 1.0)
    assert session.outbox_bytes == frame_size()


def test_a_message_of_a_higher_run_epoch_leads_to_a_new_hello():
    session = generator()
    connect(session, desk(run_epoch=1))
    assert not session.receive(Ack(2, 0, [], 0), 1.0)
    (message,) = sent(session, 1.0)
    assert isinstance(message, Hello)


def test_an_old_learner_refuses_who_has_seen_a_newer_one_and_learns_of_it():
    session, old = generator(max_run_epoch=5), desk(run_epoch=4)
    assert connect(session, old) is None
    assert old.superseded_by == 5
    assert session.state is GeneratorState.HELLO and session.refusal.code == "run_epoch"
    assert len(session.due(1.0)) == 1  # goes on asking: the newer learner may come


def test_silence_asks_for_a_new_socket_and_unacknowledged_results_survive_it():
    session, sessions = generator(), desk()
    connect(session, sessions)
    session.put(failed(), 0.0)
    session.due(0.0)
    assert not session.reconnect_due(4.9)
    assert session.reconnect_due(5.0) and session.silence_s(5.0) == 5.0
    session.reconnected(5.0)
    assert not session.reconnect_due(9.9) and session.silence_s(9.9) == 9.9
    known = connect(session, sessions, now=6.0, peer=b"q")
    assert [message.seq for message in sent(session, 6.0)] == [1]
    assert sessions.of(b"p", 6.0) is None and sessions.of(b"q", 6.0) is known


def test_a_new_connection_is_greeted_at_once_and_what_was_under_way_comes_again():
    session, sessions = generator(), desk()
    connect(session, sessions)
    session.put(failed(), 0.0)
    assert [message.seq for message in sent(session, 0.0)] == [1]
    session.connected(0.1)
    assert not session.welcomed and session.next_due(0.1) == 0.1
    connect(session, sessions, now=0.1)
    assert [message.seq for message in sent(session, 0.1)] == [1]


def test_a_hello_that_was_said_without_a_connection_is_said_again_with_one():
    session = generator()
    assert len(session.due(0.0)) == 1 and session.due(0.3) == []
    session.connected(0.3)
    assert len(session.due(0.3)) == 1 and session.due(0.3) == []


@pytest.mark.parametrize(
    ("change", "code", "expected", "got"),
    [
        ({"protocol": 99}, "protocol", str(PROTOCOL_VERSION), "99"),
        ({"model_fingerprint": "other"}, "model", "model-1", "other"),
        ({"tokenizer_fingerprint": "other"}, "tokenizer", "tokenizer-1", "other"),
        ({"task": "other:Task"}, "task", "tasks:Task", "other:Task"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused_with_both_values(change, code, expected, got):
    session, sessions = generator(**change), desk()
    assert connect(session, sessions) is None
    assert session.state is GeneratorState.REFUSED
    assert (session.refusal.code, session.refusal.expected, session.refusal.got) == (code, expected, got)
    assert session.due(99.0) == [] and session.next_due(99.0) == float("inf")


@pytest.mark.parametrize("change", [{"generator_id": ""}, {"incarnation": 0}, {"first_unacked_seq": 0}])
def test_a_malformed_hello_is_refused(change):
    reply = desk().hello(b"p", hello(**change), version=0, now=0.0).reply
    assert isinstance(reply, Refusal) and reply.code == "protocol"


@pytest.mark.parametrize(
    ("run_name", "max_frame_bytes", "code", "expected", "got"),
    [("other", MAX_BYTES, "run", "other", "run"), ("run", 4096, "config", "4096", str(MAX_BYTES))],
)
def test_a_learner_of_another_run_or_frame_limit_counts_as_a_refusal(run_name, max_frame_bytes, code, expected, got):
    session = generator()
    assert session.receive(Welcome(1, run_name, 0, 0, 0, 1.0, max_frame_bytes), 0.0)
    assert session.state is GeneratorState.REFUSED
    assert (session.refusal.code, session.refusal.expected, session.refusal.got) == (code, expected, got)


def test_a_newer_incarnation_fences_the_older_one_and_frees_its_leases():
    sessions = desk()
    old = generator(incarnation=1)
    connect(old, sessions, peer=b"old")
    admission = sessions.hello(b"new", hello(incarnation=2, instance="i2"), version=0, now=1.0)
    assert admission.released == ("g", 1)
    assert sessions.of(b"old", 1.0) is None
    old.receive(sessions.unknown_peer(), 1.0)
    assert connect(old, sessions, now=1.0, peer=b"old") is None
    assert (old.state, old.refusal.code) == (GeneratorState.REFUSED, "fenced")


def test_two_processes_under_one_name_are_told_apart():
    sessions = desk()
    connect(generator(instance="a"), sessions, peer=b"a")
    twin = generator(instance="b")
    assert connect(twin, sessions, peer=b"b") is None
    assert twin.refusal.code == "fenced" and "generator.id" in twin.refusal.reason


def test_the_same_incarnation_comes_back_after_it_was_dead_and_keeps_its_seqs():
    session, sessions = generator(), desk()
    known = connect(session, sessions)
    sessions.see(known, 1, 10)
    sessions.mark_durable(known, 1)
    assert sessions.tick(20.0) == [(known, Liveness.ALIVE)] and known.liveness is Liveness.DEAD
    again = sessions.hello(b"q", hello(), version=0, now=21.0)
    assert again.session is known and again.released is None and known.liveness is Liveness.ALIVE
    assert sessions.see(known, 1, 10) is Seen.DUPLICATE


# -- the desk's memory of results


def test_each_result_is_new_once_then_pending_then_duplicate():
    sessions = desk()
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    verdicts = [sessions.see(known, 1, 10), sessions.see(known, 1, 10)]
    sessions.mark_durable(known, 1)
    verdicts.append(sessions.see(known, 1, 10))
    assert verdicts == [Seen.NEW, Seen.PENDING, Seen.DUPLICATE]
    assert sessions.answer_duplicate(known, 1) == sessions.ack(known) == Ack(1, 1, [], 10_000)


def test_a_rejected_result_gets_its_nack_again_when_it_is_repeated():
    sessions = desk()
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    sessions.see(known, 1, 10)
    nack = sessions.reject(known, 1, NackCode.INVALID, "nan")
    assert sessions.see(known, 1, 10) is Seen.DUPLICATE
    assert sessions.answer_duplicate(known, 1) == nack


def test_results_over_window_or_credit_are_put_off():
    sessions = desk(credit_bytes=100)
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    assert sessions.see(known, limits.SEQ_WINDOW + 1, 1) is Seen.TOO_FAR
    assert sessions.see(known, 1, 1000) is Seen.NEW  # a single one may be larger than the credit
    assert sessions.see(known, 2, 1) is Seen.TOO_FAR
    sessions.mark_durable(known, 1)
    assert sessions.see(known, 2, 60) is Seen.NEW
    assert sessions.see(known, 3, 60) is Seen.TOO_FAR


def test_out_of_order_results_advance_the_watermark_when_the_gap_closes():
    sessions = desk()
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    for seq in (3, 2, 5):
        sessions.see(known, seq, 1)
        sessions.mark_durable(known, seq)
    assert sessions.ack(known) == Ack(1, 0, [2, 3, 5], 10_000)
    sessions.see(known, 1, 1)
    sessions.mark_durable(known, 1)
    assert sessions.ack(known) == Ack(1, 3, [5], 10_000)


def test_state_and_journal_bring_back_what_was_settled_and_nothing_else():
    first = desk()
    known = first.hello(b"p", hello(), version=0, now=0.0).session
    for seq in (1, 2, 4, 5):
        first.see(known, seq, 1)
    for seq in (1, 2, 4):
        first.mark_durable(known, seq)
    second = desk(run_epoch=2)
    second.restore(first.state(), now=0.0)
    second.replay("g", 1, 7, now=0.0)
    second.replay("other", 2, 1, now=0.0)
    second.replay("other", 1, 9, now=0.0)  # an older incarnation: nothing of it can come
    known = second.hello(b"p", hello(max_run_epoch=1), version=0, now=0.0).session
    assert [seq for seq in range(1, 9) if second.see(known, seq, 1) is Seen.DUPLICATE] == [1, 2, 4, 7]
    assert second.get("other").incarnation == 2 and second.get("other").seqs.watermark == 1


def test_a_restored_generator_that_stays_away_is_reported_dead():
    first = desk()
    first.hello(b"p", hello(), version=0, now=0.0)
    second = desk(run_epoch=2)
    second.restore(first.state(), now=100.0)
    assert second.tick(114.0)[0][0].liveness is Liveness.SUSPECT
    ((session, before),) = second.tick(115.0)
    assert (session.generator_id, before, session.liveness) == ("g", Liveness.SUSPECT, Liveness.DEAD)


# -- liveness


def test_liveness_follows_silence():
    sessions = desk()
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    seen = []
    for now in (4.9, 5.0, 14.9, 15.0):
        sessions.tick(now)
        seen.append(known.liveness)
    assert seen == [Liveness.ALIVE, Liveness.SUSPECT, Liveness.SUSPECT, Liveness.DEAD]
    sessions.of(b"p", 16.0)
    assert sessions.tick(16.0) == [(known, Liveness.DEAD)] and known.liveness is Liveness.ALIVE


def test_beats_without_progress_end_in_dead_unless_there_is_nothing_to_do():
    sessions = desk()
    busy = sessions.hello(b"p", hello(), version=0, now=0.0).session
    idle = sessions.hello(b"q", hello(generator_id="h"), version=0, now=0.0).session
    for now in range(1, 130):
        sessions.of(b"p", now).on_beat(beat(active=[(LeaseKind.TRAIN, 1, 0)], tokens=min(now, 5)), now)
        sessions.of(b"q", now).on_beat(beat(), now)
        sessions.tick(now)
        assert (busy.liveness is Liveness.DEAD) == (now >= 5 + limits.NO_PROGRESS_S)
    assert idle.liveness is Liveness.ALIVE


def test_a_bye_ends_the_session_for_good():
    sessions = desk()
    known = sessions.hello(b"p", hello(), version=0, now=0.0).session
    sessions.bye(known)
    assert known.liveness is Liveness.GONE and sessions.of(b"p", 1.0) is None
    assert sessions.tick(99.0) == []


def test_the_desk_forgets_the_generator_gone_longest_when_it_knows_too_many(monkeypatch):
    monkeypatch.setattr(limits, "MAX_GENERATORS", 2)
    sessions = desk()
    first = sessions.hello(b"1", hello(generator_id="one"), version=0, now=0.0).session
    sessions.hello(b"2", hello(generator_id="two"), version=0, now=1.0)
    sessions.bye(first)
    sessions.hello(b"3", hello(generator_id="three"), version=0, now=2.0)
    assert sorted(session.generator_id for session in sessions) == ["three", "two"]
