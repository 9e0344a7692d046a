"""Which version the run is at: what each event changes, and what it leaves."""

from __future__ import annotations

from asyncrl.desk.run_state import PolicyVersions


def test_a_learner_that_starts_again_is_at_its_checkpoint_and_takes_what_was_proven_before():
    first = PolicyVersions.at_start(0, 0, run_epoch=1)
    assert (first.resumed_from, first.trained, first.newest, first.proven_before) == (0, 0, 0, -1)
    again = PolicyVersions.at_start(4, 7, run_epoch=2)
    assert (again.resumed_from, again.trained, again.newest, again.proven_before) == (4, 4, 7, 7)


def test_a_trainer_trains_again_up_to_the_journals_end_or_to_what_was_trained_in_this_life():
    policy = PolicyVersions.at_start(4, 7, run_epoch=2)
    assert policy.trainer_started(4, 3) == policy.replay_to == 7
    policy.batch_decided(7)
    policy.step_made(8)
    assert policy.trainer_started(4, 4) == 8
    assert policy.newest == 8


def test_a_batch_that_was_decided_in_this_life_and_not_trained_is_new():
    policy = PolicyVersions.at_start(0, 0, run_epoch=1)
    policy.batch_decided(0)
    policy.step_made(1)
    policy.batch_decided(1)
    assert policy.trainer_started(0, 2) == 1, "the second step is published when it is made"


def test_versions_never_fall():
    policy = PolicyVersions()
    policy.step_made(3)
    policy.published(2)
    policy.step_made(1)
    policy.published(1)
    assert (policy.trained, policy.newest) == (3, 2)
