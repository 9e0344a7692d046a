"""Functions of verl, TRL and AReaL, read out of their source files. See `algorithms/test_peers.py`."""

import __future__

import ast
import dataclasses
import enum
import functools
import math
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

PEERS = os.environ.get("ASYNCRL_PEERS")


class Config(SimpleNamespace):
    """Stands for a peer's configuration: it has only what the function under test reads."""

    def get(self, name, default=None):
        return getattr(self, name, default)


class OtherConfig:
    """Stands for the configurations a peer's function refuses."""


def definitions(path, *names, **known):
    """The named functions, classes and constants of a peer's file, run on their own, without its imports.

    known  what else they refer to. Decorators (registries) are dropped, except those of data classes
    """
    file = Path(PEERS) / path
    if not file.exists():
        pytest.skip(f"{file} does not exist: the package is not in ASYNCRL_PEERS")
    body, left = [], set(names)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = getattr(target, "id", None)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            if name in left:
                node.decorator_list = [part for part in node.decorator_list if ast.unparse(part) == "dataclass"]
        else:
            continue
        if name not in left:
            continue
        left.discard(name)
        body.append(node)
    assert not left, f"{file} defines no {', '.join(sorted(left))}: another version than this module is about?"
    # Annotations would need the peer's imports: they are not evaluated.
    flags = __future__.annotations.compiler_flag
    code = compile(ast.Module(body, []), str(file), "exec", flags=flags, dont_inherit=True)
    namespace = {"torch": torch, "np": np, "math": math, "functools": functools, "__name__": __name__, **known}
    namespace |= {"defaultdict": defaultdict, "dataclass": dataclasses.dataclass}
    exec(code, namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


@functools.cache
def verl_functions():
    functional = definitions(
        "verl/utils/torch_functional.py", "masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"
    )
    algorithms = definitions(
        "verl/trainer/ppo/core_algos.py",
        "AdaptiveKLController",
        "agg_loss",
        "compute_gae_advantage_return",
        "compute_grpo_outcome_advantage",
        "compute_policy_loss_cispo",
        "compute_policy_loss_gspo",
        "compute_policy_loss_reinforce",
        "compute_policy_loss_vanilla",
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        "compute_reinforce_plus_plus_outcome_advantage",
        "compute_remax_outcome_advantage",
        "compute_rloo_outcome_advantage",
        "compute_value_loss",
        "kl_penalty_forward",
        verl_F=functional,
        ActorConfig=Config,
        AlgoConfig=OtherConfig,
    )
    corrections = definitions(
        "verl/trainer/ppo/rollout_corr_helper.py",
        "SAFETY_BOUND",
        "SUPPORTED_ROLLOUT_RS_OPTIONS",
        "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS",
        "_parse_rollout_is_threshold",
        "_parse_rollout_rs_thresholds",
        "compute_is_metrics",
        "compute_rollout_correction_weights",
        "compute_rollout_rejection_mask",
        "compute_rs_metrics",
        verl_F=functional,
    )
    return SimpleNamespace(**vars(algorithms), **vars(corrections))


@functools.cache
def areal_functions():
    data = definitions("areal/utils/data.py", "KLEstimator")
    functional = definitions(
        "areal/utils/functional/functional.py",
        "RejectionSamplingResult",
        "_check_bounds",
        "_compute_sequence_level_ratio_and_advantages",
        "_huber_loss",
        "_mse_loss",
        "apply_rejection_sampling",
        "ppo_actor_loss_fn",
        "ppo_critic_loss_fn",
        KLEstimator=data.KLEstimator,
    )
    methods = [f"PROX_APPROX_METHOD_{name}" for name in ("LOGLINEAR", "LINEAR", "ROLLOUT")]
    constants = definitions("areal/utils/constants.py", "ProxApproxMethod", *methods, Enum=enum.Enum)
    actor = definitions(
        "areal/trainer/ppo/actor.py",
        "_apply_m2po_masking",
        "_get_m2po_loss_mask",
        "compute_prox_logp_approximations",
        **vars(constants),
    )
    return SimpleNamespace(**vars(data), **vars(functional), **vars(actor))


@functools.cache
def trl_functions():
    # nanmin and nanmax are of its metrics only.
    known = {"nanmin": torch.min, "nanmax": torch.max}
    return definitions("trl/trainer/grpo_trainer.py", "get_off_policy_mask", "_compute_loss", **known)
