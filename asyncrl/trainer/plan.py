"""The plan of a step: which tokens are trained together, before any model has looked at them. Numpy only.

    groups → rewards → [sequence advantages] → mini-batches of micro-batches, the same for any order of arrival

A plan is made once per step, from the whole batch, by one rank. Where several ranks share a batch, each is given some
of the micro-batches, and the counts that losses are divided by stay those of the whole plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncrl.trainer.packing import MicroBatch, check_group, pack_groups
from asyncrl.types import Group


@dataclass(frozen=True, slots=True)
class RewardTable:
    """The rewards of a batch of R rollouts in G groups, in the order of its groups."""

    rewards: np.ndarray  # float64 [R]
    group_index: np.ndarray  # int64 [R], the group of each rollout
    baselines: np.ndarray  # float64 [G], reward of each group's greedy completion; NaN where there is none

    @classmethod
    def of(cls, groups: Sequence[Group]) -> RewardTable:
        """The table of `groups`."""
        sizes = [len(group.rollouts) for group in groups]
        baselines = [np.nan if group.baseline_reward is None else group.baseline_reward for group in groups]
        return cls(
            rewards=np.array([rollout.reward for group in groups for rollout in group.rollouts], dtype=np.float64),
            group_index=np.repeat(np.arange(len(groups), dtype=np.int64), sizes),
            baselines=np.array(baselines, dtype=np.float64),
        )

    @property
    def num_groups(self) -> int:
        """Groups of the whole batch."""
        return len(self.baselines)


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer update is made from.

    Counts are over ALL ranks, and include the groups that need no forward pass: losses are divided by them, so that
    the parts of micro-batches and ranks add up to the loss of the whole mini-batch.
    """

    micro_batches: list[MicroBatch]
    num_tokens: int  # completion tokens
    num_sequences: int  # rollouts


def _none() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A whole batch cut into mini-batches. Counts are over ALL ranks, as in `MiniBatch`."""

    mini_batches: list[MiniBatch]
    rewards: RewardTable
    advantages: np.ndarray | None  # float64 [R], one per rollout; None where they depend on forward passes
    is_flat: np.ndarray  # bool [G], groups whose rewards are all equal
    num_tokens: int  # completion tokens
    num_rollouts: int
    kept: np.ndarray = field(default_factory=_none)  # int64 [K], rollouts that are written: `trainer.kept_rollouts`
    kept_tokens: np.ndarray = field(default_factory=_none)  # int64 [K], completion tokens of each


@dataclass(slots=True)
class Planner:
    """Cuts batches into mini-batches and micro-batches; see `pack_groups` for the two limits on rows."""

    seed: int
    num_mini_batches: int
    micro_batch_tokens: int
    shared_row_tokens: int

    def mini_batches(self, groups: Sequence[Group], is_active: np.ndarray, version: int) -> list[MiniBatch]:
        """The mini-batches of the step from `version`. Which groups make one depends on seed and version alone.

        is_active  bool [G]: groups that need a forward pass. The others are checked and counted, and not laid out

        Raises what `pack_groups` raises.
        """
        for index in np.flatnonzero(~is_active):
            check_group(groups[index], version)  # skipped or not, bad data is an error
        order = np.arange(len(groups))
        if self.num_mini_batches > 1:
            order = np.random.default_rng((self.seed, version)).permutation(len(groups))
        parts = np.array_split(order, self.num_mini_batches)
        return [self._mini_batch(groups, np.sort(part), is_active, version) for part in parts]

    def _mini_batch(self, groups: Sequence[Group], part: np.ndarray, is_active: np.ndarray, version: int) -> MiniBatch:
        """One mini-batch from the groups of the indices `part`."""
        active = part[is_active[part]]
        packed = pack_groups(
            [groups[index] for index in active],
            version,
            self.micro_batch_tokens,
            shared_row_tokens=self.shared_row_tokens,
        )
        # From an index into the packed groups to one into the whole batch.
        first_rollout = np.cumsum([0, *(len(group.rollouts) for group in groups)])
        ranges = [np.arange(first_rollout[index], first_rollout[index + 1]) for index in active]
        rollouts = np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)
        return MiniBatch(
            [dataclasses.replace(batch, rollout_index=rollouts[batch.rollout_index]) for batch in packed],
            num_tokens=sum(groups[index].num_tokens for index in part),
            num_sequences=sum(len(groups[index].rollouts) for index in part),
        )
