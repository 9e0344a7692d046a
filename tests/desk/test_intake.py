"""Results on their way in: checked, journalled, acknowledged, buffered; in this order and each at most once."""

from __future__ import annotations

import math

import msgpack
import numpy as np
import pytest

from asyncrl.desk.intake import Taken
from asyncrl.errors import JournalError
from asyncrl.link.codec import decode_body
from asyncrl.link.messages import Ack, GroupResult, LeaseFailed, Nack
from asyncrl.link.rollouts import result_to_group
from asyncrl.link.wire_types import FailureReason
from asyncrl.replay.filtering import MAX_FILTERED_PER_GROUP
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.journal import DURABLE_AFTER_S
from asyncrl.storage.records import GroupFiltered, MessageSeen, PromptGivenUp, StoredGroup
from asyncrl.types import Frontier, LeaseKey, LeaseKind, VersionSpan
from tests.desk.desk_parts import eval_group, flat_group, make_parts, make_rollout, small_config, train_group


@pytest.fixture
def parts(tmp_path):
    parts = make_parts(tmp_path)
    yield parts
    parts.journal.close()


@pytest.fixture
def session(parts):
    return parts.connect()


def lease(parts, count: int = 1, now: float = 0.0):
    return parts.leases.grant("g1", 0, count, 0, now)


def records(parts, kind):
    return [record for _, record in parts.journal.read_all() if isinstance(record, kind)]


def test_a_result_is_acknowledged_only_after_the_journal_is_durable(parts, session):
    lease(parts)
    assert parts.deliver(session, train_group(0), seq=1) is None
    assert parts.sessions.ack(session).acked_seq == 0
    assert records(parts, StoredGroup) == []
    assert parts.make_durable() == [session]
    assert parts.sessions.ack(session).acked_seq == 1
    assert [record.ordinal for record in records(parts, StoredGroup)] == [0]


def full(fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_nothing_is_acknowledged_when_the_disk_fails(tmp_path):
    parts = make_parts(tmp_path, flush=full)
    session = parts.connect()
    lease(parts)
    parts.deliver(session, train_group(0), seq=1)
    with pytest.raises(JournalError, match="No space left"):
        parts.make_durable()
    assert parts.sessions.ack(session).acked_seq == 0
    assert parts.acknowledgements.take_sessions() == []
    parts.journal.close()


def test_making_durable_is_put_off_until_it_is_due_so_that_results_share_it(parts, session):
    lease(parts, 2)
    parts.deliver(session, train_group(0), seq=1, now=10.0)
    parts.acknowledgements.make_durable_if_due(10.0)
    assert parts.acknowledgements.take_sessions() == []
    parts.deliver(session, train_group(1), seq=2, now=10.0)
    parts.acknowledgements.make_durable_if_due(10.0 + DURABLE_AFTER_S)
    assert parts.acknowledgements.take_sessions() == [session]
    assert parts.sessions.ack(session).acked_seq == 2


def test_an_accepted_group_is_buffered_and_counted_by_its_rollouts(parts, session):
    lease(parts)
    parts.deliver(session, train_group(0, num_rollouts=3), seq=1)
    parts.make_durable()
    assert len(parts.buffer) == 1
    assert parts.leases.num_running == 0
    assert parts.totals.rollouts_acked == 3


def test_a_result_sent_twice_is_stored_once_and_acknowledged_again(parts, session):
    lease(parts)
    parts.deliver(session, train_group(0), seq=1)
    assert parts.deliver(session, train_group(0), seq=1) is None  # still being written: no answer yet
    parts.make_durable()
    answer = parts.deliver(session, train_group(0), seq=1)
    assert isinstance(answer, Ack)
    assert answer.acked_seq == 1
    assert len(records(parts, StoredGroup)) == len(parts.buffer) == 1


def test_a_second_group_for_a_prompt_is_acknowledged_and_forgotten(parts, session):
    """The lease expired, another generator was faster: the late one is no use, but must not be sent for ever."""
    lease(parts)
    parts.deliver(session, train_group(0), seq=1)
    other = parts.connect("g2")
    assert parts.deliver(other, train_group(0), seq=1) is None
    parts.make_durable()
    assert parts.sessions.ack(other).acked_seq == 1
    assert len(parts.buffer) == 1
    assert [record.generator_id for record in records(parts, MessageSeen)] == ["g2"]


def test_a_faster_group_cancels_the_lease_that_runs_elsewhere(parts, session):
    (first,) = lease(parts)
    parts.leases.expire(first.deadline_at)
    (second,) = parts.leases.grant("g2", 0, 1, 0, first.deadline_at + 100.0)
    assert parts.take(session, train_group(0), seq=1).superseded == second


def spoil_prompt(group):
    group.prompt_token_ids = np.array([1, 2, 3], dtype=np.int32)


def spoil_token(group):
    group.rollouts[0].token_ids[1] = 50


def spoil_logprob(group):
    group.rollouts[1].behaviour_logprobs[0] = math.nan


def spoil_reward(group):
    group.rollouts[2].reward = math.inf


def spoil_version(group):
    group.rollouts[3].version_spans = (VersionSpan(0, 3, 1),)


def spoil_size(group):
    group.rollouts.append(make_rollout())


def leave_too_few(group):
    del group.rollouts[1:]


@pytest.mark.parametrize(
    "spoil",
    [spoil_prompt, spoil_token, spoil_logprob, spoil_reward, spoil_version, spoil_size, leave_too_few],
    ids=lambda spoil: spoil.__name__,
)
def test_a_group_that_does_not_fit_is_refused_for_good_and_its_prompt_leased_again(parts, session, spoil):
    lease(parts)
    group = train_group(0)
    spoil(group)
    answer = parts.deliver(session, group, seq=1)
    assert isinstance(answer, Nack)
    assert answer.code == "invalid"
    assert "group train 0" in answer.reason or "rollouts" in answer.reason
    assert (len(parts.buffer), parts.leases.num_running) == (0, 0)
    assert parts.totals.rollouts_failed == {"invalid": 4}
    assert isinstance(parts.deliver(session, group, seq=1), Nack)  # repeated: the same answer again
    (again,) = lease(parts, now=100.0)
    assert (again.key.ordinal, again.key.attempt) == (0, 1)


@pytest.mark.parametrize(
    ("proof", "taken"),
    [(("g1", 1, 2), True), (("g1", 1, 1), False), (("g1", 2, 2), False), (("g2", 1, 2), False), (None, False)],
    ids=["its own", "of another version", "of another incarnation", "of another generator", "none"],
)
def test_tokens_are_taken_of_versions_alone_that_this_generator_proved_to_this_learner(parts, session, proof, taken):
    parts.state.policy.newest = 2
    if proof:
        parts.proofs.add(*proof)
    lease(parts, 1)
    answer = parts.deliver(session, train_group(0, version=2), seq=1)
    assert (answer is None) == taken
    if not taken:
        assert isinstance(answer, Nack) and "versions [2], which g1 (incarnation 1) never proved" in answer.reason


def test_what_was_proven_to_an_earlier_learner_of_the_run_is_taken(parts, session):
    parts.state.policy.newest, parts.state.policy.proven_before = 3, 2
    lease(parts, 2)
    assert parts.deliver(session, train_group(0, version=2), seq=1) is None
    assert isinstance(parts.deliver(session, train_group(1, version=3), seq=2), Nack)


def test_groups_that_were_never_leased_are_refused(parts, session):
    beyond_the_run, not_granted = train_group(10), train_group(3)
    for seq, group in enumerate((beyond_the_run, not_granted), start=1):
        assert isinstance(parts.deliver(session, group, seq), Nack)
    assert len(parts.buffer) == 0


def test_a_group_that_lost_half_of_its_rollouts_is_still_taken(parts, session):
    lease(parts)
    assert parts.deliver(session, train_group(0, num_rollouts=2), seq=1) is None
    assert len(parts.buffer) == 1


def failure(ordinal: int, seq: int, reason: str = "reward_error", attempt: int = 0) -> LeaseFailed:
    return LeaseFailed(seq, 1, LeaseKind.TRAIN, ordinal, attempt, FailureReason(reason), "why")


def test_a_failed_lease_is_counted_by_reason_acknowledged_and_leased_again(parts, session):
    lease(parts)
    assert parts.failed(session, failure(0, seq=1), 0.0) == Taken()
    parts.make_durable()
    assert parts.sessions.ack(session).acked_seq == 1
    assert parts.totals.rollouts_failed == {"reward_error": 4}
    assert len(parts.buffer) == 0
    (again,) = lease(parts, now=100.0)
    assert (again.key.ordinal, again.key.attempt) == (0, 1)


def test_a_reason_of_failure_that_this_version_does_not_know_counts_as_the_engines(parts, session):
    lease(parts)
    body = msgpack.packb([1, 1, "train", 0, 0, "x" * 1000, "why"])
    parts.failed(session, decode_body(LeaseFailed, body), 0.0)
    assert parts.totals.rollouts_failed == {"engine": 4}


def test_a_prompt_that_always_fails_is_given_up_in_the_journal(parts, session):
    """Where its generator finishes others in between."""
    now = 0.0
    for attempt in range(3):
        now += 1000.0
        assert [record.key.ordinal for record in lease(parts, now=now)] == [0]
        (other,) = lease(parts, now=now)
        parts.deliver(session, train_group(other.key.ordinal), 2 * attempt + 1, now)
        parts.failed(session, failure(0, seq=2 * attempt + 2, attempt=attempt), now)
    parts.intake.note_given_up(now)
    parts.make_durable()
    assert records(parts, PromptGivenUp) == [PromptGivenUp(0)]


def test_evaluated_groups_reach_the_evaluation_once_durable_and_never_the_buffer(parts, session):
    parts.leases.start_eval(0, 3, 60.0, 0.0)
    granted = parts.leases.grant("g1", 0, 2, 0, 0.0)
    assert [record.key.kind for record in granted] == [LeaseKind.EVAL] * 2
    parts.deliver(session, eval_group(0, prompt=40), seq=1)
    assert parts.acknowledgements.take_evaluated() == []
    parts.make_durable()
    assert [(group.key, generator) for group, generator in parts.acknowledgements.take_evaluated()] == [
        (LeaseKey(LeaseKind.EVAL, 0, 0), "g1")
    ]
    assert len(parts.buffer) == 0
    assert parts.totals.rollouts_acked == 0


def test_an_evaluated_group_with_tokens_of_another_version_is_refused(parts, session):
    parts.state.policy.newest = 5
    parts.proofs.add("g1", 1, 1)
    parts.leases.start_eval(0, 3, 60.0, 0.0)
    parts.leases.grant("g1", 0, 1, 0, 0.0)
    answer = parts.deliver(session, eval_group(0, prompt=40, version=1), seq=1)
    assert isinstance(answer, Nack)


def test_an_evaluated_group_of_an_evaluation_that_is_over_is_acknowledged_and_counts_for_nothing(
    parts, session, caplog
):
    """A restarted learner begins its evaluation anew: what comes late of the old one is no fault of anybody."""
    assert parts.deliver(session, eval_group(7, prompt=40), seq=1) is None
    parts.leases.start_eval(0, 3, 60.0, 0.0)
    assert parts.deliver(session, eval_group(7, prompt=40), seq=2) is None
    assert parts.make_durable() == [session]
    assert parts.sessions.ack(session).acked_seq == 2
    assert parts.acknowledgements.take_evaluated() == []
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_what_is_over_the_credit_is_ignored_and_comes_again(tmp_path):
    parts = make_parts(tmp_path, small_config(), credit_bytes=400)
    session = parts.connect()
    lease(parts, 2)
    parts.deliver(session, train_group(0), seq=1)
    parts.deliver(session, train_group(1), seq=2)
    parts.make_durable()
    assert parts.sessions.ack(session).acked_seq == 1
    assert parts.leases.num_running == 1
    parts.deliver(session, train_group(1), seq=2)
    parts.make_durable()
    assert parts.sessions.ack(session).acked_seq == 2
    parts.journal.close()


# -- dynamic sampling


@pytest.fixture
def filtering(tmp_path):
    parts = make_parts(tmp_path, small_config(algorithm__dynamic_sampling=True))
    yield parts
    parts.journal.close()


def test_a_group_with_equal_rewards_is_recorded_acknowledged_and_not_trained_on(filtering):
    session = filtering.connect()
    assert [record.key.ordinal for record in lease(filtering, 4)] == [0, 1, 2, 3]
    assert filtering.deliver(session, flat_group(0), seq=1) is None
    assert filtering.deliver(session, train_group(1), seq=2) is None
    assert filtering.sessions.ack(session).acked_seq == 0
    assert filtering.make_durable() == [session]
    assert filtering.sessions.ack(session).acked_seq == 2
    assert records(filtering, GroupFiltered) == [GroupFiltered("g1", 1, 1, 0, 0)]
    assert [record.ordinal for record in records(filtering, StoredGroup)] == [1]
    assert len(filtering.buffer) == 1
    totals = filtering.totals
    assert (totals.groups_filtered, totals.tokens_filtered, totals.rollouts_acked) == (1, 12, 8)
    assert [record.key.ordinal for record in lease(filtering, 9)] == [4]  # in its place: the ceiling is 4


def test_a_filtered_group_that_comes_again_is_acknowledged_and_changes_nothing(filtering):
    session, other = filtering.connect(), filtering.connect("g2")
    lease(filtering)
    filtering.deliver(session, flat_group(0), seq=1)
    filtering.make_durable()
    assert isinstance(filtering.deliver(session, flat_group(0), seq=1), Ack)
    assert filtering.deliver(other, train_group(0), seq=1) is None  # the same prompt, late, with a signal
    filtering.make_durable()
    assert filtering.sessions.ack(other).acked_seq == 1
    assert len(filtering.buffer) == 0
    assert filtering.leases.num_filtered == 1


def test_a_restarted_learner_neither_trains_nor_leases_what_was_filtered(filtering, tmp_path):
    session = filtering.connect()
    lease(filtering, 3)
    filtering.deliver(session, flat_group(1), seq=1)
    filtering.deliver(session, train_group(0), seq=2)
    filtering.make_durable()
    plan = replay_plan(0, Frontier(), filtering.journal.read_all())
    filtering.journal.close()
    again = make_parts(tmp_path, filtering.config, run_epoch=2)
    again.leases.restore(None, plan.trained, [group.key for group in plan.buffered], plan.given_up, plan.filtered)
    assert [group.ordinal for group in plan.buffered] == [0]
    assert [record.key.ordinal for record in again.leases.grant("g1", 0, 9, 0, 0.0)] == [2, 3, 4]
    assert plan.seen == {("g1", 1): {1, 2}}
    again.journal.close()


def test_a_group_that_was_not_durable_when_the_learner_died_comes_again_and_is_judged_again(filtering, tmp_path):
    session = filtering.connect()
    lease(filtering)
    filtering.deliver(session, flat_group(0), seq=1)
    filtering.journal.close()  # before it was durable
    again = make_parts(tmp_path, filtering.config, run_epoch=2)
    assert replay_plan(0, Frontier(), again.journal.read_all()).filtered == []
    session = again.connect()
    again.deliver(session, flat_group(0), seq=1)
    again.make_durable()
    assert again.sessions.ack(session).acked_seq == 1
    assert [record.ordinal for record in records(again, GroupFiltered)] == [0]
    again.journal.close()


def test_rollouts_whose_reward_failed_are_not_there_and_equal_nothing(filtering):
    session = filtering.connect()
    lease(filtering, 2)
    lost_one = flat_group(0)
    del lost_one.rollouts[0]
    filtering.deliver(session, lost_one, seq=1)
    filtering.failed(session, failure(1, seq=2), 0.0)
    assert filtering.leases.num_filtered == 1
    assert [record.key for record in lease(filtering, 1, now=100.0)] == [LeaseKey(LeaseKind.TRAIN, 1, 1)]


def test_without_dynamic_sampling_equal_rewards_are_trained_on(parts, session):
    lease(parts)
    parts.deliver(session, flat_group(0), seq=1)
    assert len(parts.buffer) == 1


def test_evaluations_are_never_filtered(filtering):
    session = filtering.connect()
    filtering.leases.start_eval(0, 3, 60.0, 0.0)
    filtering.leases.grant("g1", 0, 1, 0, 0.0)
    filtering.deliver(session, eval_group(0, prompt=40), seq=1)
    filtering.make_durable()
    assert len(filtering.acknowledgements.take_evaluated()) == 1


def test_a_task_whose_rewards_are_always_equal_is_said_once_and_trained_on(filtering, caplog):
    session, now, seq, trained = filtering.connect(), 0.0, 0, []
    limit = MAX_FILTERED_PER_GROUP * 2
    for version in range(2):
        while len(filtering.buffer) < 2:
            (record,) = filtering.leases.grant("g1", version, 1, version, now)
            seq += 1
            filtering.state.policy.newest = version
            filtering.proofs.add("g1", 1, version)
            filtering.deliver(session, flat_group(record.key.ordinal, version=version), seq)
            filtering.make_durable()
        assert filtering.leases.num_filtered == limit * (version + 1)
        batch = filtering.buffer.take(version)
        filtering.leases.train(group.key for group in batch)
        filtering.intake.batch_taken()
        trained += [group.ordinal for group in batch]
    assert trained == [32, 33, 66, 67]
    (warning,) = [record.message for record in caplog.records if "equal rewards" in record.message]
    assert "32 groups had equal rewards and were filtered, 0 had not" in warning


# -- greedy baseline


@pytest.mark.parametrize(
    ("advantage", "baseline", "says"),
    [("remax", None, "no reward of a greedy completion"), ("group", 0.5, "the lease asked for none")],
)
def test_a_baseline_is_there_exactly_when_it_was_asked_for(tmp_path, advantage, baseline, says):
    parts = make_parts(tmp_path, small_config(algorithm__advantage=advantage))
    session = parts.connect()
    lease(parts)
    group = train_group(0)
    group.baseline_reward = baseline
    answer = parts.deliver(session, group, seq=1)
    assert isinstance(answer, Nack)
    assert says in answer.reason
    assert len(parts.buffer) == 0
    parts.journal.close()


def test_the_baseline_is_in_the_journal_and_an_evaluation_needs_none(tmp_path):
    parts = make_parts(tmp_path, small_config(algorithm__advantage="remax"))
    session = parts.connect()
    lease(parts)
    group = train_group(0)
    group.baseline_reward = 0.25
    assert parts.deliver(session, group, seq=1) is None
    parts.leases.start_eval(0, 3, 60.0, 0.0)
    parts.leases.grant("g1", 0, 1, 0, 0.0)
    assert parts.deliver(session, eval_group(0, prompt=40), seq=2) is None
    parts.make_durable()
    (stored,) = records(parts, StoredGroup)
    assert result_to_group(decode_body(GroupResult, stored.body)).baseline_reward == 0.25
    parts.journal.close()


def test_an_evaluated_group_has_as_many_completions_as_were_leased(tmp_path):
    parts = make_parts(tmp_path, small_config(eval__samples=2, eval__temperature=1.0))
    try:
        session = parts.connect()
        parts.leases.start_eval(0, 3, 60.0, 0.0)
        parts.leases.grant("g1", 0, 2, 0, 0.0)
        whole, short = eval_group(0, prompt=40), eval_group(1, prompt=40)
        whole.rollouts = whole.rollouts * 2
        assert parts.deliver(session, whole, seq=1) is None
        assert isinstance(parts.deliver(session, short, seq=2), Nack)
        parts.make_durable()
        assert [len(group.rollouts) for group, _ in parts.acknowledgements.take_evaluated()] == [2]
    finally:
        parts.journal.close()
