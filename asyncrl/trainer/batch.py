"""What is known of a batch before its first update: log-probs, values, advantages, targets, masks over all of it.

    groups → rewards → sequence advantages → micro-batches → forward passes without gradient → token advantages

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
from asyncrl.algorithms.value_targets import gae, importance_weighted_gae, token_rewards, vtrace
from asyncrl.config import AlgorithmConfig, Config
from asyncrl.errors import ShapeError
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.policy import Policy, to_device
from asyncrl.trainer.packing import MicroBatch, check_group, pack_groups
from asyncrl.types import Group

# Up to this many inputs, one row with a full attention mask beats one row per completion on a CPU (measured
# with prompts of 12 and completions of 6: 2.4 times faster). On a GPU the mask would switch off flash
# attention.
CPU_SHARED_ROW_TOKENS = 192


@dataclass(slots=True)
class Prepared:
    """A micro-batch of N completion tokens in S sequences and what its losses need; tensors without gradient.

    What was not asked for is None. start_logprobs are the actor's at the start of the step.
    """

    batch: MicroBatch
    rollouts: Tensor  # int64 [S], index of each sequence's rollout in the whole batch
    sequence_index: Tensor  # int64 [N]
    behaviour_logprobs: Tensor  # [N]
    policy_ages: Tensor  # int64 [N]
    advantages: Tensor  # [N]
    start_logprobs: Tensor | None = None  # [N]
    reference_logprobs: Tensor | None = None  # [N]
    values: Tensor | None = None  # [N], of the critic at the start of the step
    targets: Tensor | None = None  # [N]
    stays: Tensor | None = None  # bool [N], False where a mask over the whole batch leaves a token out


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The micro-batches of one optimizer update. Counts include groups that need no forward pass."""

    micro_batches: list[Prepared]
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A whole batch, cut into mini-batches."""

    mini_batches: list[MiniBatch]
    is_flat: np.ndarray  # bool [G], groups whose rewards are all equal


class Preparation:
    """Prepares batches for one policy and, with algorithm.advantage=gae, its critic."""

    def __init__(self, config: Config, policy: Policy, critic: Critic | None) -> None:
        self._algorithm: AlgorithmConfig = config.algorithm
        self._learner = config.learner
        self._seed = config.run.seed
        self._temperature = config.sampling.temperature
        self._policy = policy
        self._critic = critic
        shares_rows = policy.device.type == "cpu" and policy.allows_shared_rows
        self.shared_row_tokens = CPU_SHARED_ROW_TOKENS if shares_rows else 0
        self._kl_in_reward = policy.reference is not None and self._algorithm.kl_in == "reward"
        self._needs_start = needs_start_logprobs(config) or self._kl_in_reward

    def prepare(self, groups: Sequence[Group], version: int, kl_coef: float) -> PreparedBatch:
        """Everything about `groups` under the policy of `version`, in their order.

        Raises what `pack_groups` raises, and NonFiniteError for rewards that are not finite.
        """
        rewards, group_index = _rewards(groups)
        is_flat = zero_variance_groups(rewards, group_index, len(groups)).numpy()
        advantages = torch.zeros_like(rewards)
        if not self._waits_for_forward_passes:
            advantages = self._sequence_advantages(groups, rewards, group_index)
        # Equal rewards give no gradient unless the loss has other terms: such groups count in every denominator but
        # need no forward pass.
        is_active = np.ones(len(groups), dtype=bool)
        if not self._needs_all:
            is_active = np.bincount(group_index.numpy(), advantages.numpy() != 0.0, len(groups)) > 0
        mini_batches = self._pack(groups, is_active, version)
        prepared = [one for mini_batch in mini_batches for one in mini_batch.micro_batches]
        self._forward(prepared)
        if self._kl_in_reward and self._critic is None:
            rewards = rewards - kl_coef * _sums_of_kl(prepared, len(rewards), self._algorithm.kl_estimator)
            advantages = self._sequence_advantages(groups, rewards, group_index)
        if self._critic is None:
            for one in prepared:
                one.advantages = advantages.to(one.advantages)[one.rollouts][one.sequence_index]
        else:
            self._value_advantages(prepared, rewards, kl_coef)
        if "second_moment" in self._algorithm.masks:
            _mask_second_moment(prepared, self._algorithm.second_moment)
        return PreparedBatch(mini_batches, is_flat)

    @property
    def _waits_for_forward_passes(self) -> bool:
        """Whether advantages depend on more than rewards."""
        return self._critic is not None or self._kl_in_reward

    @property
    def _needs_all(self) -> bool:
        """Whether every token has a gradient, whatever its advantage."""
        has_kl = self._policy.reference is not None
        return self._waits_for_forward_passes or has_kl or self._algorithm.entropy_coef > 0.0

    def _sequence_advantages(self, groups: Sequence[Group], rewards: Tensor, group_index: Tensor) -> Tensor:
        """One advantage per rollout, float64 [R]."""
        match self._algorithm.advantage:
            case "group":
                std = self._algorithm.normalize_std
                return group_relative_advantages(rewards, group_index, len(groups), normalize_std=std)
            case "rloo":
                return rloo_advantages(rewards, group_index, len(groups))
            case "reinforce_pp":
                return reinforce_pp_advantages(rewards)
            case "reinforce_pp_baseline":
                return reinforce_pp_advantages(rewards, group_index=group_index, num_groups=len(groups))
            case "remax":
                return remax_advantages(rewards, _baselines(groups)[group_index])
        raise AssertionError(f"advantage {self._algorithm.advantage!r} is not one of a sequence")

    # -- layout ----------------------------------------------------------------------------------------------------

    def _pack(self, groups: Sequence[Group], is_active: np.ndarray, version: int) -> list[MiniBatch]:
        """Cuts the groups into mini-batches, by a permutation that depends on seed and version alone."""
        for index in np.flatnonzero(~is_active):
            check_group(groups[index], version)  # skipped or not, bad data is an error
        first_rollout = np.cumsum([0, *(len(group.rollouts) for group in groups)])
        order = np.arange(len(groups))
        if self._learner.mini_batches > 1:
            order = np.random.default_rng((self._seed, version)).permutation(len(groups))
        mini_batches = []
        for part in np.array_split(order, self._learner.mini_batches):
            part = np.sort(part)
            active = part[is_active[part]]
            packed = pack_groups(
                [groups[index] for index in active],
                version,
                self._learner.micro_batch_tokens,
                shared_row_tokens=self.shared_row_tokens,
            )
            ranges = [np.arange(first_rollout[index], first_rollout[index + 1]) for index in active]
            rollouts = np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)
            mini_batches.append(
                MiniBatch(
                    [self._on_device(batch, rollouts[batch.rollout_index]) for batch in packed],
                    sum(groups[index].num_tokens for index in part),
                    sum(len(groups[index].rollouts) for index in part),
                )
            )
        return mini_batches

    def _on_device(self, batch: MicroBatch, rollouts: np.ndarray) -> Prepared:
        device = self._policy.device
        behaviour = to_device(batch.behaviour_logprobs, device)
        return Prepared(
            batch=batch,
            rollouts=to_device(rollouts, device),
            sequence_index=to_device(batch.sequence_index, device),
            behaviour_logprobs=behaviour,
            policy_ages=to_device(batch.policy_ages, device),
            advantages=torch.zeros_like(behaviour),
        )

    # -- forward passes --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, prepared: list[Prepared]) -> None:
        critic, reference = self._critic, self._policy.reference
        for one in prepared:
            hidden = None
            if self._needs_start or (critic is not None and critic.is_shared):
                hidden = self._policy.hidden(one.batch)
            if self._needs_start:
                one.start_logprobs, _ = self._policy.logprobs_from(hidden, one.batch, self._temperature)
            if reference is not None:
                one.reference_logprobs, _ = reference.logprobs(one.batch, self._temperature)
            if critic is not None:
                one.values = critic.values(one.batch, hidden)

    def _value_advantages(self, prepared: list[Prepared], rewards: Tensor, kl_coef: float) -> None:
        """Advantages and targets of every token from rewards and values; advantages whitened over the batch."""
        for one in prepared:
            penalties = None
            if self._kl_in_reward:
                penalties = kl_coef * _kl(one, self._algorithm.kl_estimator)
            own = rewards.to(one.advantages)[one.rollouts]
            steps = token_rewards(own, one.sequence_index, penalties)
            one.advantages, one.targets = self._from_values(one, steps)
        whitened = whiten(torch.cat([one.advantages for one in prepared]))
        for one, advantages in zip(prepared, whitened.split([len(p.advantages) for p in prepared]), strict=True):
            one.advantages = advantages

    def _from_values(self, one: Prepared, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and targets of a micro-batch's tokens, both [N], from their rewards `steps` [N]."""
        algorithm, count = self._algorithm, len(one.rollouts)
        assert one.values is not None
        padded, mask = pad_sequences(steps, one.sequence_index, count)
        values, _ = pad_sequences(one.values, one.sequence_index, count)
        gamma, lam = algorithm.gamma, algorithm.lam
        if algorithm.value_targets == "gae":
            advantages, targets = gae(padded, values, mask, gamma=gamma, lam=lam)
        else:
            assert one.start_logprobs is not None
            log_ratios, _ = pad_sequences(one.start_logprobs - one.behaviour_logprobs, one.sequence_index, count)
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


def _rewards(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Reward of each rollout, float64 [R], and its group, int64 [R]."""
    rewards = torch.tensor([rollout.reward for group in groups for rollout in group.rollouts], dtype=torch.float64)
    sizes = [len(group.rollouts) for group in groups]
    return rewards, torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))


def _baselines(groups: Sequence[Group]) -> Tensor:
    """Reward of each group's greedy completion, float64 [G]."""
    missing = [group.key for group in groups if group.baseline_reward is None]
    if missing:
        raise ShapeError(f"{missing[0]} has no greedy completion; algorithm.advantage=remax needs one in every group")
    return torch.tensor([group.baseline_reward for group in groups], dtype=torch.float64)


def _kl(one: Prepared, estimator: str) -> Tensor:
    assert one.start_logprobs is not None and one.reference_logprobs is not None
    return kl_estimate(one.start_logprobs, one.reference_logprobs, estimator)


def _sums_of_kl(prepared: list[Prepared], num_rollouts: int, estimator: str) -> Tensor:
    """KL to the reference summed over the tokens of each rollout, float64 [R]."""
    sums = torch.zeros(num_rollouts, dtype=torch.float64)
    for one in prepared:
        sums.index_add_(0, one.rollouts[one.sequence_index].cpu(), _kl(one, estimator).double().cpu())
    return sums


def _mask_second_moment(prepared: list[Prepared], threshold: float) -> None:
    """M2PO's mask: the threshold is one of the whole batch, so all of it is looked at together."""
    log_ratios = [one.start_logprobs - one.behaviour_logprobs for one in prepared if one.start_logprobs is not None]
    assert len(log_ratios) == len(prepared)
    if not prepared:
        return
    stays = second_moment_mask(torch.cat(log_ratios), threshold)
    for one, part in zip(prepared, stays.split([len(ratios) for ratios in log_ratios]), strict=True):
        one.stays = part
