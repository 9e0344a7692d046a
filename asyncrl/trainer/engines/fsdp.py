"""The engine of several ranks: torch's FSDP2. Each rank holds a slice of every tensor, and trains on rows of its own.

    layer   gathered for its forward and for its backward pass, and let go of after each
    root    embedding, norm and head. Trunk, head and value head are ONE forward pass of `PolicyModule`: outside of a
            forward pass no weight is whole

With learner.sequence_parallel, neighbouring ranks have the same rows. Each computes its slice of them, all know the
outputs for all tokens, and each loss is computed by all of them from these: nothing outside sees that rows were cut.
Of the loss's gradient a rank takes the part of its own tokens, so that the sum over ranks has each token once.

With learner.replicas, ranks hold several copies of the model, each in slices on its own ranks: see `trainer.replicas`.
Layers are gathered within a copy; gradients are summed within it, and then over all copies.

Gradients are summed over ranks, not averaged: losses are divided by counts of the whole batch. With
model.dtype=bfloat16 passes take the weights as bfloat16, as generators do; masters, optimizer state and the sums of
gradients are float32.

Every method that computes is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import copy
import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from asyncrl.algorithms.losses import Sums
from asyncrl.algorithms.reducer import Reducer
from asyncrl.config import Config
from asyncrl.storage.tensor_files import FileProof
from asyncrl.trainer.critic import Critic, load_critic
from asyncrl.trainer.engines.base import Engines, ModelIdentity, Outputs, Want
from asyncrl.trainer.engines.device_rows import DeviceRows, on_device
from asyncrl.trainer.engines.export import export_model, read_trained, write_model
from asyncrl.trainer.engines.gradient_loop import GradientLoop
from asyncrl.trainer.engines.lora import adapters_off
from asyncrl.trainer.engines.part import TrainedPart
from asyncrl.trainer.engines.policy import Policy, load_policy
from asyncrl.trainer.engines.recomputing import recompute_activations
from asyncrl.trainer.engines.sequence_parallel import OwnSlice, check_sequence_parallel
from asyncrl.trainer.engines.single import critic_part, saved_bytes
from asyncrl.trainer.engines.stored_weights import StoredWeights
from asyncrl.trainer.engines.trainable import describe_update
from asyncrl.trainer.engines.trunk import check_rotary, is_packed
from asyncrl.trainer.packing import Rows, doubled_rows, plain_rows
from asyncrl.trainer.replicas import check_loaded, mesh_of
from asyncrl.trainer.world import World
from asyncrl.weights.bytes.patch import SyncSource

log = logging.getLogger(__name__)

Probe = Callable[[], None]  # what is done while the weights of a module are whole


def load_fsdp_engines(config: Config, device: torch.device, world: World) -> Engines:
    """Actor, reference and critic that `config` names, sharded over the ranks of `world`; see `load_engines`."""
    policy = load_policy(config.model, torch.device("cpu"), update=config.update, seed=config.run.seed, stored=True)
    return fsdp_engines_for(policy, config, device, world, critic=load_critic(config, policy, stored=True))


def fsdp_engines_for(
    policy: Policy, config: Config, device: torch.device, world: World, *, critic: Critic | None = None
) -> Engines:
    """Engines around models that are whole on the CPU, the same on every rank, or whose weights are in their files.

    These become the rank's shards.
    """
    is_shared = critic is not None and critic.is_shared
    actor = FsdpPolicyEngine(policy, config, device, world, value_head=critic if is_shared else None)
    if critic is None or is_shared:
        return Engines(actor)
    return Engines(actor, FsdpCriticEngine(critic, config, device, world))


class PolicyModule(nn.Module):
    """All that is asked of a policy, as one module: its weights are whole inside of `forward` and nowhere else."""

    def __init__(self, policy: Policy, value_head: Critic | None = None) -> None:
        super().__init__()
        self.model: nn.Module = policy.model
        self.value_head = value_head
        self.policy = policy

    def forward(
        self, rows: Rows | DeviceRows | Probe, want: Want | None, temperature: float, train_policy: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs, entropies and values [N] as `want` says; without `train_policy` only values carry a gradient.

        rows  a function: it is called, and nothing comes back
        want  None: the logits [N, V] in the place of log-probs
        """
        if callable(rows):
            rows()
            return None, None, None
        logprobs = entropies = values = None
        with torch.set_grad_enabled(train_policy and torch.is_grad_enabled()):
            hidden = self.policy.hidden(rows)
            if want is None:
                return nn.functional.linear(hidden, self.policy.head_weight), None, None
            if want.logprobs:
                logprobs, entropies = self.policy.logprobs_from(hidden, rows, temperature, entropies=want.entropies)
        if want.values:
            assert self.value_head is not None, "there is no value head"
            values = self.value_head.values(rows, hidden).clone()  # FSDP's hooks want no view
        return logprobs, entropies, values


class CriticModule(nn.Module):
    """A critic with a trunk of its own, as one module."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, rows: Rows | DeviceRows | Probe) -> Tensor | None:
        """Values [N]; of a function, which is called, None."""
        if callable(rows):
            rows()
            return None
        return self.critic.values(rows).clone()  # FSDP's hooks want no view


class FsdpEngine(GradientLoop):
    """What the sharded engines of actor and critic have in common."""

    def __init__(
        self,
        root: nn.Module,
        world: World,
        device: torch.device,
        policy: TrainedPart | None,
        critic: TrainedPart | None,
        *,
        offloads: bool = False,
    ) -> None:
        """offloads: gradients are kept in the memory of the host."""
        super().__init__(policy, critic)
        self.root = root
        self.world = world
        self._device = device
        # On a GPU each pass adds its gradients into the shards: whole gradients of a large model would not fit.
        self.sums_each_pass = device.type == "cuda"
        # Over replicas they are then summed once, after the last pass; till then the sums wait on the GPU.
        self.sums_replicas_each_pass = offloads

    @property
    def device(self) -> torch.device:
        """See `ModelEngine.device`."""
        return self._device

    def _begin_pass(self, *, is_last: bool) -> None:
        assert isinstance(self.root, FSDPModule)
        self.root.set_requires_gradient_sync(is_last or self.sums_each_pass)
        self.root.set_requires_all_reduce(is_last or (self.sums_each_pass and self.sums_replicas_each_pass))
        self.root.set_is_last_backward(is_last)

    def _over_ranks(self, sums: Sums) -> Sums:
        return sums if self.world.size == 1 else sums_of_ranks(sums, self.world.data_ranks)

    def _outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        group = self.world.sequence_group
        if group is None:
            return self._own_outputs(rows, want, temperature, train_policy=train_policy)
        own = OwnSlice(on_device(rows, self.device), group)
        parts = self._own_outputs(own.rows, want, temperature, train_policy=train_policy)
        return Outputs(*(part if part is None else own.whole(part) for part in parts.each))

    @abstractmethod
    def _own_outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        """`_outputs` for the completion tokens of `rows`, which may be a slice of those that ranks share."""


class FsdpPolicyEngine(FsdpEngine):
    """The actor, its reference, and a value head on its hidden states; see `PolicyEngine`."""

    def __init__(
        self, policy: Policy, config: Config, device: torch.device, world: World, *, value_head: Critic | None = None
    ) -> None:
        self.policy = policy
        self.value_head = value_head
        if policy.weights is not None and policy.update.what != "full":
            policy.frozen_digests = policy.weights.frozen_digests(policy.model, world)
        self._digests = policy.frozen_digests if policy.update.what != "full" else {}
        self._has_reference = config.algorithm.kl_coef > 0
        self._reference: PolicyModule | None = None
        if self._has_reference and policy.update.what != "lora":
            frozen = _frozen_copy(policy)
            self._reference = PolicyModule(frozen)
            shard(self._reference, config, device, world)
            _read_weights(frozen.weights, frozen.model, config, device)
            check_loaded(world, frozen.model, "the reference policy")
            if frozen.weights is not None:
                self._reference(frozen.check, None, 1.0, False)
                _agree_on_rows(frozen.model, world)
        _freeze_in_bfloat16(policy.model, policy.dtype)
        policy.autocast, policy.in_one_call = "float32", True
        recompute_activations(layers_of(policy.model), config.learner.activation_checkpointing)
        root = PolicyModule(policy, value_head)
        shard(root, config, device, world, value_head=value_head)
        _read_weights(policy.weights, policy.model, config, device)
        check_loaded(world, policy.model, "the policy")
        if policy.weights is not None:
            root(policy.check, None, 1.0, False)
            _agree_on_rows(policy.model, world)
        _check_sequences(policy.model, world, f"model.path={config.model.path}")
        self._shares_rows = device.type == "cpu" and policy.allows_shared_rows
        check_rotary(root, config.model.max_length)
        learner = config.learner
        part = TrainedPart(policy.trained_parameters(), policy.checkpoint_tensors(), learner, learner.lr)
        critic = None if value_head is None else critic_part(value_head, config)
        super().__init__(root, world, device, part, critic, offloads=learner.offload_optimizer)
        self.optimizer = part.optimizer

    @property
    def has_values(self) -> bool:
        """See `ModelEngine.has_values`."""
        return self.value_head is not None

    @property
    def has_reference(self) -> bool:
        """See `PolicyEngine.has_reference`."""
        return self._has_reference

    @property
    def prefers_shared_rows(self) -> bool:
        """See `PolicyEngine.prefers_shared_rows`."""
        return self._shares_rows

    def _own_outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        if not want.frozen:
            return Outputs(*self.root(rows, want, temperature, train_policy))
        assert self._has_reference, "there is no reference policy"
        own = Want(logprobs=True)
        if self._reference is not None:
            return Outputs(*self._reference(rows, own, temperature, False))
        with adapters_off(self.policy.model):
            return Outputs(*self.root(rows, own, temperature, False))

    def set_lr(self, lr: float) -> None:
        """See `PolicyEngine.set_lr`."""
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr

    def identity(self) -> ModelIdentity:
        """See `PolicyEngine.identity`."""
        frozen = sha256(repr(sorted(self._digests.items())).encode()).hexdigest()[:16] if self._digests else ""
        return ModelIdentity(self.policy.architecture, describe_update(self.policy.update), frozen)

    def tensors(self) -> SyncSource:
        """See `PolicyEngine.tensors`."""
        return self.policy.sync_source()

    @torch.no_grad()
    def sample_sequences(self, count: int, length: int, seed: int) -> list[np.ndarray]:
        """See `PolicyEngine.sample_sequences`. Rank 0's samples are everybody's."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.policy.vocab_size, (count, 1), generator=generator)
        for _ in range(length - 1):
            # One more token is asked for, whichever: its logits are those of the next.
            rows = plain_rows([[*row, 0] for row in tokens.tolist()])
            last = np.arange(1, count + 1) * tokens.shape[1] - 1
            logits = self.root(rows, None, 1.0, False)[0][torch.from_numpy(last).to(self.device)]
            probabilities = torch.softmax(logits.float().cpu(), dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        own = tokens.numpy().astype(np.int32)
        is_first = self.world.rank == 0
        agreed = self.world.scatter([own.tobytes()] * self.world.size if is_first else None)
        return list(np.frombuffer(agreed, dtype=np.int32).reshape(count, length).copy())

    @torch.no_grad()
    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `PolicyEngine.score`. Every rank computes whole rows, those too that share sequences."""
        if not self._shares_rows:
            return self._scores(plain_rows(sequences), sequences, copies=1)
        scores: list[np.ndarray] = [np.empty(0)] * len(sequences)
        scores[0::2] = self._scores(doubled_rows(sequences[0::2]), sequences[0::2], copies=2)
        if len(sequences) > 1:
            scores[1::2] = self._scores(plain_rows(sequences[1::2]), sequences[1::2], copies=1)
        return scores

    def _scores(self, rows: Rows, sequences: Sequence[np.ndarray], *, copies: int) -> list[np.ndarray]:
        """Log-probs of each sequence; where it stands there several times, of the last copy."""
        logprobs = self.root(rows, Want(logprobs=True), 1.0, False)[0]
        cuts = np.cumsum(np.repeat([len(tokens) - 1 for tokens in sequences], copies))[:-1]
        return np.split(logprobs.float().cpu().numpy(), cuts)[copies - 1 :: copies]

    def export(self, folder: Path, source: Path | None) -> None:
        """See `PolicyEngine.export`."""
        export_model(self.policy, source, folder, rank=self.world.rank)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None) -> dict[str, FileProof]:
        """See `PolicyEngine.save`."""
        return write_model(self.policy, folder, weights)

    def load_saved(self, folder: Path) -> dict[str, Tensor]:
        """See `PolicyEngine.load_saved`."""
        return read_trained(self.policy, folder)

    def saved_bytes(self) -> int:
        """See `PolicyEngine.saved_bytes`."""
        return saved_bytes(self.policy)


class FsdpCriticEngine(FsdpEngine):
    """A critic with a trunk of its own; see `ModelEngine`."""

    def __init__(self, critic: Critic, config: Config, device: torch.device, world: World) -> None:
        assert critic.trunk is not None, "a critic on the actor's hidden states is part of the actor's engine"
        key = f"critic.path={config.critic.path}" if config.critic.path else f"model.path={config.model.path}"
        self.critic = critic
        critic.autocast, critic.in_one_call = "float32", True
        recompute_activations(layers_of(critic.trunk), config.learner.activation_checkpointing)
        root = CriticModule(critic)
        shard(root, config, device, world, value_head=critic)
        _read_weights(critic.weights, critic.trunk, config, device)
        if critic.weights is not None:
            with torch.no_grad():
                root(critic.check)
            _agree_on_rows(critic.trunk, world)
        _check_sequences(critic.trunk, world, key)
        offloads = config.learner.offload_optimizer
        super().__init__(root, world, device, None, critic_part(critic, config), offloads=offloads)

    @property
    def has_values(self) -> bool:
        """See `ModelEngine.has_values`."""
        return True

    def _own_outputs(self, rows: Rows | DeviceRows, want: Want, temperature: float, *, train_policy: bool) -> Outputs:
        assert want.values and not want.logprobs, "a critic gives values alone"
        return Outputs(values=self.root(rows))


def shard(
    root: nn.Module, config: Config, device: torch.device, world: World, *, value_head: Critic | None = None
) -> None:
    """Makes the parameters of `root` this rank's slices of them, on `device` or, if offloaded, on the CPU.

    value_head  its linear layer computes in float32, whatever the others do
    """
    mesh = mesh_of(world, device)
    offload = OffloadPolicy()
    if config.learner.offload_optimizer:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    narrow = MixedPrecisionPolicy()
    if config.model.dtype == "bfloat16":
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # The root as well lets go of its weights after a forward pass: between passes nothing but slices is to be seen.
    make = functools.partial(fully_shard, mesh=mesh, offload_policy=offload, reshard_after_forward=True)
    if value_head is not None:
        make(value_head.head, mp_policy=MixedPrecisionPolicy())
    for layer in layers_of(root):
        make(layer, mp_policy=narrow)
    make(root, mp_policy=narrow)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no reduction that multiplies


def _read_weights(weights: StoredWeights | None, model: nn.Module, config: Config, device: torch.device) -> None:
    """After sharding: reads this rank's slices of weights that are in their files. Raises ModelError."""
    if weights is not None:
        weights.fill(model, torch.device("cpu") if config.learner.offload_optimizer else device)


def _agree_on_rows(model: PreTrainedModel, world: World) -> None:
    """Has this rank pack rows only if all ranks do, after each has tried it. Raises RankLost.

    Where a rank was lost while they tried, the others took the error for that of a model that packs wrongly.
    """
    if int(world.sum(torch.tensor([int(is_packed(model))]))) < world.size and is_packed(model):
        model.set_attn_implementation("sdpa")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model: what it says must not be split."""
    whole: set[str] = set()
    for module in model.modules():
        whole |= set(getattr(module, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in whole]
    if not layers:
        log.warning("%s names no layers: it is gathered as a whole in every pass", type(model).__name__)
    return layers


def sums_of_ranks(sums: Sums, ranks: Reducer) -> Sums:
    """Sums over all ranks, in float64, by one collective, and keys in `_max` by another. All have the same keys."""
    if not sums:
        return sums
    reduced: Sums = {}
    for is_max, reduce in ((False, ranks.sum), (True, ranks.largest)):
        names = sorted(name for name in sums if name.endswith("_max") == is_max)
        if names:
            flat = reduce(torch.cat([sums[name].detach().double().reshape(-1) for name in names]))
            parts = flat.split([sums[name].numel() for name in names])
            reduced |= {name: part.reshape(sums[name].shape) for name, part in zip(names, parts, strict=True)}
    return {name: reduced[name] for name in sums}


def _check_sequences(model: PreTrainedModel, world: World, key: str) -> None:
    check_sequence_parallel(model.config, world.sequence_ranks, key, is_packed=is_packed(model))


def _frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for good, in the dtype it computes in."""
    model = copy.deepcopy(policy.model)  # of a model without memory as much
    frozen = Policy(model, dtype=policy.dtype, source=policy.source, weights=policy.weights).freeze()
    _freeze_in_bfloat16(frozen.model, frozen.dtype)
    frozen.autocast, frozen.in_one_call = "float32", True
    return frozen


def _freeze_in_bfloat16(model: nn.Module, dtype: str) -> None:
    """Parameters that are not trained are held as they are computed with; buffers are left alone."""
    if dtype == "bfloat16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
