"""One step: groups in, policy version v -> v + 1. No sockets, no clocks, no files.

    groups → plan → preparation → [mini-batch → actor loss, critic loss → gradients → update] × updates → figures

A step is `learner.epochs` x `learner.mini_batches` updates of the same batch, and always one policy version.
The same groups, weights and optimizer state give the same bits, in whatever order the groups come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.kl import adapted_kl_coef
from asyncrl.algorithms.losses import Sums, aggregate_loss
from asyncrl.algorithms.value_targets import value_loss
from asyncrl.config import Config
from asyncrl.config.method_checks import COMPARING
from asyncrl.errors import NonFiniteError
from asyncrl.report.rollouts.choice import choose
from asyncrl.report.rollouts.records import KeptRollout
from asyncrl.trainer.batch import MicroBatchData, MiniBatchData, Preparation
from asyncrl.trainer.engines.base import Engines, EngineState, Gradients, Outputs, Want
from asyncrl.trainer.kept_rollouts import TokenFigures, TokenNotes, kept_rollouts
from asyncrl.trainer.objective import ActorObjective
from asyncrl.trainer.packing import sorted_groups
from asyncrl.trainer.plan import BatchPlan
from asyncrl.trainer.shares import deal, pack_share, unpack_share
from asyncrl.trainer.step_metrics import batch_metrics, layout_metrics, pass_metrics, update_metrics
from asyncrl.trainer.world import World
from asyncrl.types import Group


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured; the names are those of `trainer.step_metrics`.

    Equal batches give equal metrics; times are beside them.
    """

    version: int  # the version that now exists
    metrics: dict[str, float]
    times: dict[str, float]
    kept: list[KeptRollout] = field(default_factory=list)  # on rank 0, as many as were asked for


@dataclass(frozen=True, slots=True)
class StepState:
    """All that the next step depends on; weights and optimizer state by reference."""

    version: int
    kl_coef: float
    engines: EngineState
    cpu_rng: Tensor
    cuda_rng: Tensor | None  # None without a GPU


class StepRunner:
    """Makes steps with the engines of actor and critic: it knows the method, they know the models."""

    def __init__(self, engines: Engines, config: Config, *, version: int = 0, world: World | None = None) -> None:
        """`engines` hold the models of `version`. Log-probs are taken at the temperature of sampling.

        world  the ranks that make each step together; None: this one alone
        """
        algorithm = config.algorithm
        assert engines.actor.has_reference or algorithm.kl_coef == 0.0, "kl_coef > 0 needs a reference policy"
        assert engines.has_critic == (algorithm.advantage == "gae"), "a critic, and only for algorithm.advantage=gae"
        self.config = config
        self.engines = engines
        self.version = version
        self.kl_coef = algorithm.kl_coef
        self.world = world or World.alone()
        self.preparation = Preparation(config, engines, self.world.data_ranks)
        self._objective = ActorObjective(config)
        self._passes: list[tuple[int, float]] = []  # inputs and seconds of each, in the step before

    def step(self, groups: Sequence[Group], *, keep: int = 0) -> StepResult:
        """Trains on one batch: weights and optimizer state move to version + 1. Rank 0 has the batch; others `follow`.

        keep  how many rollouts of the batch are kept in the result, with what the step made of their tokens

        Raises NonFiniteError when a log-prob, a loss or a gradient is NaN or infinite, and ShapeError or
        ProtocolError when a group does not fit (see `pack_groups`). If that happens before the first update, and
        with one update per step it always does, weights, optimizer state and version are as they were.
        """
        groups, version = sorted_groups(groups), self.version
        plan = self.preparation.plan(groups, version)
        assert plan.num_tokens > 0, "a step needs at least one group"
        choices = choose(plan.rewards.rewards, plan.advantages, keep, (self.config.run.seed, version)) if keep else []
        if choices:
            lengths = [rollout.num_tokens for group in groups for rollout in group.rollouts]
            kept = np.array([choice.number for choice in choices], dtype=np.int64)
            plan = replace(plan, kept=kept, kept_tokens=np.array(lengths, dtype=np.int64)[kept])
        own = plan
        if self.world.size > 1:
            packed = [pack_share(share) for share in deal(plan, self.world.num_shares)]
            own = unpack_share(
                self.world.scatter([packed[self.world.share_of(rank)] for rank in range(self.world.size)])
            )
        metrics = batch_metrics(groups, plan.is_flat, version) | layout_metrics(plan)
        if self.config.algorithm.advantage in COMPARING:
            metrics["zero_variance_share"] = float(plan.is_flat.mean())
        trained, figures = self._train(own)
        kept_now = kept_rollouts(groups, plan, choices, figures)
        return StepResult(self.version, metrics | trained, pass_metrics(self._passes), kept_now)

    def follow(self) -> None:
        """Takes this rank's part in the step that rank 0 makes; raises as `step` does, NonFiniteError on all ranks."""
        self._train(unpack_share(self.world.scatter(None)))

    def _train(self, plan: BatchPlan) -> tuple[dict[str, float], list[TokenFigures]]:
        """All updates of a step, from this rank's share of its plan. The figures are those of all ranks.

        Of the tokens of rollouts that are kept, too: in the order of `plan.kept`.
        """
        notes = TokenNotes(plan)
        self._passes = []
        mini_batches = self.preparation.forward(plan)
        self.preparation.finish(plan, mini_batches, self.kl_coef)
        lr = warmed_up_lr(self.config.learner.lr, self.config.learner.lr_warmup_steps, self.version)
        self.engines.actor.set_lr(lr)
        epochs = range(self.config.learner.epochs)
        updates = [self._update(mini_batch, notes) for _ in epochs for mini_batch in mini_batches]
        metrics = update_metrics(updates) | {"lr": lr}
        metrics |= self._adapt_kl(metrics)
        figures = notes.collect(mini_batches, self.world.data_ranks, one_update=len(updates) == 1)
        self.version += 1
        return metrics, figures

    def state(self) -> StepState:
        """Version, weights, optimizer and random state."""
        device = self.engines.actor.device
        return StepState(
            version=self.version,
            kl_coef=self.kl_coef,
            engines=self.engines.state(),
            cpu_rng=torch.get_rng_state(),
            cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def load_state(self, state: StepState) -> None:
        """Takes over what `state` returned; weights are copied."""
        self.version = state.version
        self.kl_coef = state.kl_coef
        self.engines.load_state(state.engines)
        torch.set_rng_state(state.cpu_rng)
        device = self.engines.actor.device
        if state.cuda_rng is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state.cuda_rng, device)

    # -- one update ------------------------------------------------------------------------------------------------

    @property
    def _trains_actor(self) -> bool:
        return not self.engines.has_critic or self.version >= self.config.critic.warmup_steps

    def _update(self, mini_batch: MiniBatchData, notes: TokenNotes) -> Gradients:
        """One optimizer update from one mini-batch, of all engines or of none."""
        try:
            gradients = self._gradients(mini_batch, notes)
            _require_finite(gradients)
        except BaseException:
            # Whatever ends an update, an interrupt too, must leave no gradient for the next one to add to.
            for engine in self.engines.all:
                engine.discard()
            raise
        inputs = [data.rows.num_inputs for data in mini_batch.micro_batches]
        self._passes += zip(inputs, gradients.pass_s, strict=True)
        for engine in self.engines.all:
            engine.update()
        return gradients

    def _gradients(self, mini_batch: MiniBatchData, notes: TokenNotes) -> Gradients:
        """Gradients of every engine, accumulated over the micro-batches."""
        rows = [data.rows for data in mini_batch.micro_batches]
        actor, critic = self.engines.actor, self.engines.critic
        temperature, max_norm = self.config.sampling.temperature, self.config.learner.grad_clip

        def actor_loss(index: int, outputs: Outputs) -> tuple[Tensor, Sums]:
            assert outputs.logprobs is not None
            notes.take(mini_batch.micro_batches[index], outputs.logprobs)
            loss, sums = self._actor_loss(mini_batch, index, outputs)
            return _without_weight(outputs, sums) if mini_batch.micro_batches[index].is_dummy else (loss, sums)

        def critic_loss(index: int, outputs: Outputs) -> tuple[Tensor, Sums]:
            loss, sums = self._critic_loss(mini_batch, index, outputs)
            return _without_weight(outputs, sums) if mini_batch.micro_batches[index].is_dummy else (loss, sums)

        want = Want(logprobs=True, entropies=True, values=actor.has_values)
        gradients = actor.accumulate(
            rows, want, temperature, actor_loss, max_norm=max_norm, train_policy=self._trains_actor
        )
        if critic is None:
            return gradients
        return gradients.merged(critic.accumulate(rows, Want(values=True), temperature, critic_loss, max_norm=max_norm))

    def _actor_loss(self, mini_batch: MiniBatchData, index: int, outputs: Outputs) -> tuple[Tensor, Sums]:
        """A micro-batch's part of the actor's loss and, on a shared trunk, of the critic's; sums for the metrics."""
        assert outputs.logprobs is not None and outputs.entropies is not None
        data, mode = mini_batch.micro_batches[index], self.config.algorithm.aggregation
        losses, policy_losses, sums = self._objective.losses(data, outputs.logprobs, outputs.entropies, self.kl_coef)
        loss = self._aggregate(losses, data, mini_batch, mode)
        sums["loss"] = loss.detach()
        sums["policy_loss"] = self._aggregate(policy_losses, data, mini_batch, mode)
        if outputs.values is None:
            return loss, sums
        critic_loss, critic_sums = self._critic_loss(mini_batch, index, outputs)
        return loss + self.config.critic.coef * critic_loss, sums | critic_sums

    def _critic_loss(self, mini_batch: MiniBatchData, index: int, outputs: Outputs) -> tuple[Tensor, Sums]:
        """A micro-batch's part of the critic's loss; sums for the metrics."""
        data, critic = mini_batch.micro_batches[index], self.config.critic
        assert outputs.values is not None and data.values is not None and data.targets is not None
        losses, sums = value_loss(
            outputs.values, data.values, data.targets, clip=critic.value_clip or None, kind=critic.loss
        )
        return self._aggregate(losses, data, mini_batch, "token-mean"), sums

    def _aggregate(self, losses: Tensor, data: MicroBatchData, mini_batch: MiniBatchData, mode: str) -> Tensor:
        return aggregate_loss(
            losses,
            data.sequence_index,
            num_tokens=mini_batch.num_tokens,
            num_sequences=mini_batch.num_sequences,
            mode=mode,
            max_tokens=self.config.sampling.max_new_tokens,
        )

    def _adapt_kl(self, metrics: dict[str, float]) -> dict[str, float]:
        """Moves kl_coef towards algorithm.kl_target, for the next step; says which one this step used."""
        algorithm, used = self.config.algorithm, self.kl_coef
        if algorithm.kl_target == 0.0 or "kl_reference" not in metrics:
            return {}
        self.kl_coef = adapted_kl_coef(used, metrics["kl_reference"], algorithm.kl_target)
        return {"kl_coef": used}


def warmed_up_lr(lr: float, warmup_steps: int, version: int) -> float:
    """Learning rate of the step from `version`: linear up to `lr` at the last warm-up step, then constant."""
    return lr * min(1.0, (version + 1) / (warmup_steps + 1))


def _without_weight(outputs: Outputs, sums: Sums) -> tuple[Tensor, Sums]:
    """Loss and sums of a dummy: nothing, but with a backward pass of its own, and the names that all ranks have."""
    present = (outputs.logprobs, outputs.entropies, outputs.values)
    loss = sum((values.sum() for values in present if values is not None), torch.zeros(()))
    return 0.0 * loss, {name: torch.zeros_like(value) for name, value in sums.items()}


def _require_finite(gradients: Gradients) -> None:
    """Raises NonFiniteError when log-probs, loss or gradient norms of an update are NaN or infinite."""
    sums = gradients.sums
    if int(sums.get("non_finite", 0)):
        raise NonFiniteError(
            f"{int(sums['non_finite'])} of {int(sums['tokens'])} log-probs under the policy are NaN or "
            "infinite; no update made"
        )
    loss = float(sums.get("loss", 0.0))
    for part, norm in (("policy", gradients.policy_norm), ("critic", gradients.critic_norm)):
        if norm is not None and not (math.isfinite(norm) and math.isfinite(loss)):
            raise NonFiniteError(f"{part}: gradient norm {norm}, loss {loss}: not finite; no update made")
