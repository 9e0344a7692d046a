"""The border between the mathematics of a step and the model that is trained.

    step (plan, objective, metrics)  ──  rows, loss(index, outputs)  ──▶  engine (forward, backward, optimizer)
                                     ◀──  outputs, gradient norm, sums  ──

The engine owns the loop over micro-batches, the gradients and their norm, the optimizer and its state, and the
learning rate: a pipeline schedule calls back for each micro-batch, and a sharded model must know which is the last.
Everything that turns log-probs and values into a loss stays outside and is given to the engine as a function.

How the three models of a method become engines:

    actor      a `PolicyEngine`
    reference  no engine: a `frozen` forward pass of the actor's, which shares with it all weights that are not trained
    critic     on the actor's hidden states (critic.trunk=shared): a value head inside the actor's engine, which then
               has two *parts*, "policy" and "critic", each with gradient norm, optimizer and learning rate of its own
               with a trunk of its own (critic.trunk=own): a second engine, whose only part is "critic"

An update is made in two calls, `accumulate` and `update`, because a step with two engines must move both or neither:
the caller looks at the gradients of both in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.losses import Sums, merge_sums
from asyncrl.storage.tensor_files import FileProof
from asyncrl.trainer.engines.device_rows import DeviceRows
from asyncrl.trainer.packing import Rows
from asyncrl.weights.bytes.patch import SyncSource


@dataclass(frozen=True, slots=True)
class Want:
    """Which outputs a forward pass is for."""

    logprobs: bool = False
    entropies: bool = False  # beside the log-probs
    values: bool = False  # of a value head, or of the critic
    frozen: bool = False  # log-probs of the reference policy instead of those of the policy that is trained


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model says of the N completion tokens of a micro-batch. None: not wanted."""

    logprobs: Tensor | None = None  # float32 [N], at the temperature asked for
    entropies: Tensor | None = None  # float32 [N], in nats
    values: Tensor | None = None  # float32 [N], of the state before each token

    @property
    def each(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, entropies, values."""
        return self.logprobs, self.entropies, self.values


# (index of the micro-batch, its outputs) → (scalar loss with the gradient, sums without it).
LossFunction = Callable[[int, Outputs], tuple[Tensor, Sums]]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What `ModelEngine.accumulate` found, over all ranks. A norm is None where its part is not trained."""

    sums: Sums
    policy_norm: float | None = None  # before clipping
    critic_norm: float | None = None
    pass_s: tuple[float, ...] = ()  # what each micro-batch took on this rank, forward and backward

    def merged(self, other: Gradients) -> Gradients:
        """These gradients with those of the parts of another engine."""
        return Gradients(
            merge_sums(self.sums, other.sums),
            self.policy_norm if other.policy_norm is None else other.policy_norm,
            self.critic_norm if other.critic_norm is None else other.critic_norm,
            tuple(ours + theirs for ours, theirs in zip(self.pass_s, other.pass_s, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class PartState:
    """All that training changes of one part, by reference: copy or write it before the next update."""

    weights: dict[str, Tensor]  # by name, a tied tensor once
    optimizer: dict[str, dict[str, Tensor]]  # by name of the parameter: exp_avg, exp_avg_sq, step; empty before a step
    trained: tuple[str, ...]  # names of the parameters among the weights, in the model's order


@dataclass(frozen=True, slots=True)
class EngineState:
    """The parts of an engine, or of all engines of a step."""

    policy: PartState | None = None
    critic: PartState | None = None


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a policy must share with a checkpoint for its weights to mean the same."""

    architecture: str  # digest of the model's configuration
    update: str  # what of the model is trained, in words
    frozen: str  # digest of the weights that are not trained; empty where all are


class ModelEngine(Protocol):
    """One rank's share of a model that is trained. Rows are those of this rank; gradients are summed over ranks."""

    @property
    def device(self) -> torch.device:
        """Where outputs lie, and where the loss function finds its tensors."""
        ...

    @property
    def has_values(self) -> bool:
        """Whether `Want.values` can be answered."""
        ...

    def forward(self, rows: Sequence[Rows | DeviceRows], want: Want, temperature: float) -> list[Outputs]:
        """Outputs of each micro-batch, without gradient."""
        ...

    def accumulate(
        self,
        rows: Sequence[Rows | DeviceRows],
        want: Want,
        temperature: float,
        loss: LossFunction,
        *,
        max_norm: float,
        train_policy: bool = True,
    ) -> Gradients:
        """Forward and backward passes of all micro-batches, in order; their gradients add up.

        Gradients are then clipped, part by part, to `max_norm` (L2). A parameter without gradient gets zeros: momentum
        and weight decay act on it all the same. No weight has moved yet: `update` or `discard` must follow.

        train_policy  False: the part "policy" takes no gradient (`update` leaves it as it is), and with no other part
                      the loss function is called for its sums alone

        Norms that are not finite are returned, not raised: a caller with several engines decides for all of them.
        """
        ...

    def update(self) -> None:
        """One optimizer step of every part that `accumulate` made gradients for; then drops the gradients."""
        ...

    def discard(self) -> None:
        """Lets go of the gradients that are there, if any; weights and optimizer stay as they are."""
        ...

    def state(self) -> EngineState:
        """Weights and optimizer state."""
        ...

    def load_state(self, state: EngineState) -> None:
        """Copies weights and optimizer state of each part in; names and shapes must be those of `state`."""
        ...


class PolicyEngine(ModelEngine, Protocol):
    """The actor's engine: what is published, exported and compared with a reference."""

    @property
    def has_reference(self) -> bool:
        """Whether `Want.frozen` can be answered."""
        ...

    @property
    def prefers_shared_rows(self) -> bool:
        """Whether rows that share a prompt are computed correctly, and faster than plain rows."""
        ...

    def set_lr(self, lr: float) -> None:
        """Learning rate of the part "policy" from the next update on. That of a critic is constant."""
        ...

    def identity(self) -> ModelIdentity:
        """What checkpoints of this model have in common."""
        ...

    def tensors(self) -> SyncSource:
        """What generators must be sent, by reference: a `SnapshotBuffer` copies it after each step."""
        ...

    def sample_sequences(self, count: int, length: int, seed: int) -> list[np.ndarray]:
        """`count` sequences of `length` tokens, int32, which the policy finds likely: the canary."""
        ...

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs at temperature 1 by the policy as it is now, float32 [L - 1] for each sequence of L tokens.

        Computed as training computes them, in every layout of rows that it uses: where it has shared rows, every second
        sequence, the first among them, goes through one.
        """
        ...

    def export(self, folder: Path, source: Path | None) -> None:
        """Writes the policy in Hugging Face format; `source` is the model it began as. Raises CheckpointError."""
        ...

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None) -> dict[str, FileProof]:
        """Puts the policy into a checkpoint's folder: a Hugging Face model, and what `load_saved` needs besides.

        weights  CPU copies of those of `state`, which are written instead; None: all files but the weights

        Runs in a thread beside training. Returns size and digest of files it knows, by their paths below `folder`.
        """
        ...

    def load_saved(self, folder: Path) -> dict[str, Tensor]:
        """What this rank holds of the weights that training changes, by the names of `state`, from a checkpoint.

        Raises CheckpointError when others are there, and OSError, ValueError, RuntimeError or SafetensorError when
        they cannot be read.
        """
        ...

    def saved_bytes(self) -> int:
        """About what `save` writes, in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """The models of a step. A critic on the actor's hidden states is inside `actor`."""

    actor: PolicyEngine
    critic: ModelEngine | None = None

    @property
    def all(self) -> list[ModelEngine]:
        """The engines, the actor's first."""
        return [self.actor] if self.critic is None else [self.actor, self.critic]

    @property
    def has_critic(self) -> bool:
        """Whether there are values at all, from either engine."""
        return self.critic is not None or self.actor.has_values

    def state(self) -> EngineState:
        """Policy and critic, whichever engines they are in."""
        states = [engine.state() for engine in self.all]
        return EngineState(
            policy=next((state.policy for state in states if state.policy), None),
            critic=next((state.critic for state in states if state.critic), None),
        )

    def load_state(self, state: EngineState) -> None:
        """Takes over what `state` returned."""
        for engine in self.all:
            engine.load_state(state)
