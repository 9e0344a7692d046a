"""One step: groups in, policy version v -> v + 1. No sockets, no clocks, no files.

    groups → preparation → [mini-batch → actor loss, critic loss → gradients → update] × updates → figures

A step is `learner.epochs` x `learner.mini_batches` updates of the same batch, and always one policy version.
The same groups, weights and optimizer state give the same bits, in whatever order the groups come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asyncrl.algorithms.kl import adapted_kl_coef
from asyncrl.algorithms.losses import Sums, aggregate_loss, merge_sums
from asyncrl.algorithms.value_targets import value_loss
from asyncrl.config import Config
from asyncrl.errors import NonFiniteError
from asyncrl.trainer.batch import MiniBatch, Preparation, Prepared, PreparedBatch
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.objective import ActorObjective
from asyncrl.trainer.packing import sorted_groups
from asyncrl.trainer.step_metrics import batch_metrics, token_metrics
from asyncrl.types import Group


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured; the names are those of `trainer.step_metrics`."""

    version: int  # the version that now exists
    metrics: dict[str, float]


class PolicyTrainer:
    """Actor, critic, optimizers and losses of one trainer rank."""

    def __init__(self, policy: Policy, config: Config, *, critic: Critic | None = None, version: int = 0) -> None:
        """`policy` and `critic` are those of `version`. Log-probs are taken at the temperature of sampling."""
        algorithm = config.algorithm
        assert policy.reference is not None or algorithm.kl_coef == 0.0, "kl_coef > 0 needs a reference policy"
        assert (critic is not None) == (algorithm.advantage == "gae"), "a critic, and only for algorithm.advantage=gae"
        self.config = config
        self.policy = policy
        self.critic = critic
        self.version = version
        self.temperature = config.sampling.temperature
        self.kl_coef = algorithm.kl_coef
        self.preparation = Preparation(config, policy, critic)
        self.objective = ActorObjective(config)
        self.optimizer = make_optimizer(policy.trainable_parameters(), config, config.learner.lr)
        self.critic_optimizer: torch.optim.AdamW | None = None
        if critic is not None:
            self.critic_optimizer = make_optimizer(list(critic.parameters()), config, config.critic.lr)

    def step(self, groups: Sequence[Group]) -> StepResult:
        """Trains on one batch: weights and optimizer state move to version + 1.

        Raises NonFiniteError when a log-prob, a loss or a gradient is NaN or infinite, and ShapeError or
        ProtocolError when a group does not fit (see `pack_groups`). If that happens before the first update, and
        with one update per step it always does, weights, optimizer state and version are as they were.
        """
        groups, version = sorted_groups(groups), self.version
        assert sum(group.num_tokens for group in groups) > 0, "a step needs at least one group"
        batch = self.preparation.prepare(groups, version, self.kl_coef)
        lr = warmed_up_lr(self.config.learner.lr, self.config.learner.lr_warmup_steps, version)
        set_lr(self.optimizer, lr)
        sums: Sums = {}
        norms: dict[str, list[float]] = {}
        for _ in range(self.config.learner.epochs):
            for mini_batch in batch.mini_batches:
                part = self._update(mini_batch, norms)
                sums = merge_sums(sums, part)
        num_updates = self.config.learner.epochs * len(batch.mini_batches)
        metrics = batch_metrics(groups, batch.is_flat, version) | token_metrics(sums, num_updates)
        metrics |= {name: sum(values) / len(values) for name, values in norms.items()}
        metrics |= _layout_metrics(batch, groups) | {"lr": lr}
        metrics |= self._adapt_kl(metrics)
        self.version = version + 1
        return StepResult(self.version, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Version, optimizer and random state: with the weights, all that the next step depends on."""
        state: dict[str, Any] = {
            "version": self.version,
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.kl_coef,
            "cpu_rng": torch.get_rng_state(),
        }
        if self.critic_optimizer is not None:
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        if self.policy.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.policy.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes `state_dict`."""
        self.version = state["version"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_coef = state["kl_coef"]
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        torch.set_rng_state(state["cpu_rng"])
        if "cuda_rng" in state and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.policy.device)

    # -- one update ------------------------------------------------------------------------------------------------

    @property
    def _trains_actor(self) -> bool:
        return self.critic is None or self.version >= self.config.critic.warmup_steps

    def _update(self, mini_batch: MiniBatch, norms: dict[str, list[float]]) -> Sums:
        """One optimizer update from one mini-batch; gradients add up over its micro-batches."""
        self._zero_gradients()
        sums: Sums = {}
        try:
            for one in mini_batch.micro_batches:
                loss, part = self._loss(one, mini_batch)
                loss.backward()
                sums = merge_sums(sums, part)
            clipped = self._clip_gradients(sums)
        except BaseException:
            self._zero_gradients()
            raise
        for name, norm in clipped.items():
            norms.setdefault(name, []).append(norm)
        if self._trains_actor:
            self.optimizer.step()
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
        self._zero_gradients()
        return sums

    def _zero_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)

    def _loss(self, one: Prepared, mini_batch: MiniBatch) -> tuple[Tensor, Sums]:
        """This micro-batch's part of the loss, and its sums. Counts are those of the whole mini-batch."""
        trains_actor = self._trains_actor
        with torch.set_grad_enabled(trains_actor):
            hidden = self.policy.hidden(one.batch)
            logprobs, entropies = self.policy.logprobs_from(hidden, one.batch, self.temperature)
            losses, policy_losses, sums = self.objective.losses(one, logprobs, entropies, self.kl_coef)
        loss = self._aggregate(losses, one, mini_batch, self.config.algorithm.aggregation)
        sums["loss"] = loss.detach()
        sums["policy_loss"] = self._aggregate(policy_losses, one, mini_batch, self.config.algorithm.aggregation)
        if self.critic is None:
            return loss, sums
        critic_loss, critic_sums = self._critic_loss(one, hidden, mini_batch)
        return (loss + critic_loss if trains_actor else critic_loss), sums | critic_sums

    def _critic_loss(self, one: Prepared, hidden: Tensor, mini_batch: MiniBatch) -> tuple[Tensor, Sums]:
        critic = self.config.critic
        assert self.critic is not None and one.values is not None and one.targets is not None
        values = self.critic.values(one.batch, hidden)
        losses, sums = value_loss(values, one.values, one.targets, clip=critic.value_clip or None, kind=critic.loss)
        loss = self._aggregate(losses, one, mini_batch, "token-mean")
        return (critic.coef * loss if self.critic.is_shared else loss), sums

    def _aggregate(self, losses: Tensor, one: Prepared, mini_batch: MiniBatch, mode: str) -> Tensor:
        return aggregate_loss(
            losses,
            one.sequence_index,
            num_tokens=mini_batch.num_tokens,
            num_sequences=mini_batch.num_sequences,
            mode=mode,
            max_tokens=self.config.sampling.max_new_tokens,
        )

    def _clip_gradients(self, sums: Sums) -> dict[str, float]:
        """Scales gradients to the largest allowed norm; returns the norms before. Raises NonFiniteError."""
        if int(sums.get("non_finite", 0)):
            raise NonFiniteError(
                f"{int(sums['non_finite'])} of {int(sums['tokens'])} log-probs under the policy are NaN or"
                " infinite; no update made"
            )
        norms = {}
        if self._trains_actor:
            norms["grad_norm"] = self._clip("policy", self.policy.trainable_parameters(), sums)
        if self.critic is not None:
            norms["critic_grad_norm"] = self._clip("critic", list(self.critic.parameters()), sums)
        return norms

    def _clip(self, what: str, parameters: list[torch.nn.Parameter], sums: Sums) -> float:
        for parameter in parameters:
            # A batch without gradient is a step like any other: momentum and weight decay act on it too.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.grad_clip)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(sums.get("loss", norm))):
            raise NonFiniteError(
                f"{what}: gradient norm {float(norm)}, loss {float(sums.get('loss', 0.0))}: not finite; no update made"
            )
        return float(norm)

    def _adapt_kl(self, metrics: dict[str, float]) -> dict[str, float]:
        """Moves kl_coef towards algorithm.kl_target, for the next step; says which one this step used."""
        algorithm, used = self.config.algorithm, self.kl_coef
        if algorithm.kl_target == 0.0 or "kl_reference" not in metrics:
            return {}
        self.kl_coef = adapted_kl_coef(used, metrics["kl_reference"], algorithm.kl_target)
        return {"kl_coef": used}


def make_optimizer(parameters: list[torch.nn.Parameter], config: Config, lr: float) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms and biases."""
    learner = config.learner
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": learner.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(learner.betas[0], learner.betas[1]),
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for parameter_group in optimizer.param_groups:
        parameter_group["lr"] = lr


def warmed_up_lr(lr: float, warmup_steps: int, version: int) -> float:
    """Learning rate of the step from `version`: linear up to `lr` at the last warm-up step, then constant."""
    return lr * min(1.0, (version + 1) / (warmup_steps + 1))


def _layout_metrics(batch: PreparedBatch, groups: Sequence[Group]) -> dict[str, float]:
    micro_batches = [one.batch for mini_batch in batch.mini_batches for one in mini_batch.micro_batches]
    num_tokens = sum(group.num_tokens for group in groups)
    return {
        "micro_batches": float(len(micro_batches)),
        "padded_tokens": float(sum(one.padded_tokens for one in micro_batches)),
        "tokens_without_gradient": float(num_tokens - sum(one.num_tokens for one in micro_batches)),
    }
