"""One optimizer step: groups in, policy version v -> v + 1. No sockets, no clocks, no files.

The same groups, weights and optimizer state give the same bits, in whatever order the groups come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.advantages import group_relative_advantages, zero_variance_groups
from asyncrl.algorithms.corrections import effective_sample_share_from_sums
from asyncrl.algorithms.kl import kl_estimate
from asyncrl.algorithms.losses import Sums, aggregate_loss, merge_sums, ppo_clip_loss
from asyncrl.config import Config, LearnerConfig
from asyncrl.errors import NonFiniteError
from asyncrl.learner.model import Policy
from asyncrl.replay.packing import MicroBatch, check_group, pack_groups, sorted_groups
from asyncrl.types import Group

# Up to this many inputs, one row with a full attention mask beats one row per completion on a CPU (measured
# with prompts of 12 and completions of 6: 2.4 times faster). On a GPU the mask would switch off flash
# attention.
CPU_SHARED_ROW_TOKENS = 192


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured. Keys whose quantity was not measured in this step are absent, never zero.

    All tokens of the batch: reward_mean, reward_std, completion_tokens_mean, policy_age_mean, policy_age_max,
    tokens_trained, rollouts_trained, groups_trained, groups_zero_variance, tokens_without_gradient.
    Tokens with a gradient: policy_loss, loss, kl_reference (k3), kl_behaviour (mean log mu - log pi),
    entropy, clip_fraction, cap_fraction, ratio_mean, ratio_max, ess_share, logprob_gap (mean |log pi - log
    mu|), logprob_gap_age0 (the same where the policy age is 0: engine mismatch alone).
    The step itself: grad_norm (before clipping), lr, micro_batches, padded_tokens.
    """

    version: int  # the version that now exists
    metrics: dict[str, float]


class PolicyTrainer:
    """Model, optimizer and loss of one trainer rank."""

    def __init__(self, policy: Policy, config: Config, *, version: int = 0) -> None:
        """`policy` is that of `version`. Log-probs are taken at the temperature of sampling."""
        self.algorithm = config.algorithm
        self.learner = config.learner
        self.temperature = config.sampling.temperature
        assert policy.reference is not None or self.algorithm.kl_coef == 0.0, "kl_coef > 0 needs a reference policy"
        self.policy = policy
        self.version = version
        shares_rows = policy.device.type == "cpu" and policy.allows_shared_rows
        self.shared_row_tokens = CPU_SHARED_ROW_TOKENS if shares_rows else 0
        self.optimizer = make_optimizer(policy, self.learner)

    def step(self, groups: Sequence[Group]) -> StepResult:
        """Trains on one batch: weights and optimizer state move to version + 1.

        Raises NonFiniteError when a log-prob, the loss or the gradient is NaN or infinite, and ShapeError or
        ProtocolError when a group does not fit (see `pack_groups`). Then weights, optimizer state and version
        are as they were.
        """
        groups, version = sorted_groups(groups), self.version
        num_tokens = sum(group.num_tokens for group in groups)
        assert num_tokens > 0, "a step needs at least one group"
        advantages, is_flat = self._advantages(groups)
        # Equal rewards give no gradient, unless the loss has other terms: such groups count in every
        # denominator but need no forward pass.
        needs_all = self.algorithm.kl_coef > 0.0 or self.algorithm.entropy_coef > 0.0
        active = [index for index in range(len(groups)) if needs_all or not is_flat[index]]
        for index in np.flatnonzero(is_flat):
            check_group(groups[index], advantages[index], version)  # skipped or not, bad data is an error
        batches = pack_groups(
            [groups[index] for index in active],
            [advantages[index] for index in active],
            version,
            self.learner.micro_batch_tokens,
            shared_row_tokens=self.shared_row_tokens,
        )
        self.optimizer.zero_grad(set_to_none=True)
        try:
            sums = self._accumulate(batches, num_tokens, sum(len(group.rollouts) for group in groups))
            grad_norm = self._clip_gradients(sums)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        lr = warmed_up_lr(self.learner.lr, self.learner.lr_warmup_steps, version)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = batch_metrics(groups, is_flat, version) | token_metrics(sums)
        metrics |= {
            "grad_norm": grad_norm,
            "lr": lr,
            "micro_batches": float(len(batches)),
            "padded_tokens": float(sum(batch.padded_tokens for batch in batches)),
            "tokens_without_gradient": float(num_tokens - sum(batch.num_tokens for batch in batches)),
        }
        self.version = version + 1
        return StepResult(self.version, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Version, optimizer state and random state: with the weights, all that the next step depends on."""
        state: dict[str, Any] = {
            "version": self.version,
            "optimizer": self.optimizer.state_dict(),
            "cpu_rng": torch.get_rng_state(),
        }
        if self.policy.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.policy.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        self.version = state["version"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["cpu_rng"])
        if "cuda_rng" in state and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.policy.device)

    def _advantages(self, groups: list[Group]) -> tuple[list[np.ndarray], np.ndarray]:
        """Advantages of each group's rollouts, and which groups have none."""
        sizes = [len(group.rollouts) for group in groups]
        rewards = torch.tensor([r.reward for group in groups for r in group.rollouts], dtype=torch.float64)
        index = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
        advantages = group_relative_advantages(rewards, index, len(groups), normalize_std=self.algorithm.normalize_std)
        is_flat = zero_variance_groups(rewards, index, len(groups))
        return np.split(advantages.numpy(), np.cumsum(sizes)[:-1]), is_flat.numpy()

    def _accumulate(self, batches: list[MicroBatch], num_tokens: int, num_sequences: int) -> Sums:
        """Adds up gradients and sums over the micro-batches."""
        sums: Sums = {}
        for batch in batches:
            loss, part = self._loss(batch, num_tokens, num_sequences)
            loss.backward()
            sums = merge_sums(sums, part)
        return sums

    def _loss(self, batch: MicroBatch, num_tokens: int, num_sequences: int) -> tuple[Tensor, Sums]:
        """This micro-batch's part of the loss, and its sums. Counts are those of the whole batch."""
        algorithm, device = self.algorithm, self.policy.device
        behaviour = torch.from_numpy(batch.behaviour_logprobs).to(device)
        advantages = torch.from_numpy(batch.advantages).to(device)
        logprobs, entropies = self.policy.logprobs(batch, self.temperature)
        policy_losses, sums = ppo_clip_loss(
            logprobs,
            behaviour,
            advantages,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            ratio_cap=algorithm.tis_cap,
        )
        losses = policy_losses
        reference = self.policy.reference
        if reference is not None:
            with torch.no_grad():
                reference_logprobs, _ = reference.logprobs(batch, self.temperature)
            kl = kl_estimate(logprobs, reference_logprobs, "k3")
            sums["kl_reference_sum"] = kl.detach().sum()
            losses = losses + algorithm.kl_coef * kl
        if algorithm.entropy_coef > 0.0:
            losses = losses - algorithm.entropy_coef * entropies
        loss = aggregate_loss(
            losses,
            torch.from_numpy(batch.sequence_index).to(device),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )
        gaps = (logprobs.detach() - behaviour).abs()
        is_fresh = torch.from_numpy(batch.policy_ages == 0).to(device)
        sums |= {
            "loss": loss.detach(),
            "policy_loss": policy_losses.detach().sum() / num_tokens,
            "entropy_sum": entropies.detach().sum(),
            "gap_age0_sum": (gaps * is_fresh).sum(),
            "tokens_age0": is_fresh.sum(),
            "non_finite": (~torch.isfinite(logprobs.detach())).sum(),
        }
        return loss, sums

    def _clip_gradients(self, sums: Sums) -> float:
        """Scales gradients to the largest allowed norm; returns the norm before. Raises NonFiniteError."""
        parameters = self.policy.trainable_parameters()
        for parameter in parameters:
            # A batch without gradient is a step like any other: momentum and weight decay act on it too.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.learner.grad_clip)
        if int(sums.get("non_finite", 0)):
            raise NonFiniteError(
                f"{int(sums['non_finite'])} of {int(sums['tokens'])} log-probs under the policy are NaN or"
                " infinite; no step taken"
            )
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(sums.get("loss", norm))):
            raise NonFiniteError(
                f"gradient norm {float(norm)}, loss {float(sums.get('loss', 0.0))}: not finite; no step taken"
            )
        return float(norm)


def make_optimizer(policy: Policy, learner: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not on norms and biases."""
    parameters = policy.trainable_parameters()
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": learner.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=learner.lr,
        betas=(learner.betas[0], learner.betas[1]),
        fused=True,
    )


def warmed_up_lr(lr: float, warmup_steps: int, version: int) -> float:
    """Learning rate of the step from `version`: linear up to `lr` at the last warm-up step, then constant."""
    return lr * min(1.0, (version + 1) / (warmup_steps + 1))


def batch_metrics(groups: Sequence[Group], is_flat: np.ndarray, version: int) -> dict[str, float]:
    """What the groups say by themselves; see StepResult."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([rollout.reward for rollout in rollouts], dtype=np.float64)
    spans = [span for rollout in rollouts for span in rollout.version_spans]
    span_tokens = np.array([span.stop - span.start for span in spans])
    ages = np.array([version - span.version for span in spans])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "completion_tokens_mean": float(np.mean([rollout.num_tokens for rollout in rollouts])),
        "policy_age_mean": float((ages * span_tokens).sum() / span_tokens.sum()),
        "policy_age_max": float(ages.max()),
        "tokens_trained": float(span_tokens.sum()),
        "rollouts_trained": float(len(rollouts)),
        "groups_trained": float(len(groups)),
        "groups_zero_variance": float(is_flat.sum()),
    }


def token_metrics(sums: Sums) -> dict[str, float]:
    """Means over the tokens that had a gradient, from sums over the batch; see StepResult."""
    if not sums:
        return {"loss": 0.0, "policy_loss": 0.0}
    names = list(sums)
    # One transfer from the device for all of them.
    values = dict(zip(names, torch.stack([sums[name].double() for name in names]).tolist(), strict=True))
    tokens = values["tokens"]
    ess = effective_sample_share_from_sums(
        torch.tensor(values["ratio_sum"], dtype=torch.float64),
        torch.tensor(values["ratio_square_sum"], dtype=torch.float64),
        int(tokens),
    )
    metrics = {
        "loss": values["loss"],
        "policy_loss": values["policy_loss"],
        "entropy": values["entropy_sum"] / tokens,
        "kl_behaviour": -values["log_ratio_sum"] / tokens,
        "logprob_gap": values["log_ratio_abs_sum"] / tokens,
        "clip_fraction": values["clipped"] / tokens,
        "cap_fraction": values["capped"] / tokens,
        "ratio_mean": values["ratio_sum"] / tokens,
        "ratio_max": values["ratio_max"],
        "ess_share": float(ess),
    }
    if "kl_reference_sum" in values:
        metrics["kl_reference"] = values["kl_reference_sum"] / tokens
    if values["tokens_age0"]:
        metrics["logprob_gap_age0"] = values["gap_age0_sum"] / values["tokens_age0"]
    return metrics
