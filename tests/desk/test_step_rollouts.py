"""Rollouts of a step on their way through the desk: with their generator and payload, and never in anybody's way."""

from __future__ import annotations

import pytest

from asyncrl.desk.prompts import AHEAD, LeasedPrompts, MadeAtOnce
from asyncrl.link.trainer_messages import BatchRequest, StepDone, StepRollouts
from asyncrl.types import LeaseKey, LeaseKind
from tests.desk.desk_parts import Prompts, make_parts, small_config, train_group
from tests.desk.test_desk import FIGURES, World


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def fill(world, ordinals, name="g1"):
    """Groups of these ordinals come in from one generator."""
    session = world.parts.connect(name)
    world.parts.leases.grant(name, 0, len(ordinals), 0, 0.0)
    for seq, ordinal in enumerate(ordinals, start=1):
        assert world.parts.deliver(session, train_group(ordinal), seq) is None
    world.parts.make_durable()


def deal(world, version=0, peer=b"trainer"):
    """A trainer comes up and gets the batch of `version`."""
    world.asks_from(version, peer=peer)
    world.desk.ranks.decide(0.0)
    world.desk.ranks.deal()


def say(world, message):
    world.desk._from_trainer(b"trainer", message, b"", 0.0)


def entries(world):
    return [(entry.rollout, entry.generator, entry.payload) for job in world.rollouts.jobs for entry in job.rollouts]


def test_they_are_passed_on_unread_with_generator_and_payload(world):
    fill(world, [0], "g1")
    fill(world, [1], "g2")
    deal(world)
    say(world, StepRollouts(1, [1, 0, 1], [b"a", b"b", b"c"]))
    say(world, StepDone(1, FIGURES, 0.1, {}))
    assert [(job.kind, job.version) for job in world.rollouts.jobs] == [(LeaseKind.TRAIN, 1)]
    assert entries(world) == [(b"a", "g2", {"index": 1}), (b"b", "g1", {"index": 0}), (b"c", "g2", {"index": 1})]


def test_of_a_step_that_is_made_again_after_a_restart_the_generator_comes_from_the_journal(world):
    fill(world, [0, 1])
    deal(world)
    say(world, StepRollouts(1, [0], [b"a"]))
    say(world, StepDone(1, FIGURES, 0.1, {}))
    world.ranks.lost()
    world.ranks._payloads.clear()  # as in another life of the desk
    world.asks_from(0)
    world.desk.ranks.deal()
    say(world, StepRollouts(1, [0], [b"again"]))
    assert entries(world) == [(b"a", "g1", {"index": 0}), (b"again", "g1", None)]


def test_those_of_a_step_that_nobody_has_in_hand_are_left_out(world):
    fill(world, [0, 1])
    say(world, StepRollouts(1, [0], [b"early"]))
    deal(world)
    say(world, StepRollouts(2, [0], [b"of another step"]))
    say(world, StepDone(1, FIGURES, 0.1, {}))
    say(world, BatchRequest(0, 1))
    say(world, StepRollouts(1, [0], [b"late"]))
    assert world.rollouts.jobs == []


def test_the_payload_of_a_group_is_there_until_its_step_is_decided(tmp_path):
    """Prompts that nobody needs are let go of now and then; those of groups in the buffer are not among them."""
    parts = make_parts(tmp_path, small_config(run__steps=10_000, learner__groups_per_step=200))
    try:
        leases = parts.leases
        prompts = LeasedPrompts(MadeAtOnce(Prompts()), leases)
        leases.grant("g", 0, 2, 0, 0.0)
        keys = [LeaseKey(LeaseKind.TRAIN, ordinal, 0) for ordinal in (0, 1)]
        for key in keys:
            prompts.is_there(key.ordinal, 0.0)
            leases.accept(key)
        leases.train(keys[:1])
        for ordinal in range(2, 2 * AHEAD + 2):
            prompts.is_there(ordinal, 0.0)
        assert 0 not in prompts, "they were looked through"
        assert prompts.payloads([0, 1]) == {1: {"index": 1}}
    finally:
        parts.journal.close()
