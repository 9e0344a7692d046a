"""What is known of a batch before its first update: log-probs, values, advantages, targets, masks over all of it.

    groups → plan → forward passes without gradient → finish: token advantages, whitening, targets, masks

A forward pass is made only for what the configuration needs: the usual methods need none. What depends on the whole
batch (whitening, the second-moment mask) is settled here, so that a loss may be computed micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.advantages import (
    group_relative_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    whiten,
    zero_variance_groups,
)
from asyncrl.algorithms.kl import kl_estimate
from asyncrl.algorithms.layout import pad_sequences, unpad_sequences
from asyncrl.algorithms.masks import second_moment_mask
from asyncrl.algorithms.reducer import Reducer
from asyncrl.algorithms.value_targets import gae, importance_weighted_gae, token_rewards, vtrace
from asyncrl.config import Config
from asyncrl.config.methods import chosen_kl_estimator
from asyncrl.errors import ShapeError
from asyncrl.trainer.engines.base import Engines, Want
from asyncrl.trainer.engines.device_rows import DeviceRows, on_device, to_device
from asyncrl.trainer.packing import MicroBatch
from asyncrl.trainer.plan import BatchPlan, MiniBatch, Planner, RewardTable
from asyncrl.types import Group


@dataclass(slots=True)
class MicroBatchData:
    """A micro-batch of N completion tokens in S sequences and what its losses need; tensors without gradient.

    What was not asked for is None. start_logprobs are the actor's at the start of the step.
    """

    rows: DeviceRows
    rollout_index: Tensor  # int64 [S], index of each sequence's rollout in the whole batch
    sequence_index: Tensor  # int64 [N]
    behaviour_logprobs: Tensor  # float32 [N]
    policy_ages: Tensor  # int64 [N]
    advantages: Tensor  # float32 [N], 0 before `Preparation.finish`
    start_logprobs: Tensor | None = None  # [N]
    reference_logprobs: Tensor | None = None  # [N]
    values: Tensor | None = None  # [N], of the critic at the start of the step
    targets: Tensor | None = None  # [N]
    keep_mask: Tensor | None = None  # bool [N], False where a mask over the whole batch leaves a token out
    is_dummy: bool = False  # takes part in the passes and counts nowhere

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return self.rows.num_tokens


@dataclass(frozen=True, slots=True)
class MiniBatchData:
    """The micro-batches of one optimizer update on this rank. Counts are those of `MiniBatch`: over ALL ranks."""

    micro_batches: list[MicroBatchData]
    num_tokens: int
    num_sequences: int


class Preparation:
    """Prepares batches for the engines of one step: `plan`, then `forward`, then `finish`."""

    def __init__(self, config: Config, engines: Engines, ranks: Reducer) -> None:
        """`ranks` reduces over those that have the other micro-batches of a plan."""
        self._ranks = ranks
        self._algorithm = config.algorithm
        self._temperature = config.sampling.temperature
        self._engines = engines
        self._has_reference = engines.actor.has_reference
        self._kl_estimator = chosen_kl_estimator(config.algorithm.kl_estimator, config.algorithm.kl_in)
        self._kl_in_reward = self._has_reference and self._algorithm.kl_in == "reward"
        self._needs_start = needs_start_logprobs(config) or self._kl_in_reward
        self.planner = Planner(
            seed=config.run.seed,
            num_mini_batches=config.learner.mini_batches,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            shared_row_tokens=config.learner.micro_batch_tokens // 2 if engines.actor.prefers_shared_rows else 0,
        )

    # -- before the forward passes ---------------------------------------------------------------------------------

    def plan(self, groups: Sequence[Group], version: int) -> BatchPlan:
        """The whole batch, cut for the step from `version`. No model looks at it, no device is touched.

        Raises what `pack_groups` raises, NonFiniteError for rewards that are not finite, and ShapeError where
        algorithm.advantage=remax meets a group without a greedy completion.
        """
        rewards = RewardTable.of(groups)
        is_flat = zero_variance_groups(
            torch.from_numpy(rewards.rewards), torch.from_numpy(rewards.group_index), rewards.num_groups
        )
        if self._algorithm.advantage == "remax":
            _require_baselines(groups)
        advantages = None
        if not self._waits_for_forward_passes:
            advantages = self._sequence_advantages(rewards, torch.from_numpy(rewards.rewards)).numpy()
        # Equal rewards give no gradient unless the loss has other terms: such groups count in every denominator but
        # need no forward pass.
        is_active = np.ones(len(groups), dtype=bool)
        if advantages is not None and not self._needs_all:
            is_active = np.bincount(rewards.group_index, advantages != 0.0, rewards.num_groups) > 0
        return BatchPlan(
            mini_batches=self.planner.mini_batches(groups, is_active, version),
            rewards=rewards,
            advantages=advantages,
            is_flat=is_flat.numpy(),
            num_tokens=sum(group.num_tokens for group in groups),
            num_rollouts=len(rewards.rewards),
        )

    @property
    def _waits_for_forward_passes(self) -> bool:
        """Whether advantages depend on more than rewards."""
        return self._engines.has_critic or self._kl_in_reward

    @property
    def _needs_all(self) -> bool:
        """Whether every token has a gradient, whatever its advantage."""
        return self._waits_for_forward_passes or self._has_reference or self._algorithm.entropy_coef > 0.0

    def _sequence_advantages(self, table: RewardTable, rewards: Tensor) -> Tensor:
        """One advantage per rollout, float64 [R], from `rewards` [R]: those of the table, or with a KL subtracted."""
        group_index, num_groups = torch.from_numpy(table.group_index), table.num_groups
        match self._algorithm.advantage:
            case "group":
                std = self._algorithm.normalize_std
                return group_relative_advantages(rewards, group_index, num_groups, normalize_std=std)
            case "rloo":
                return rloo_advantages(rewards, group_index, num_groups)
            case "reinforce_pp":
                return reinforce_pp_advantages(rewards)
            case "reinforce_pp_baseline":
                return reinforce_pp_advantages(rewards, group_index=group_index, num_groups=num_groups)
            case "remax":
                return remax_advantages(rewards, torch.from_numpy(table.baselines)[group_index])
        raise AssertionError(f"advantage {self._algorithm.advantage!r} is not computed for whole sequences")

    # -- forward passes --------------------------------------------------------------------------------------------

    def forward(self, plan: BatchPlan) -> list[MiniBatchData]:
        """The mini-batches of a plan on the engines' device, with the log-probs and values that `finish` needs."""
        mini_batches = [self._on_device(mini_batch) for mini_batch in plan.mini_batches]
        data = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches]
        rows = [micro_batch.rows for micro_batch in data]
        actor, critic = self._engines.actor, self._engines.critic
        want = Want(logprobs=self._needs_start, values=actor.has_values)
        if want.logprobs or want.values:
            for micro_batch, outputs in zip(data, actor.forward(rows, want, self._temperature), strict=True):
                micro_batch.start_logprobs = outputs.logprobs
                micro_batch.values = outputs.values
        if self._has_reference:
            reference = actor.forward(rows, Want(logprobs=True, frozen=True), self._temperature)
            for micro_batch, outputs in zip(data, reference, strict=True):
                micro_batch.reference_logprobs = outputs.logprobs
        if critic is not None:
            values = critic.forward(rows, Want(values=True), self._temperature)
            for micro_batch, outputs in zip(data, values, strict=True):
                micro_batch.values = outputs.values
        return mini_batches

    def _on_device(self, mini_batch: MiniBatch) -> MiniBatchData:
        return MiniBatchData(
            [self._micro_batch_on_device(micro_batch) for micro_batch in mini_batch.micro_batches],
            mini_batch.num_tokens,
            mini_batch.num_sequences,
        )

    def _micro_batch_on_device(self, micro_batch: MicroBatch) -> MicroBatchData:
        device = self._engines.actor.device
        behaviour_logprobs = to_device(micro_batch.behaviour_logprobs, device)
        return MicroBatchData(
            rows=on_device(micro_batch.rows, device),
            rollout_index=to_device(micro_batch.rollout_index, device),
            sequence_index=to_device(micro_batch.sequence_index, device),
            behaviour_logprobs=behaviour_logprobs,
            policy_ages=to_device(micro_batch.policy_ages, device),
            advantages=torch.zeros_like(behaviour_logprobs),
            is_dummy=micro_batch.is_dummy,
        )

    # -- after the forward passes ----------------------------------------------------------------------------------

    def finish(self, plan: BatchPlan, mini_batches: Sequence[MiniBatchData], kl_coef: float) -> None:
        """Fills in advantages, targets and the mask over the whole batch; `mini_batches` are `forward`'s."""
        every = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch.micro_batches]
        data = [micro_batch for micro_batch in every if not micro_batch.is_dummy]
        for micro_batch in every:
            micro_batch.targets = torch.zeros_like(micro_batch.advantages) if micro_batch.is_dummy else None
        if self._engines.has_critic:
            self._set_value_advantages(plan, data, kl_coef)
        else:
            self._set_sequence_advantages(plan, data, kl_coef)
        if "second_moment" in self._algorithm.masks:
            _mask_second_moment(data, self._algorithm.second_moment, self._ranks)

    def _set_sequence_advantages(self, plan: BatchPlan, data: list[MicroBatchData], kl_coef: float) -> None:
        """Gives every token the advantage of its rollout."""
        if plan.advantages is not None:
            advantages = torch.from_numpy(plan.advantages)
        else:
            kl = self._ranks.sum(_sums_of_kl(data, plan.num_rollouts, self._kl_estimator))
            advantages = self._sequence_advantages(plan.rewards, torch.from_numpy(plan.rewards.rewards) - kl_coef * kl)
        for micro_batch in data:
            own = advantages.to(micro_batch.advantages)[micro_batch.rollout_index]
            micro_batch.advantages = own[micro_batch.sequence_index]

    def _set_value_advantages(self, plan: BatchPlan, data: list[MicroBatchData], kl_coef: float) -> None:
        """Advantages and targets of every token from rewards and values; advantages whitened over the batch."""
        rewards = torch.from_numpy(plan.rewards.rewards)
        for micro_batch in data:
            penalties = None
            if self._kl_in_reward:
                penalties = kl_coef * _kl(micro_batch, self._kl_estimator)
            own = rewards.to(micro_batch.advantages)[micro_batch.rollout_index]
            steps = token_rewards(own, micro_batch.sequence_index, penalties)
            micro_batch.advantages, micro_batch.targets = self._from_values(micro_batch, steps)
        unwhitened = [micro_batch.advantages for micro_batch in data]
        whitened = whiten(torch.cat(unwhitened) if data else torch.zeros(0), ranks=self._ranks)
        parts = whitened.split([micro_batch.num_tokens for micro_batch in data])
        for micro_batch, advantages in zip(data, parts, strict=True):
            micro_batch.advantages = advantages

    def _from_values(self, data: MicroBatchData, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and targets of a micro-batch's tokens, both [N], from their rewards `steps` [N]."""
        algorithm, count = self._algorithm, len(data.rollout_index)
        assert data.values is not None
        padded, mask = pad_sequences(steps, data.sequence_index, count)
        values, _ = pad_sequences(data.values, data.sequence_index, count)
        gamma, lam = algorithm.gamma, algorithm.lam
        if algorithm.value_targets == "gae":
            advantages, targets = gae(padded, values, mask, gamma=gamma, lam=lam)
        else:
            assert data.start_logprobs is not None
            log_ratios, _ = pad_sequences(data.start_logprobs - data.behaviour_logprobs, data.sequence_index, count)
            if algorithm.value_targets == "is_gae":
                advantages, targets = importance_weighted_gae(
                    padded, values, log_ratios, mask, gamma=gamma, lam=lam, c_bar=algorithm.c_bar
                )
            else:
                rho_bar, c_bar = algorithm.rho_bar, algorithm.c_bar
                advantages, targets = vtrace(
                    padded, values, log_ratios, mask, gamma=gamma, lam=lam, rho_bar=rho_bar, c_bar=c_bar
                )
        return unpad_sequences(advantages, mask), unpad_sequences(targets, mask)


def needs_start_logprobs(config: Config) -> bool:
    """Whether the actor's log-probs at the start of the step must be known before its first update.

    With one update per step the proximal policy is the policy being trained: its log-probs come with the update.
    """
    algorithm, learner = config.algorithm, config.learner
    several_updates = learner.epochs * learner.mini_batches > 1
    return (
        (algorithm.proximal == "recomputed" and several_updates)
        or "second_moment" in algorithm.masks
        or (algorithm.advantage == "gae" and algorithm.value_targets != "gae")
    )


def _require_baselines(groups: Sequence[Group]) -> None:
    missing = [group.key for group in groups if group.baseline_reward is None]
    if missing:
        raise ShapeError(f"{missing[0]} has no greedy completion; algorithm.advantage=remax needs one in every group")


def _kl(data: MicroBatchData, estimator: str) -> Tensor:
    """KL of the actor at the start of the step to the reference, [N]."""
    assert data.start_logprobs is not None and data.reference_logprobs is not None
    return kl_estimate(data.start_logprobs, data.reference_logprobs, estimator)


def _sums_of_kl(data: list[MicroBatchData], num_rollouts: int, estimator: str) -> Tensor:
    """KL to the reference summed over the tokens of each rollout, float64 [R]."""
    sums = torch.zeros(num_rollouts, dtype=torch.float64)
    for micro_batch in data:
        rollouts = micro_batch.rollout_index[micro_batch.sequence_index].cpu()
        sums.index_add_(0, rollouts, _kl(micro_batch, estimator).double().cpu())
    return sums


def _mask_second_moment(data: list[MicroBatchData], threshold: float, ranks: Reducer) -> None:
    """Sets the keep masks of M2PO. Its threshold bounds a mean over the whole batch, so all are judged together."""
    log_ratios = [batch.start_logprobs - batch.behaviour_logprobs for batch in data if batch.start_logprobs is not None]
    assert len(log_ratios) == len(data)
    own = torch.cat(log_ratios) if log_ratios else torch.zeros(0)
    keep_mask = second_moment_mask(own, threshold, ranks=ranks)
    for micro_batch, part in zip(data, keep_mask.split([len(ratios) for ratios in log_ratios]), strict=True):
        micro_batch.keep_mask = part
