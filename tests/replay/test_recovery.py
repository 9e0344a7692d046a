"""What a restarted learner reads from checkpoint and journal; `test_bound` does it in the middle of whole runs."""

from __future__ import annotations

import random

import pytest

from asyncrl.replay.recovery import replay_plan, steps_to_repeat
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import BatchSkipped, GroupFiltered, GroupsDropped, MessageSeen, PromptGivenUp, StepTaken
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


class RandomRun:
    """A journal to which a run appends what its seed says, steps of two groups, over several lives of the learner."""

    def __init__(self, folder, seed):
        self.folder, self.rng = folder, random.Random(seed)
        self.version = self.next_ordinal = self.kept = 0
        self.buffered, self.batches = [], {}
        self.open()

    def open(self):
        self.journal = Journal.open(self.folder, segment_bytes=400, flush=lambda fd: None)

    def append(self, record):
        self.journal.append(record, now=0.0)
        self.journal.make_durable()

    def go_on(self):
        if len(self.buffered) < 2:
            self.append(make_group(self.next_ordinal))
            self.buffered.append((self.next_ordinal, 0))
            self.next_ordinal += 1
            return
        self.rng.choice([self.step] * 4 + [self.drop, self.skip, self.step_anew, self.checkpoint, self.live_again])()

    def step(self):
        batch = tuple(self.buffered[:2])
        del self.buffered[:2]
        self.append(StepTaken(self.version, batch))
        self.batches[self.version] = batch
        self.version += 1

    def drop(self):
        self.append(GroupsDropped((self.buffered.pop(),)))

    def skip(self):
        if self.version > self.kept:
            self.version -= 1
            self.append(BatchSkipped(self.version, self.batches[self.version], "it kills the trainer"))

    def step_anew(self):
        """As after a batch that could not be read back: it and all later steps are void, and their groups wait."""
        first = self.rng.randint(self.kept, self.version)
        for version in range(first, self.version):
            self.buffered += self.batches[version]
        self.rng.shuffle(self.buffered)
        self.version = first
        self.step()

    def checkpoint(self):
        self.kept = self.version
        self.journal.delete_before(self.kept)

    def live_again(self):
        self.journal.close()
        self.open()


@pytest.mark.parametrize("seed", range(6))
def test_a_running_journal_knows_the_steps_that_reading_it_would_tell(tmp_path, seed):
    run = RandomRun(tmp_path, seed)
    for _ in range(200):
        run.go_on()
        for version in range(run.kept, run.version + 1):
            assert steps_to_repeat(version, run.journal) == (
                replay_plan(version, Frontier(), run.journal.read_all()).steps
            ), f"from version {version} on"
    assert run.version > 10
    run.checkpoint()
    assert len(run.journal.index) == len(run.buffered)  # what is left to be trained
    run.journal.close()


def test_a_trainer_that_begins_before_the_oldest_checkpoint_is_told_from_the_disk(tmp_path):
    journal = Journal.open(tmp_path)
    for record in trained_run(4):
        journal.append(record, now=0.0)
    journal.make_durable()
    journal.delete_before(3)
    assert journal.index.begins_at == 3
    assert [step.version for step in steps_to_repeat(3, journal)] == [3]
    assert [step.version for step in steps_to_repeat(1, journal)] == [1, 2, 3]
    journal.close()


def test_a_step_taken_anew_is_followed_by_none_of_before_also_where_one_between_them_is_damaged(tmp_path):
    places = []
    journal = Journal.open(tmp_path)
    places += [journal.append(record, now=0.0) for record in trained_run(4)]
    journal.make_durable()
    journal.close()
    [path] = tmp_path.glob("*.segment")
    data = bytearray(path.read_bytes())
    data[places[8].offset + 20] ^= 1  # the step of version 2
    path.write_bytes(data)
    journal = Journal.open(tmp_path)
    journal.append(StepTaken(1, ((4, 0), (2, 0))), now=0.0)
    journal.append(StepTaken(2, ((3, 0), (5, 0))), now=0.0)
    journal.make_durable()
    steps = steps_to_repeat(0, journal)
    assert steps == replay_plan(0, Frontier(), journal.read_all()).steps
    assert [step.groups for step in steps] == [((1, 0), (0, 0)), ((4, 0), (2, 0)), ((3, 0), (5, 0))]
    journal.close()
