"""What a restarted learner reads from checkpoint and journal; `test_bound` does it in the middle of whole runs."""

from __future__ import annotations

import pytest

from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import GroupFiltered, GroupsDropped, MessageSeen, PromptGivenUp, StepTaken
from asyncrl.types import Frontier
from tests.replay.replay_making import make_group


def plan_for(folder, records, version, settled=(), damage=()):
    """Writes records to a journal, flips a byte in those listed in `damage`, and plans from a checkpoint."""
    journal = Journal.open(folder)
    locations = [journal.append(record, now=0.0) for record in records]
    journal.make_durable()
    [path] = folder.glob("*.segment")
    data = bytearray(path.read_bytes())
    for index in damage:
        data[locations[index].offset + 20] ^= 1
    path.write_bytes(data)
    plan = replay_plan(version, Frontier(0, settled), journal.read_all())
    batches = [[journal.read_group(place).ordinal for place in step.places] for step in plan.steps]
    journal.close()
    return plan, batches


def trained_run(num_steps):
    """Two groups and their step, over and over; the later group is trained first, as batches have an order."""
    records = []
    for version in range(num_steps):
        first, second = 2 * version, 2 * version + 1
        records += [make_group(first), make_group(second), StepTaken(version, ((second, 0), (first, 0)))]
    return records


def test_an_empty_journal_is_an_empty_plan():
    plan = replay_plan(0, Frontier(), [])
    assert (plan.steps, plan.buffered, plan.given_up, plan.seen, plan.broken_at) == ([], [], [], {}, None)


def test_steps_after_the_checkpoint_are_trained_again_in_their_order_and_the_rest_is_buffered(tmp_path):
    records = [*trained_run(4), make_group(8), make_group(9)]
    plan, batches = plan_for(tmp_path, records, version=2, settled=range(4))
    assert [step.version for step in plan.steps] == [2, 3]
    assert batches == [[5, 4], [7, 6]]
    assert plan.trained == [5, 4, 7, 6]
    assert plan.buffered == [make_group(8), make_group(9)]
    assert plan.broken_at is None


def test_a_trainer_that_died_alone_needs_the_steps_only(tmp_path):
    # The desk lives on and asks without a frontier; earlier steps are known from their records.
    plan, batches = plan_for(tmp_path, trained_run(3), version=2)
    assert (batches, plan.buffered) == ([[5, 4]], [])


def test_without_a_checkpoint_everything_is_trained_again(tmp_path):
    _, batches = plan_for(tmp_path, trained_run(3), version=0)
    assert batches == [[1, 0], [3, 2], [5, 4]]


def test_a_step_from_before_the_checkpoint_whose_record_is_lost_is_still_trained(tmp_path):
    plan, batches = plan_for(tmp_path, trained_run(3), version=2, settled=range(4), damage=[2])
    assert (batches, plan.buffered, plan.broken_at) == ([[5, 4]], [], None)


@pytest.mark.parametrize(
    ("damaged", "buffered"),
    [(5, [2, 3, 4, 5]), (3, [3, 4, 5])],
    ids=["its step record", "one of its groups"],
)
def test_a_step_that_cannot_be_read_back_ends_the_replay_and_later_groups_wait_again(tmp_path, damaged, buffered):
    plan, batches = plan_for(tmp_path, trained_run(3), version=0, damage=[damaged])
    assert (batches, plan.broken_at) == ([[1, 0]], 1)
    assert [group.ordinal for group in plan.buffered] == buffered


def test_a_step_taken_anew_replaces_the_old_one_and_all_that_followed_it(tmp_path):
    records = [*trained_run(3), make_group(6), StepTaken(1, ((6, 0), (2, 0)))]
    plan, batches = plan_for(tmp_path, records, version=0)
    assert (batches, plan.broken_at) == ([[1, 0], [6, 2]], None)
    assert [group.ordinal for group in plan.buffered] == [3, 4, 5]


def test_of_several_groups_of_a_prompt_the_one_that_was_not_dropped_counts(tmp_path):
    records = [
        make_group(0, attempt=0),
        GroupsDropped(((0, 0),)),
        make_group(0, attempt=1),
        make_group(1, attempt=0),
        GroupsDropped(((1, 0),)),
    ]
    plan, _ = plan_for(tmp_path, records, version=0)
    assert plan.buffered == [make_group(0, attempt=1)]


def test_prompts_given_up_and_messages_seen_are_remembered(tmp_path):
    records = [make_group(4, seq=11), PromptGivenUp(2), MessageSeen("g1", 1, 13), MessageSeen("g2", 5, 0)]
    plan, _ = plan_for(tmp_path, records, version=0)
    assert plan.given_up == [2]
    assert plan.seen == {("g1", 1): {11, 13}, ("g2", 5): {0}}


def test_what_was_filtered_is_neither_buffered_nor_leased_again_and_its_message_was_seen(tmp_path):
    records = [
        make_group(0, attempt=0, seq=1),
        GroupsDropped(((0, 0),)),
        GroupFiltered("g1", 1, 2, 0, 1),  # its second group had equal rewards
        GroupFiltered("g1", 1, 3, 1, 0),
        make_group(2, seq=4),
    ]
    plan, _ = plan_for(tmp_path, records, version=0)
    assert plan.filtered == [0, 1]
    assert plan.buffered == [make_group(2, seq=4)]
    assert plan.seen == {("g1", 1): {1, 2, 3, 4}}


def test_what_was_filtered_stays_so_when_the_record_that_dropped_its_first_group_is_damaged(tmp_path):
    dropped = GroupsDropped(((0, 0), (7, 0), (8, 0), (9, 0)))
    records = [make_group(0), dropped, GroupFiltered("g1", 1, 2, 0, 1)]
    plan, _ = plan_for(tmp_path, records, version=0, damage=[1])
    assert (plan.buffered, plan.filtered) == ([], [0])
