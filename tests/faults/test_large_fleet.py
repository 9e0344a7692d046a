"""What a large fleet and a long run cost the desk: CPU time of its thread, files read, things kept in memory."""

from __future__ import annotations

from asyncrl.link.trainer_messages import TrainerHello, TrainerWelcome
from asyncrl.storage.journal import Journal
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import StepTaken
from tests.desk.test_desk import World as DeskWorld
from tests.replay.replay_making import make_group

# -- R17: a trainer that comes back is answered at once, however long the journal


def append_step(journal, version):
    """Two groups, and the step that trains them."""
    groups = [make_group(2 * version + number, version=version) for number in range(2)]
    for record in (*groups, StepTaken(version, tuple((group.ordinal, group.attempt) for group in groups))):
        journal.append(record, now=0.0)


def test_R17_a_trainer_that_comes_back_is_told_its_steps_without_a_look_at_the_disk(tmp_path, monkeypatch):
    world = DeskWorld(tmp_path)
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
    world.close()


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
