"""Methods and models that several ranks must compute as one does, and the mutants that they must not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from asyncrl.config import Config
from asyncrl.trainer.critic import Critic
from asyncrl.trainer.engines.fsdp import fsdp_engines_for
from asyncrl.trainer.engines.policy import Policy
from asyncrl.trainer.engines.single import engines_for
from asyncrl.trainer.engines.trainable import apply_update
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import World
from tests.trainer.tiny import random_groups, tiny_model

CPU = torch.device("cpu")
HIDDEN = 16


@dataclass(frozen=True)
class Case:
    """One configuration, of a model whose vocabulary of 23 divides by no number of ranks."""

    settings: dict[str, Any] = field(default_factory=dict)
    groups: int = 4
    group_size: int = 4
    tied: bool = True
    dtype: torch.dtype = torch.float64
    pack: bool = True  # False: the model's rows are not packed
    lengths: tuple[tuple[int, int], tuple[int, int]] = ((2, 8), (1, 9))  # of prompts, of completions


PPO = {"algorithm.advantage": "gae"}
LORA = {"update.what": "lora", "update.lora_rank": 4}
CASES = {
    "grpo": Case(),
    "untied": Case(tied=False),
    "float32": Case(dtype=torch.float32),
    "kl_in_reward": Case({"algorithm.kl_coef": 0.05, "algorithm.kl_in": "reward", "algorithm.kl_estimator": "k1"}),
    "ppo_own_trunk": Case(PPO),
    "ppo_shared_trunk": Case(PPO | {"critic.trunk": "shared", "critic.warmup_steps": 2}),
    "decoupled": Case({"algorithm.proximal": "recomputed", "learner.epochs": 2, "learner.mini_batches": 2}),
    "m2po": Case({"algorithm.masks": ["second_moment"]}),
    "lora": Case(LORA | {"algorithm.kl_coef": 0.05}),
    "partial": Case({"update.what": "partial", "update.names": ["model.layers.1.*"], "algorithm.kl_coef": 0.05}),
    "few_rows": Case(PPO, groups=1, group_size=2),
    "not_packed": Case(pack=False),
    "selective": Case({"learner.activation_checkpointing": "selective"}),
    "full": Case({"learner.activation_checkpointing": "full"}),
    "offloaded": Case({"learner.offload_optimizer": True}),
}
# With these, several ranks share the tokens of each row.
GSPO = {"algorithm.loss": "gspo", "algorithm.masks": ["sequence_band"], "algorithm.correction": "sequence_tis"}
SHARED_SEQUENCES = {
    name: CASES[name]
    for name in ("grpo", "kl_in_reward", "ppo_own_trunk", "ppo_shared_trunk", "m2po", "lora", "partial", "full")
} | {
    "selective": CASES["selective"],
    "gspo": Case(GSPO),
    "entropy": Case({"algorithm.entropy_coef": 0.1}),
    # Rows of one to three inputs, each alone in its pass: ranks without inputs, without tokens, dummies.
    "few_inputs": Case(PPO | {"learner.micro_batch_tokens": 1}, groups=3, group_size=3, lengths=((1, 2), (1, 2))),
}
# Cases and mutants of two ranks in the quick suite: which share all rows; which have a copy of the model each.
SHARING = (("gspo", "few_inputs"), ("inputs_of_another_slice", "gradients_counted_by_each"))
COPIES = (("grpo s1 x2",), ("replicas_by_themselves s1 x2", "summed_each_pass s1 x2"))
LONG = ("grpo", "ppo_own_trunk", "ppo_shared_trunk", "decoupled", "m2po", "lora")  # more than a few steps
MUTANTS = {
    "mean_of_ranks": "grpo",
    "dummies_that_count": "few_rows",
    "whitening_per_rank": "ppo_own_trunk",
    "moments_per_rank": "m2po",
    "kl_per_rank": "kl_in_reward",
}
REPLICA_MUTANTS = {"replicas_by_themselves": "grpo"}
# Of an engine, as it is on a GPU.
VARIANTS = {"summed_each_pass": "ppo_shared_trunk", "summed_each_pass_offloaded": "offloaded"}
SEQUENCE_MUTANTS = {
    "inputs_of_another_slice": "grpo",
    "positions_of_another_slice": "grpo",
    "sums_counted_by_each": "grpo",
    "gradients_counted_by_each": "grpo",
    "kl_counted_by_each": "kl_in_reward",
}


def config_of(case: Case) -> Config:
    config = Config()
    config.learner.lr = 1e-2
    config.learner.micro_batch_tokens = 40  # several passes on each rank
    for name, value in case.settings.items():
        section, key = name.split(".")
        assert hasattr(getattr(config, section), key), name
        setattr(getattr(config, section), key, value)
    return config


def runner_of(case: Case, world: World | None = None) -> StepRunner:
    """Over the ranks of `world`, or on one engine that knows nothing of ranks."""
    config = config_of(case)
    policy = Policy(tiny_model(tied=case.tied, hidden=HIDDEN))
    policy.update = config.update
    apply_update(policy.model, config.update)
    if not case.pack:
        policy.model.set_attn_implementation("sdpa")
    policy.model.to(case.dtype)
    critic = _critic(config, case) if config.algorithm.advantage == "gae" else None
    if world is not None:
        return StepRunner(fsdp_engines_for(policy, config, CPU, world, critic=critic), config, world=world)
    reference = policy.initial_policy() if config.algorithm.kl_coef > 0 else None
    return StepRunner(engines_for(policy, config, reference=reference, critic=critic), config)


def groups_of(case: Case, step: int):
    prompt, completion = case.lengths
    return random_groups(case.groups, case.group_size, seed=100 + step, prompt=prompt, completion=completion)


def _critic(config: Config, case: Case) -> Critic:
    trunk = None if config.critic.trunk == "shared" else tiny_model(seed=3, hidden=HIDDEN).model
    critic = Critic(trunk, HIDDEN, dtype="float32", device=CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.nn.init.normal_(critic.head.weight, 0.0, 0.1)
    return critic.to(case.dtype)
