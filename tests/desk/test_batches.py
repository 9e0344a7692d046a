"""Which batch a rank gets, and when: decided once, dealt to all ranks, repeated from the journal after a restart."""

from __future__ import annotations

import pytest

from asyncrl.desk.batches import BatchDealer, DecidedStep, _shards
from asyncrl.desk.run_state import PolicyVersions
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StepTaken
from asyncrl.types import Frontier
from tests.replay.replay_making import make_group


@pytest.fixture
def journal(tmp_path):
    journal = Journal.open(tmp_path / "journal")
    yield journal
    journal.close()


class Sent:
    """Takes what the dealer sends."""

    def __init__(self):
        self.batches = {}

    def __call__(self, rank, batch):
        self.batches[rank] = batch


def step(version: int, *ordinals: int) -> DecidedStep:
    return DecidedStep(version, [make_group(ordinal) for ordinal in ordinals], f"state {version}".encode())


def test_a_batch_needs_a_decision_only_when_every_rank_waits_for_the_same_version(journal):
    dealer = BatchDealer(journal, PolicyVersions(), checkpoint_every=0, last_step=10)
    dealer.world_size = 2
    dealer.request(0, 3)
    assert dealer.needs_decision() is None
    dealer.request(1, 2)
    assert dealer.needs_decision() is None
    dealer.request(1, 3)
    assert dealer.needs_decision() == 3


def test_a_decided_batch_is_dealt_once_per_request_and_again_to_who_asks_again(journal):
    dealer, sent = BatchDealer(journal, PolicyVersions(), checkpoint_every=0, last_step=10), Sent()
    dealer.request(0, 0)
    assert not dealer.deal(sent)
    dealer.decide(step(0, 4, 2))
    assert dealer.needs_decision() is None
    assert dealer.deal(sent)
    assert not dealer.deal(sent)
    assert sent.batches[0].groups == [b"body 2.0", b"body 4.0"]
    assert sent.batches[0].desk_state == b"state 0"
    dealer.request(0, 0)  # it got lost, or the trainer died and lives again
    assert dealer.needs_decision() is None
    assert dealer.deal(Sent())


def test_nothing_is_decided_beyond_the_last_step(journal):
    dealer = BatchDealer(journal, PolicyVersions(), checkpoint_every=0, last_step=2)
    dealer.request(0, 2)
    assert dealer.needs_decision() is None


def test_checkpoints_are_asked_for_every_so_many_versions_but_not_for_the_last(journal):
    dealer, saved = BatchDealer(journal, PolicyVersions(), checkpoint_every=2, last_step=6), []
    for version in range(6):
        sent = Sent()
        dealer.request(0, version)
        dealer.decide(step(version, version))
        dealer.deal(sent)
        if sent.batches[0].checkpoint:
            saved.append(version + 1)
    assert saved == [2, 4]


def test_after_a_restart_the_steps_of_the_journal_come_first_and_only_the_last_is_published(journal):
    for version in range(3):
        for ordinal in (2 * version, 2 * version + 1):
            journal.append(make_group(ordinal), 0.0)
        journal.append(StepTaken(version, ((2 * version + 1, 0), (2 * version, 0))), 0.0)
    journal.make_durable()
    dealer = BatchDealer(journal, PolicyVersions(replay_to=3), checkpoint_every=1, last_step=10)
    dealer.train_again(replay_plan(1, Frontier(2), journal.read_all()).steps)
    dealt = []
    for version in (1, 2):
        sent = Sent()
        dealer.request(0, version)
        assert dealer.needs_decision() is None
        assert dealer.deal(sent)
        dealt.append(sent.batches[0])
    assert [batch.groups for batch in dealt] == [[b"body 2.0", b"body 3.0"], [b"body 4.0", b"body 5.0"]]
    assert [batch.publish for batch in dealt] == [False, True]
    # Without the desk's state of that moment there is nothing a checkpoint could be made of.
    assert [(batch.checkpoint, batch.desk_state) for batch in dealt] == [(False, b"")] * 2
    dealer.request(0, 3)
    assert dealer.needs_decision() == 3


def test_a_trainer_that_died_is_forgotten_until_it_asks_again(journal):
    dealer = BatchDealer(journal, PolicyVersions(), checkpoint_every=0, last_step=10)
    dealer.request(0, 0)
    dealer.forget_ranks()
    assert dealer.needs_decision() is None


def test_shards_are_even_in_tokens_and_in_order_of_ordinals_whatever_the_order_of_arrival():
    lengths = {0: 10, 1: 90, 2: 40, 3: 30, 4: 20}
    groups = [make_group(ordinal, num_tokens=(tokens,)) for ordinal, tokens in lengths.items()]
    shards = _shards(groups, 2)
    assert shards == _shards(groups[::-1], 2)
    assert shards == [[b"body 0.0", b"body 1.0"], [b"body 2.0", b"body 3.0", b"body 4.0"]]
    assert _shards(groups, 1) == [[f"body {ordinal}.0".encode() for ordinal in range(5)]]
