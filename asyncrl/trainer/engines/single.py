"""The engine of one process and one device: plain backward passes, AdamW, nothing sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.storage.tensor_files import FileProof
from asyncrl.trainer.critic import Critic, load_critic
from asyncrl.trainer.engines.base import (
    Engines,
    ModelIdentity,
    Outputs,
    Want,
)
from asyncrl.trainer.engines.device_rows import DeviceRows
from asyncrl.trainer.engines.export import export_model, read_trained, write_model
from asyncrl.trainer.engines.gradient_loop import GradientLoop
from asyncrl.trainer.engines.part import TrainedPart
from asyncrl.trainer.engines.policy import Policy, Reference, load_policy
from asyncrl.trainer.engines.trainable import describe_update
from asyncrl.trainer.packing import Rows
from asyncrl.weights.bytes.patch import SyncSource


def load_engines(config: Config, device: torch.device) -> Engines:
    """Actor, reference and critic that `config` names, at the start of a run.

    Raises ModelError when a folder cannot be loaded, ConfigError when the section `update` names nothing in the model.
    """
    policy = load_policy(config.model, device, update=config.update, seed=config.run.seed)
    reference = policy.initial_policy() if config.algorithm.kl_coef > 0 else None
    return engines_for(policy, config, reference=reference, critic=load_critic(config, policy))


def engines_for(
    policy: Policy, config: Config, *, reference: Reference | None = None, critic: Critic | None = None
) -> Engines:
    """Engines around models that are there already."""
    if critic is None:
        return Engines(SinglePolicyEngine(policy, config, reference=reference))
    if critic.is_shared:
        return Engines(SinglePolicyEngine(policy, config, reference=reference, value_head=critic))
    return Engines(SinglePolicyEngine(policy, config, reference=reference), SingleCriticEngine(critic, config))


class SinglePolicyEngine(GradientLoop):
    """A policy, the reference it is compared with, and a value head on its hidden states; see `PolicyEngine`."""

    def __init__(
        self, policy: Policy, config: Config, *, reference: Reference | None = None, value_head: Critic | None = None
    ) -> None:
        learner = config.learner
        part = TrainedPart(policy.trained_parameters(), policy.checkpoint_tensors(), learner, learner.lr)
        super().__init__(part, None if value_head is None else critic_part(value_head, config))
        self.optimizer = part.optimizer
        self.policy = policy
        self.reference = reference
        self.value_head = value_head

    @property
    def device(self) -> torch.device:
        """See `ModelEngine.device`."""
        return self.policy.device

    @property
    def has_values(self) -> bool:
        """See `ModelEngine.has_values`."""
        return self.value_head is not None

    @property
    def has_reference(self) -> bool:
        """See `PolicyEngine.has_reference`."""
        return self.reference is not None

    @property
    def prefers_shared_rows(self) -> bool:
        """See `PolicyEngine.prefers_shared_rows`."""
        # On a GPU the kernel for packed rows knows no shared ones.
        return self.device.type == "cpu" and self.policy.allows_shared_rows

    def _outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        if want.frozen:
            assert self.reference is not None, "there is no reference policy"
            return Outputs(*self.reference.logprobs(rows, temperature, entropies=want.entropies))
        outputs = Outputs()
        with torch.set_grad_enabled(train_policy):
            hidden = self.policy.hidden(rows)
            if want.logprobs:
                outputs = Outputs(*self.policy.logprobs_from(hidden, rows, temperature, entropies=want.entropies))
        if want.values:
            assert self.value_head is not None, "there is no value head"
            outputs = replace(outputs, values=self.value_head.values(rows, hidden))
        return outputs

    def set_lr(self, lr: float) -> None:
        """See `PolicyEngine.set_lr`."""
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr

    def identity(self) -> ModelIdentity:
        """See `PolicyEngine.identity`."""
        digests = self.policy.frozen_digests
        frozen = sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16] if digests else ""
        return ModelIdentity(self.policy.architecture, describe_update(self.policy.update), frozen)

    def tensors(self) -> SyncSource:
        """See `PolicyEngine.tensors`."""
        return self.policy.sync_source()

    def sample_sequences(self, count: int, length: int, seed: int) -> list[np.ndarray]:
        """See `PolicyEngine.sample_sequences`."""
        return self.policy.sample_sequences(count, length, seed)

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `PolicyEngine.score`."""
        if not self.prefers_shared_rows:
            return self.policy.score(sequences)
        scores: list[np.ndarray] = [np.empty(0)] * len(sequences)
        scores[0::2] = self.policy.score_in_shared_rows(sequences[0::2])
        scores[1::2] = self.policy.score(sequences[1::2])
        return scores

    def export(self, folder: Path, source: Path | None) -> None:
        """See `PolicyEngine.export`."""
        export_model(self.policy, source, folder)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None) -> dict[str, FileProof]:
        """See `PolicyEngine.save`."""
        return write_model(self.policy, folder, weights)

    def load_saved(self, folder: Path) -> dict[str, Tensor]:
        """See `PolicyEngine.load_saved`."""
        return read_trained(self.policy, folder)

    def saved_bytes(self) -> int:
        """See `PolicyEngine.saved_bytes`."""
        return saved_bytes(self.policy)


class SingleCriticEngine(GradientLoop):
    """A critic with a trunk of its own; see `ModelEngine`."""

    def __init__(self, critic: Critic, config: Config) -> None:
        assert not critic.is_shared, "a critic on the actor's hidden states is part of the actor's engine"
        super().__init__(None, critic_part(critic, config))
        self.critic = critic

    @property
    def device(self) -> torch.device:
        """See `ModelEngine.device`."""
        return self.critic.head.weight.device

    @property
    def has_values(self) -> bool:
        """See `ModelEngine.has_values`."""
        return True

    def _outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        assert want.values and not want.logprobs, "a critic gives values alone"
        return Outputs(values=self.critic.values(rows))


def saved_bytes(policy: Policy) -> int:
    """See `PolicyEngine.saved_bytes`."""
    trained: int = sum(tensor.nbytes for tensor in policy.checkpoint_tensors().values())
    if policy.update.what == "full":
        return trained
    count: int = sum(parameter.numel() for parameter in policy.model.parameters())
    element_bytes = 2 if policy.dtype == "bfloat16" else 4
    return trained + count * element_bytes


def critic_part(critic: Critic, config: Config) -> TrainedPart:
    """What is trained of a critic."""
    parameters = dict(critic.named_parameters())
    weights = {name: parameter.data for name, parameter in parameters.items()}
    return TrainedPart(parameters, weights, config.learner, config.critic.lr)
