"""What the desk decides when generators, batches and peers go wrong: each test is named after the fault it holds."""

from __future__ import annotations

import signal
import stat
import sys
import tracemalloc
from collections import Counter

import pytest

from asyncrl.desk.generators import GRANTS_AT_ONCE, IN_HAND_FACTOR
from asyncrl.desk.proofs import KEPT_VERSIONS
from asyncrl.errors import ProtocolError, TrainerFailed
from asyncrl.link import limits, messages
from asyncrl.link.codec import encode_body
from asyncrl.link.desk_session import DeskSessions, Expected, Liveness
from asyncrl.link.rollouts import group_to_result
from asyncrl.link.trainer_messages import BatchRequest, SnapshotReady, StepDone
from asyncrl.link.wire_types import FailureReason
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.outcomes import MAX_FAILED_TRIALS, Blame, Outcomes, Recovered, SetAside
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.recovery import replay_plan
from asyncrl.replay.tickets import KEY_FILE, Tickets
from asyncrl.storage.records import BatchSkipped
from asyncrl.types import Frontier, LeaseKey, LeaseKind
from asyncrl.weights.plan.planner import SyncPlanner
from tests.desk.desk_parts import beat, hello, make_parts, train_group
from tests.desk.test_desk import FIGURES
from tests.desk.test_desk import World as DeskWorld
from tests.desk.test_generators import World
from tests.faults.desk_fleet import Fleet, Stub
from tests.weights.manifests import manifest_of


def train_key(ordinal, attempt=0):
    return LeaseKey(LeaseKind.TRAIN, ordinal, attempt)


# -- R1: one generator that fails with everything

KINDS = ["reward_error", "reward_timeout", "engine", "invalid", "returned", "tainted", "deadline", "silence"]


def fleet(folder, bad=None, **changes):
    """Three good generators; a fourth, whose every lease ends as `bad` says."""
    stubs = [Stub(f"good{index}", room=8, work_s=1.0) for index in range(3)]
    if bad is not None:
        fail_s = 4.0 if bad == "deadline" else 0.05
        stubs.insert(0, Stub("bad", room=8, work_s=1.0, answer=lambda grant: bad, fail_s=fail_s))
    return Fleet(folder, stubs, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_R1_one_bad_generator_of_four_costs_no_prompt_and_little_time(tmp_path, caplog, kind):
    three = fleet(tmp_path / "three", steps=200, lease_timeout_s=4.0)
    alone_s = three.run(400.0)
    four = fleet(tmp_path / "four", kind, steps=200, lease_timeout_s=4.0)
    took_s = four.run(400.0)
    assert (three.version, four.version) == (200, 200)
    assert four.parts.leases.num_given_up == 0
    assert alone_s / took_s >= 0.9
    aside = [record.getMessage() for record in caplog.records if "is set aside" in record.getMessage()]
    assert len(aside) == 1 and "generator bad is set aside" in aside[0]
    assert four.parts.leases.outcomes.is_set_aside("bad")
    three.close()
    four.close()


def test_R1_a_generator_that_heals_is_back_by_its_trial(tmp_path, caplog):
    caplog.set_level("INFO")
    world = None
    ill = Stub("ill", 8, 1.0, answer=lambda grant: "engine" if world.now < 5.0 else "group", fail_s=0.05)
    world = Fleet(tmp_path, [ill, *(Stub(f"good{n}", 8, 1.0) for n in range(3))], steps=60)
    world.run(100.0)
    assert not world.parts.leases.outcomes.is_set_aside("ill")
    assert "generator ill finished its trial lease" in caplog.text
    assert world.parts.leases.num_given_up == 0
    world.close()


def test_R1_the_weights_of_a_generator_that_is_set_aside_are_sent_again(tmp_path):
    world = fleet(tmp_path, "engine", steps=4)
    seen = set()
    while world.version < 4 and world.now < 60.0:
        world.run(world.now + 0.02)
        seen.add((world.parts.leases.outcomes.is_set_aside("bad"), world.planner.held_version("bad") is None))
    assert (True, True) in seen
    world.close()


def test_R1_a_prompt_that_fails_everywhere_is_given_up_and_nobody_is_set_aside(tmp_path):
    def answer(grant):
        return "reward_error" if grant.ordinal in (5, 77) else "group"

    world = Fleet(tmp_path, [Stub(f"g{n}", 8, 1.0, answer) for n in range(3)], steps=40)
    world.run(100.0)
    assert world.version == 40
    assert world.parts.leases.state().given_up == [5, 77]
    assert not any(world.parts.leases.outcomes.is_set_aside(name) for name in world.stubs)
    world.close()


@pytest.mark.parametrize("steps", [1, 3])
def test_R1_the_last_prompt_of_a_run_fails_at_the_only_generator_and_the_run_ends(tmp_path, steps):
    last = 8 * steps - 1
    world = Fleet(
        tmp_path, [Stub("g", 8, 1.0, lambda grant: "engine" if grant.ordinal == last else "group")], steps=steps
    )
    world.run(200.0)
    assert world.version == steps
    assert world.parts.leases.state().given_up == [last]
    world.close()


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_R1_where_every_generator_fails_with_everything_the_run_ends_with_a_sentence(tmp_path, names):
    world = Fleet(tmp_path, [Stub(name, 8, 1.0, lambda grant: "reward_error", fail_s=0.05) for name in names])
    while not (why := world.generators.hopeless()) and world.now < 120.0:
        world.run(world.now + 0.1)
    assert 20.0 < world.now < 60.0, "an outage of seconds ends no run"
    assert all(f"{name}: " in why for name in names) and "stub: reward_error" in why
    assert world.parts.leases.num_given_up == 0
    world.close()


def test_R1_a_newcomer_gives_a_failing_fleet_hope(tmp_path):
    outcomes = Outcomes()
    now = 0.0
    for number in range(6):
        outcomes.failed("a", train_key(number), "engine", "no memory", now)
    for number in range(10, 10 + MAX_FAILED_TRIALS):
        assert outcomes.hopeless(["a"]) == ""
        now = outcomes.next_trial(now)
        assert outcomes.room("a", 8, now - 0.01) == 0
        assert outcomes.room("a", 8, now) == 1
        outcomes.granted("a", train_key(number))
        assert outcomes.room("a", 8, now) == 0, "one at a time"
        outcomes.failed("a", train_key(number), "engine", "no memory", now)
    assert outcomes.hopeless(["a"]) == "a: 10 x engine; the last one: no memory"
    assert outcomes.hopeless(["a", "new"]) == ""
    outcomes.forget("a")
    assert outcomes.room("a", 8, now) == 8


def test_R1_a_strike_follows_a_success_and_failures_in_company_are_none():
    outcomes = Outcomes()
    failed = lambda name, ordinal: outcomes.failed(name, train_key(ordinal), "engine", "", 0.0)  # noqa: E731
    assert failed("a", 1) is Blame.ALONE, "it has not finished anything yet"
    assert failed("a", 2) is Blame.NONE
    outcomes.succeeded("a", train_key(3))
    assert failed("a", 1) is Blame.STRIKE
    assert failed("a", 1) is Blame.ALONE, "no success in between"
    assert failed("a", 2) is Blame.NONE
    assert failed("a", 1) is Blame.NONE
    assert failed("b", 1) is Blame.ALONE


def test_R1_a_trial_that_its_generator_took_along_is_due_again_and_a_success_brings_it_back():
    outcomes = Outcomes()
    for number in range(6):
        outcomes.failed("a", train_key(number), "returned", "", 0.0)
    assert [type(news) for news in outcomes.take_news()] == [SetAside]
    outcomes.granted("a", train_key(9))
    outcomes.took_back("a", train_key(9), 7.0)
    assert outcomes.room("a", 8, 7.0) == 1
    outcomes.granted("a", train_key(10))
    outcomes.succeeded("a", train_key(10))
    assert outcomes.take_news() == [Recovered("a")]
    assert outcomes.room("a", 8, 7.0) == 8


def test_R1_a_judge_that_is_down_for_all_generators_for_a_while_costs_no_prompt(tmp_path):
    """Each generator's first failure follows a success; all further ones say nothing of their prompts."""
    world = None
    stubs = [
        Stub(f"g{n}", 4, 1.0, lambda grant: "reward_error" if 10.0 < world.now < 18.0 else "group", fail_s=0.05)
        for n in range(12)
    ]
    world = Fleet(tmp_path, stubs, steps=60, groups_per_step=8)
    world.run(200.0)
    assert world.version == 60
    assert world.parts.leases.num_given_up == 0
    world.close()


def test_R1_an_evaluation_prompt_is_not_given_up_for_a_generator_that_fails_with_everything():
    book = LeaseBook(Pacing(2, 1, 10), lease_timeout_s=60.0)
    evaluation = book.start_eval(version=0, num_prompts=8, timeout_s=600.0, now=0.0)
    for _ in range(40):
        for record in book.grant("bad", 0, 1, 0, now=0.0):
            book.fail(record.key, "reward_error", 0.0)
    assert evaluation.given_up == set()
    assert len(book.grant("good", 0, 8, 0, now=0.0)) == 8


# -- R17: what one message costs does not grow with the fleet


def test_R17_a_beat_a_poll_and_a_grant_look_at_no_other_generator(tmp_path, monkeypatch):
    """Counted in calls, not in seconds: with 400 generators as many as with 40."""

    def calls(num_generators):
        stubs = [Stub(f"g{n}", room=4, work_s=1e9) for n in range(num_generators)]
        world = Fleet(tmp_path / str(num_generators), stubs, steps=10**6, groups_per_step=num_generators)
        world.run(2.5)
        assert world.parts.leases.num_running == 4 * num_generators
        counted = Counter()

        def count(frame, event, _):
            if event == "call" and "asyncrl" in frame.f_code.co_filename:
                counted["calls"] += 1

        sys.setprofile(count)
        world.generators.expire(world.now)
        world._beat(world.stubs["g7"])
        world.generators.grant(world.now)
        world.parts.leases.next_deadline(world.now)
        world.generators.expire(world.now)
        sys.setprofile(None)
        world.close()
        return counted["calls"]

    few, many = calls(40), calls(400)
    assert many <= few + 20


def test_R17_grants_come_in_slices_so_that_no_beat_waits_for_all_of_them(tmp_path):
    world = Fleet(tmp_path, [Stub(f"g{n}", room=16, work_s=1e9) for n in range(50)], groups_per_step=400, max_age=1)
    for name in world.stubs:
        world._proved(name)
    sizes = []
    while not sizes or world.generators.grants_left:
        world.generators.grant(0.0)
        sizes.append(sum(isinstance(m, messages.LeaseGrant) for _, m in world.wire.sent))
        world._deliver()
    assert max(sizes) == GRANTS_AT_ONCE and sum(sizes) == 800
    assert all(len(stub.held) == 16 for stub in world.stubs.values())
    world.close()


def test_R17_generators_that_are_gone_for_good_cost_a_poll_nothing():
    sessions = DeskSessions(
        run_epoch=1,
        run_name="run",
        expected=Expected("model", "tokenizer", "tests:Task"),
        credit_bytes=2**20,
        max_frame_bytes=2**20,
    )
    for number in range(2000):
        sessions.hello(b"%d" % number, hello(f"g{number}"), version=0, now=0.0)
    assert len(sessions.tick(limits.SUSPECT_S)) == len(sessions.tick(limits.DEAD_S)) == 2000
    assert {session.liveness for session in sessions} == {Liveness.DEAD}
    assert sessions.to_probe(1e6) == [] and sessions.tick(1e6) == []
    assert sessions.next_look() == float("inf")
    assert sessions.of(b"7", 1e6) is sessions.get("g7")
    assert [(session.generator_id, session.liveness) for session, _ in sessions.tick(1e6)] == [("g7", Liveness.ALIVE)]


# -- R6: results, failures and adopted leases are those of who holds the lease


@pytest.fixture
def parts(tmp_path):
    parts = make_parts(tmp_path)
    yield parts
    parts.journal.close()


def result_of(group, ticket, seq=1, run_epoch=1):
    result = group_to_result(group, seq, run_epoch, ticket)
    return result, encode_body(result)


def bad_tickets(parts):
    """Tickets that do not prove lease 0.0 at incarnation 1 of `thief`, nor anybody's."""
    tickets, key = parts.state.tickets, train_key(0)
    good = tickets.issue(key, 0, "thief", 1)
    return {
        "none": b"",
        "of another holder": tickets.issue(key, 0, "g1", 1),
        "of another incarnation": tickets.issue(key, 0, "thief", 2),
        "of another ordinal": tickets.issue(train_key(1), 0, "thief", 1),
        "of another attempt": tickets.issue(train_key(0, 1), 0, "thief", 1),
        "of an evaluation": tickets.issue(LeaseKey(LeaseKind.EVAL, 0, 0), 0, "thief", 1),
        "of another run": Tickets("other", tickets._key).issue(key, 0, "thief", 1),
        "under another key": Tickets().issue(key, 0, "thief", 1),
        "of an older version": (-1).to_bytes(8, "little", signed=True) + good[8:],
        "of a newer version": (10**9).to_bytes(8, "little") + good[8:],
        "cut": good[:-1],
        "longer": good + b"x",
    }


def test_R6_nothing_is_taken_without_the_ticket_of_the_lease_and_its_holder(parts):
    parts.connect("g1")
    thief = parts.connect("thief")
    (record,) = parts.leases.grant("g1", 0, 1, 0, 0.0)
    for seq, (what, ticket) in enumerate(bad_tickets(parts).items(), start=1):
        answer = parts.intake.group(thief, *result_of(train_group(0), ticket, seq), 0.0).reply
        assert isinstance(answer, messages.Nack) and answer.seq == seq, what
    for seq, (what, ticket) in enumerate(bad_tickets(parts).items(), start=100):
        failed = messages.LeaseFailed(seq, 1, LeaseKind.TRAIN, 0, 0, FailureReason.ENGINE, "forged", ticket)
        answer = parts.intake.failed(thief, failed, 100, 0.0).reply
        assert isinstance(answer, messages.Nack) and answer.seq == seq, what
    assert parts.leases.running() == [record]
    assert len(parts.buffer) == 0 and parts.totals.rollouts_failed == {}
    assert parts.deliver(parts.sessions.get("g1"), train_group(0), seq=1) is None
    assert len(parts.buffer) == 1


def test_R6_forged_failures_give_no_prompt_up(parts):
    parts.connect("g1")
    thief = parts.connect("thief")
    parts.leases.grant("g1", 0, 4, 0, 0.0)
    for seq in range(1, 140):
        key = train_key(seq % 4)
        ticket = parts.state.tickets.issue(key, 0, "g1", 1)
        parts.intake.failed(thief, messages.LeaseFailed(seq, 1, *key, FailureReason.ENGINE, "forged", ticket), 100, 0.0)
    assert (parts.leases.num_running, parts.leases.num_given_up) == (4, 0)


def test_R6_tokens_older_than_their_lease_are_refused(parts):
    session = parts.connect("g1")
    parts.proofs.add("g1", 1, 1)
    parts.state.policy.newest = 1
    parts.leases.grant("g1", 1, 1, 1, 0.0)
    ticket = parts.ticket(session, train_key(0), issued_version=1)
    answer = parts.intake.group(session, *result_of(train_group(0, version=0), ticket, 1), 0.0).reply
    assert isinstance(answer, messages.Nack) and "must lie in [1, 1]" in answer.reason
    assert parts.totals.rollouts_failed == {"invalid": 4}


def desk_of_epoch_2(folder, **changes):
    """A desk that has reached version 3 in an earlier life."""
    world = World(folder, run_epoch=2, **changes)
    world.parts.state.policy.newest = world.parts.state.policy.trained = 3
    return world


@pytest.mark.parametrize(
    ("issued", "holder", "incarnation", "is_adopted"),
    [
        (3, "a", 1, True),
        (0, "a", 1, True),
        (3, "b", 1, False),
        (3, "a", 2, False),
        (10**9, "a", 1, False),
        (4, "a", 1, False),
    ],
)
def test_R6_a_restarted_learner_adopts_what_its_own_ticket_proves(tmp_path, issued, holder, incarnation, is_adopted):
    world = desk_of_epoch_2(tmp_path)
    key = train_key(1)
    ticket = world.parts.state.tickets.issue(key, issued, holder, incarnation)
    world.join("a", run_epoch=2, active=[messages.ActiveLease(*key, 0)], tickets=[ticket])
    assert [(record.key, record.issued_version) for record in world.parts.leases.running()] == (
        [(key, issued)] if is_adopted else []
    )
    assert bool(world.wire.take(messages.Abandon)) != is_adopted
    world.parts.journal.close()


def test_R6_a_beat_that_lists_thousands_of_leases_adopts_none_without_tickets(tmp_path):
    world = desk_of_epoch_2(tmp_path, learner__groups_per_step=1000)
    active = [messages.ActiveLease(*train_key(number), 10**9) for number in range(2985)]
    world.join("a", run_epoch=2, active=active, tickets=[bytes(24)] * 2985)
    assert world.parts.leases.num_running == 0
    world.parts.journal.close()


def test_R6_a_generator_adopts_no_more_than_it_can_work_on(tmp_path):
    world = desk_of_epoch_2(tmp_path, learner__groups_per_step=1000, generator__max_sequences=16)
    active = [messages.ActiveLease(*train_key(number), 0) for number in range(200)]
    tickets = [world.parts.state.tickets.issue(lease.key, 0, "a", 1) for lease in active]
    world.join("a", run_epoch=2, active=active, tickets=tickets)
    assert world.parts.leases.num_running == 16 * IN_HAND_FACTOR // 4
    world.parts.journal.close()


def test_R6_the_key_of_the_tickets_outlives_the_learner_and_is_its_users_alone(tmp_path):
    first = Tickets.of_run(tmp_path, "run")
    ticket = first.issue(train_key(5), 7, "g", 2)
    assert Tickets.of_run(tmp_path, "run").issued_version(ticket, train_key(5), "g", 2) == 7
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    (tmp_path / KEY_FILE).write_bytes(b"")
    assert Tickets.of_run(tmp_path, "run").issued_version(ticket, train_key(5), "g", 2) is None
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


# -- R2, R10, U7: the desk and its trainer


@pytest.fixture
def desk(tmp_path):
    world = DeskWorld(tmp_path)
    yield world
    world.close()


def fill(world, ordinals, version=0):
    """Groups of these ordinals come in, sampled at `version`."""
    parts = world.parts
    session = parts.sessions.get("g1") or parts.connect("g1")
    parts.proofs.add("g1", 1, version)
    parts.leases.grant("g1", version, 8, version, 0.0)
    granted = {record.key.ordinal: record.key for record in parts.leases.running()}
    for ordinal in ordinals:
        seq = session.seqs.watermark + 1
        key = granted[ordinal]
        assert parts.deliver(session, train_group(ordinal, key.attempt, version=version), seq) is None
        parts.make_durable()


def die_of(world, version, now):
    """A trainer comes up at version 0, trains again up to `version`, gets its batch and dies of it."""
    world.asks_from(0)
    for step in range(version):
        world.desk.ranks.deal()
        world.desk._from_trainer(b"trainer", StepDone(step + 1, FIGURES, 0.1, {}), b"", now)
        world.desk._from_trainer(b"trainer", BatchRequest(0, step + 1), b"", now)
    world.desk.ranks.decide(now)
    world.desk.ranks.deal()
    world.trainer("raise SystemExit(1)")
    world.process.ranks.wait(60.0)
    world.desk._watch_trainer(now)
    world.process._restart_at = None  # the next one is started by hand


def test_R2_steps_trained_again_are_no_progress_and_the_batch_is_named_at_the_end(desk):
    """One restart is allowed. Each trainer makes version 1 from the journal again before it dies of the next batch."""
    fill(desk, [0, 1])
    desk.asks_from(0)
    desk.desk.ranks.decide(0.0)
    desk.desk.ranks.deal()
    desk.desk._from_trainer(b"trainer", StepDone(1, FIGURES, 0.1, {}), b"", 0.0)
    fill(desk, [2, 3])
    die_of(desk, 1, now=1.0)
    with pytest.raises(TrainerFailed) as error:
        die_of(desk, 1, now=2.0)
    said = str(error.value)
    assert TrainerFailed.exit_code == 7
    assert "died 2 times" in said and "making version 2 of the 2 prompts with ordinals 2, 3" in said
    assert "learner.on_bad_batch=skip" in said


def test_R2_a_new_version_sets_the_count_back(desk):
    fill(desk, [0, 1])
    die_of(desk, 0, now=1.0)
    desk.asks_from(0)
    desk.desk.ranks.deal()
    desk.desk._from_trainer(b"trainer", StepDone(1, FIGURES, 0.1, {}), b"", 2.0)
    assert desk.process.failures == 0
    fill(desk, [2, 3])
    die_of(desk, 1, now=3.0)
    assert desk.process.failures == 1


def test_R2_a_trainer_that_dies_while_it_loads_blames_no_batch(desk):
    for now in (1.0, 2.0):
        desk.trainer("raise SystemExit(1)")
        desk.process.ranks.wait(60.0)
        if now == 1.0:
            desk.desk._watch_trainer(now)
            desk.process._restart_at = None
    with pytest.raises(TrainerFailed) as error:
        desk.desk._watch_trainer(2.0)
    assert "died 2 times" in str(error.value) and "ordinals" not in str(error.value)


def test_R2_a_bad_batch_is_left_out_where_the_user_says_so_and_stays_out_after_a_restart(desk):
    desk.desk.bad_batches._skips = True
    fill(desk, [0, 1])
    desk.asks_from(0)
    desk.desk.ranks.decide(0.0)
    desk.desk.ranks.deal()
    desk.desk._from_trainer(b"trainer", StepDone(1, FIGURES, 0.1, {}), b"", 0.0)
    fill(desk, [2, 3])
    die_of(desk, 1, now=1.0)
    die_of(desk, 1, now=2.0)
    leases = desk.parts.leases
    assert (leases.num_trained, leases.num_given_up, leases.in_range(5 * 2 + 1)) == (2, 0, True)
    (skipped,) = [r for _, r in desk.parts.journal.read_all() if isinstance(r, BatchSkipped)]
    assert (skipped.version, [ordinal for ordinal, _ in skipped.groups]) == (1, [2, 3])
    assert "died 2 times" in skipped.reason
    plan = replay_plan(0, Frontier(), desk.parts.journal.read_all())
    assert ([step.version for step in plan.steps], plan.buffered, plan.filtered) == ([0], [], [2, 3])
    fill(desk, [4, 5], version=1)
    desk.asks_from(1, peer=b"next")
    desk.desk.ranks.decide(3.0)
    desk.desk.ranks.deal()
    assert [ordinal for ordinal, _ in desk.ranks._dealer.in_hand.groups] == [4, 5]
    desk.desk._from_trainer(b"next", StepDone(2, FIGURES, 0.1, {}), b"", 4.0)
    plan = replay_plan(0, Frontier(), desk.parts.journal.read_all())
    assert [[ordinal for ordinal, _ in step.groups] for step in plan.steps] == [[0, 1], [4, 5]]


def test_R10_a_signal_while_the_trainer_loads_ends_at_once_and_without_an_error(desk, caplog):
    desk.trainer()
    desk.stop.received = signal.SIGTERM
    assert desk.desk._over(0.0)
    assert not desk.process.running
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_U7_a_learner_without_a_generator_says_so_within_five_seconds_and_then_what_is_missing(desk, caplog):
    caplog.set_level("INFO")

    def said(now):
        caplog.clear()
        for tenth in range(int(now * 10) - 9, int(now * 10) + 1):
            desk.desk._say_waiting(tenth / 10)
        return [message for message in caplog.messages if "generator" in message]

    lines = [line for now in range(1, 6) for line in said(now)]
    assert len(lines) == 1
    assert f"no generator has connected to {desk.sockets[0].address} yet" in lines[0]
    assert "asyncrl-generator" in lines[0]
    assert [line for now in range(6, 36) for line in said(now)] == lines, "again after half a minute, not more often"
    desk.desk.generators.hello(b"g", hello("g"), 36.0)
    lines = [line for now in range(36, 42) for line in said(now)]
    assert lines == ["no generator can work yet: g starts its engine"]
    session = desk.desk.generators.session_of(b"g", 42.0)
    desk.desk.generators.beat(session, beat(), 42.0)
    lines = [line for now in range(42, 48) for line in said(now)]
    assert lines == ["no generator can work yet: g waits for the trainer, which is loading"]
    desk.desk.versions._planner.receivers["g"].held_version = 0
    assert [line for now in range(48, 120) for line in said(now)] == []


# -- R16, R21: what is remembered is bounded; newcomers are caught up together


def test_R16_proofs_and_counters_are_flat_over_many_versions_and_generators(parts):
    counters = parts.state.counters

    def live(versions, generators):
        for version in versions:
            parts.state.policy.newest = version
            for number in generators:
                parts.proofs.add(f"g{number}", 1 + version % 3, version)
        for number in generators:
            counters.beat(f"g{number}", 1, beat(tokens_generated=number))

    live(range(500), range(10))
    tracemalloc.start()
    live(range(500, 2_000), range(10))
    before, _ = tracemalloc.get_traced_memory()
    live(range(2_000, 12_000), range(10))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after <= before * 1.02 + 20_000
    live([12_000], range(3 * limits.MAX_GENERATORS))
    assert len(parts.proofs._of) == len(counters._newest) == limits.MAX_GENERATORS


def test_R16_what_a_running_lease_can_need_is_remembered_and_older_proofs_are_not(parts):
    session = parts.connect("g1")
    for version in range(1000):
        parts.proofs.add("g1", 1, version)
    parts.state.policy.newest = 999
    parts.proofs.check(train_group(0, version=999 - KEPT_VERSIONS + 1), session)
    with pytest.raises(ProtocolError, match="never proved"):
        parts.proofs.check(train_group(0, version=0), session)


def test_R21_newcomers_are_caught_up_in_cells_and_who_failed_alone():
    planner = SyncPlanner(run_epoch=1, run_name="r", timeout_s=10.0, tolerance=1e-4, cell_size=8)
    ready = SnapshotReady(0, manifest_of(0, [7]), [b"\1\0\0\0"], [b"\0\0\0\0"], 1.0)
    planner.joined("first", 1, 1, 0.0)
    planner.snapshot_ready(ready, 0.0)
    planner.advance(0.0)
    for number in range(50):
        planner.joined(f"new{number:02}", 1, 1, 0.0)
    planner.receivers["new00"].errors = 1
    planner.advance(0.0)
    caught_up = sorted(len(current.members) for current in planner.rounds.values() if current.catch_up)
    assert caught_up == [8, 8, 8, 8]
    assert all("new00" not in current.members for current in planner.rounds.values())
    for number in range(9, 50):
        planner.left(f"new{number:02}", 0.0, "left")
    for current in list(planner.rounds.values()):
        current.abandon(0.0, "over")
    for receiver in planner.receivers.values():
        receiver.errors = int(receiver.name == "new00")
    planner.advance(0.0)
    caught_up = sorted(sorted(current.members) for current in planner.rounds.values() if current.catch_up)
    assert ["new00"] in caught_up and all(len(names) == 1 or "new00" not in names for names in caught_up)
