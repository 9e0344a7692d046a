"""The methods by name: what `algorithm.name` sets, unless the same key is given too. Standard library only.

A method is nothing but values for keys of the section `algorithm`; grpo is their defaults. So a published method is
one line of configuration, and a variation of it one line more:

    algorithm.name=gspo
    algorithm.name=gspo algorithm.clip_high=0.1
"""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    # Shao et al. 2024 (DeepSeekMath), with the token-mean and the higher upper clip of DAPO.
    "grpo": {},
    # Liu et al. 2025 ("Understanding R1-Zero-like training"): no division by std, constant-length norm.
    "dr_grpo": {"normalize_std": False, "aggregation": "seq-mean-token-sum-norm"},
    # Ahmadian et al. 2024: REINFORCE against the mean of the others.
    "rloo": {"advantage": "rloo", "loss": "reinforce", "aggregation": "seq-mean-token-sum"},
    # Hu 2025: rewards whitened over the whole batch instead of within a group.
    "reinforce_pp": {"advantage": "reinforce_pp", "clip_high": 0.2},
    # The same after the group's mean was taken off.
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "clip_high": 0.2},
    # Li et al. 2023: the reward of a greedy completion is the baseline.
    "remax": {"advantage": "remax", "loss": "reinforce", "aggregation": "seq-mean-token-sum"},
    # Yu et al. 2025: clip higher, token-mean, prompts without a signal replaced. Overlong shaping is a reward part.
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "dynamic_sampling": True},
    # Zheng et al. 2025: one ratio per sequence. The paper clips at 3e-4 / 4e-4, which silences most old rollouts; PPO's
    # 0.2 lets single tokens run away under the mean of their sequence. To see it (accuracy 0.47 and 0.62 of two seeds,
    # with these 0.95): python -m benchmarks.studies.method_matrix --methods gspo \
    #     --set algorithm.clip_low=0.2 algorithm.clip_high=0.28
    "gspo": {"loss": "gspo", "clip_low": 0.02, "clip_high": 0.03, "aggregation": "seq-mean-token-mean"},
    # MiniMax 2025 (MiniMax-M1): the clipped ratio is a weight, every token keeps its gradient.
    "cispo": {"loss": "cispo", "clip_high": 4.0},
    # Hilton et al. 2021 and AReaL (Fu et al. 2025): trust region around the policy at the start of the step.
    "decoupled": {"proximal": "recomputed", "clip_high": 0.2, "tis_cap": 5.0},
    # A-3PO (2512.06547): the same, with the proximal policy interpolated by token age instead of computed.
    "a3po": {"proximal": "interpolated", "clip_high": 0.2, "tis_cap": 5.0},
    # M2PO (2510.01161): no clip; tokens are masked until the second moment of the log-ratios is small.
    "m2po": {"loss": "reinforce", "masks": ["second_moment"], "tis_cap": 10.0},
    # AIPO (Wu et al. 2025, LlamaRL): REINFORCE with a truncated importance weight.
    "aipo": {"loss": "reinforce", "tis_cap": 5.0},
    # Le Roux et al. 2025: good completions count in full, bad ones by their truncated importance weight.
    "topr": {"loss": "topr"},
    # Williams 1992, with importance weights.
    "reinforce": {"loss": "reinforce"},
    # Schulman et al. 2017, with a critic.
    "ppo": {"advantage": "gae", "clip_high": 0.2},
}

# Which estimators of the KL have its gradient, by algorithm.kl_in. The first is what kl_estimator=auto stands for.
KL_ESTIMATORS_BY_PLACE: dict[str, tuple[str, ...]] = {"loss": ("k3", "k2", "k3_weighted"), "reward": ("k1",)}


def chosen_kl_estimator(kl_estimator: str, kl_in: str) -> str:
    """The estimator that algorithm.kl_estimator names; `auto` depends on the place that algorithm.kl_in names."""
    return KL_ESTIMATORS_BY_PLACE[kl_in][0] if kl_estimator == "auto" else kl_estimator
