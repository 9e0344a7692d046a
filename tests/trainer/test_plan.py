"""The plan of a step: what goes together, what is counted, and what it depends on."""

import numpy as np
import pytest

from asyncrl.errors import NonFiniteError
from asyncrl.trainer.plan import Planner, RewardTable
from tests.trainer.tiny import make_group, make_rollout, random_groups


def make_planner(*, num_mini_batches=1, seed=0):
    return Planner(seed=seed, num_mini_batches=num_mini_batches, micro_batch_tokens=60, shared_row_tokens=0)


def all_active(groups):
    return np.ones(len(groups), dtype=bool)


def rollouts_of(mini_batch):
    return sorted(int(index) for batch in mini_batch.micro_batches for index in batch.rollout_index)


def test_the_table_holds_rewards_in_the_order_of_the_groups():
    groups = [
        make_group(0, [1], [make_rollout([1], reward=1.0), make_rollout([2], reward=0.25)]),
        make_group(1, [1], [make_rollout([3], reward=0.5)]),
    ]
    groups[1].baseline_reward = 0.75
    table = RewardTable.of(groups)
    assert table.rewards.tolist() == [1.0, 0.25, 0.5]
    assert table.group_index.tolist() == [0, 0, 1]
    assert table.num_groups == 2
    assert np.isnan(table.baselines[0]) and table.baselines[1] == 0.75


def test_every_rollout_is_in_one_mini_batch_under_its_index_in_the_whole_batch():
    groups = random_groups(7, 3)
    mini_batches = make_planner(num_mini_batches=3).mini_batches(groups, all_active(groups), 2)
    assert sorted(sum((rollouts_of(mini_batch) for mini_batch in mini_batches), [])) == list(range(21))
    tokens = [rollout.token_ids for group in groups for rollout in group.rollouts]
    for batch in (batch for mini_batch in mini_batches for batch in mini_batch.micro_batches):
        for sequence, rollout in enumerate(batch.rollout_index):
            own = batch.rows.token_ids[batch.sequence_index == sequence]
            np.testing.assert_array_equal(own, tokens[rollout])


def test_counts_include_the_groups_that_are_not_laid_out():
    groups = random_groups(4, 3)
    is_active = np.array([True, False, True, False])
    (mini_batch,) = make_planner().mini_batches(groups, is_active, 0)
    assert mini_batch.num_tokens == sum(group.num_tokens for group in groups)
    assert mini_batch.num_sequences == 12
    assert rollouts_of(mini_batch) == [0, 1, 2, 6, 7, 8]


def test_a_group_that_is_not_laid_out_is_checked_all_the_same():
    groups = random_groups(2, 3)
    groups[1].rollouts[0].behaviour_logprobs[0] = np.nan
    with pytest.raises(NonFiniteError, match="behaviour log-probs"):
        make_planner().mini_batches(groups, np.array([True, False]), 0)


def test_mini_batches_depend_on_seed_and_version_alone():
    groups = random_groups(8, 2)

    def cut(seed, version):
        planner = make_planner(num_mini_batches=4, seed=seed)
        return [rollouts_of(part) for part in planner.mini_batches(groups, all_active(groups), version)]

    assert cut(0, 5) == cut(0, 5)
    assert cut(0, 5) != cut(1, 5)
    assert cut(0, 5) != cut(0, 6)
