"""Shares of a plan: dealt evenly, nothing lost, and the same after their travel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.trainer.packing import pack_groups
from asyncrl.trainer.plan import BatchPlan, MiniBatch, RewardTable
from asyncrl.trainer.shares import deal, dummy, pack_share, unpack_share
from tests.trainer.tiny import random_groups


def plan_of(num_groups=6, group_size=3, budget=40, seed=0, shared_row_tokens=0) -> BatchPlan:
    groups = random_groups(num_groups, group_size, seed=seed, completion=(1, 30))
    micro_batches = pack_groups(groups, 0, budget, shared_row_tokens=shared_row_tokens)
    half = len(micro_batches) // 2
    mini_batches = [MiniBatch(part, 111, 22) for part in (micro_batches[:half], micro_batches[half:])]
    rewards = RewardTable.of(groups)
    flat = np.zeros(num_groups, dtype=bool)
    return BatchPlan(mini_batches, rewards, np.arange(18.0), flat, sum(g.num_tokens for g in groups), 18)


def same(ours, theirs) -> bool:
    if isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=theirs.dtype.kind == "f")
    if dataclasses.is_dataclass(theirs):
        fields = [field.name for field in dataclasses.fields(theirs)]
        return type(ours) is type(theirs) and all(same(getattr(ours, name), getattr(theirs, name)) for name in fields)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def rollouts(micro_batches) -> list[int]:
    return sorted(index for batch in micro_batches if not batch.is_dummy for index in batch.rollout_index.tolist())


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 7), budget=st.integers(1, 300), seed=st.integers(0, 99))
def test_every_rollout_is_trained_by_one_rank_and_all_ranks_make_as_many_passes(ranks, budget, seed):
    plan = plan_of(budget=budget, seed=seed)
    shares = deal(plan, ranks)
    for number, whole in enumerate(plan.mini_batches):
        parts = [share.mini_batches[number] for share in shares]
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert rollouts([batch for part in parts for batch in part.micro_batches]) == rollouts(whole.micro_batches)
        dummies = sum(batch.is_dummy for part in parts for batch in part.micro_batches)
        assert dummies < ranks
        assert {(part.num_tokens, part.num_sequences) for part in parts} == {(111, 22)}


def test_ranks_get_about_as_many_inputs():
    plan = plan_of(num_groups=64, group_size=4, budget=100)
    inputs = [
        sum(batch.rows.num_inputs for part in share.mini_batches for batch in part.micro_batches)
        for share in deal(plan, 4)
    ]
    assert max(inputs) < 1.15 * min(inputs)


def test_long_rows_cost_their_attention():
    """Of three micro-batches of equal inputs, the one with a row of 32,768 costs most and gets a rank for itself."""
    short, long = dummy(), dummy()
    lengths = {id(short): np.full(1024, 32), id(long): np.array([32_768])}
    batches = [
        dataclasses.replace(
            batch,
            is_dummy=False,
            rows=dataclasses.replace(batch.rows, input_ids=np.zeros(32_768, np.int64), lengths=lengths[id(batch)]),
        )
        for batch in (short, short, long)
    ]
    plan = dataclasses.replace(plan_of(), mini_batches=[MiniBatch(batches, 1, 1)])
    longest = [[len(b.rows.lengths) for b in share.mini_batches[0].micro_batches] for share in deal(plan, 2)]
    assert longest == [[1, 1], [1024, 1024]]  # the other one beside it is a dummy


@pytest.mark.parametrize("shared_row_tokens", [0, 200])
def test_a_share_travels_as_bytes_and_is_the_same_there(shared_row_tokens):
    for share in deal(plan_of(shared_row_tokens=shared_row_tokens), 3):
        arrived = unpack_share(pack_share(share))
        assert same(arrived, share)
        assert arrived.rewards.rewards.flags.writeable  # torch takes no array that cannot be written
    without = dataclasses.replace(plan_of(), advantages=None)
    assert unpack_share(pack_share(without)).advantages is None


def test_one_rank_has_the_plan_itself():
    plan = plan_of()
    assert deal(plan, 1) == [plan]
