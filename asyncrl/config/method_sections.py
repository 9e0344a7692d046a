"""Sections that say what is trained and how: model, task, reward, sampling, algorithm, updates, age, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asyncrl.config.declaration import ACCEPTED, REFUSED, RULED, key
from asyncrl.config.methods import METHODS

MIN_TEMPERATURE = 0.01  # what vLLM samples at instead of anything lower


@dataclass
class ModelConfig:
    """The model that is trained, called the actor or the policy."""

    path: str = key(
        "",
        "Folder with the initial model and its tokenizer in Hugging Face format, or the name of a model in the local "
        "Hugging Face cache (`hf download NAME`).",
        if_changed=ACCEPTED,
    )
    dtype: str = key(
        "float32",
        "Precision in which trainer and rollout engine compute; master weights are always float32.",
        choices=("float32", "bfloat16"),
        if_changed=REFUSED,
        shared=True,
    )
    max_length: int = key(
        1024, "Longest prompt and completion together, in tokens.", minimum=2, if_changed=REFUSED, shared=True
    )


@dataclass
class TaskConfig:
    """Where prompts come from and how completions are rewarded."""

    path: str = key(
        "asyncrl.tasks.arithmetic:Arithmetic",
        "Import path `module:Class` of the task; a module of your own works too.",
        if_changed=REFUSED,
        shared=True,
    )
    args: dict[str, Any] = key(
        {}, "Arguments of the task's constructor, which documents them.", if_changed=REFUSED, shared=True
    )


@dataclass
class RewardConfig:
    """What the reward is made of: the weighted sum of the parts that the task returns and of those named here."""

    parts: dict[str, Any] = key(
        {},
        "Further parts by name; each is a mapping with its kind and arguments, which asyncrl.rewards.parts documents.",
        if_changed=REFUSED,
        shared=True,
    )
    weights: dict[str, Any] = key(
        {},
        "Weight of each part by name, those of the task included; a part that is not named here has weight 1.",
        if_changed=REFUSED,
        shared=True,
    )


@dataclass
class SamplingConfig:
    """How completions are sampled: with a temperature alone, so that recorded log-probs are those of the policy."""

    group_size: int = key(
        8,
        "Completions that are sampled for each prompt; together they are a group.",
        minimum=1,
        maximum=4096,
        if_changed=REFUSED,
    )
    temperature: float = key(
        1.0,
        "Softmax temperature at which training rollouts are sampled. Below the least one, vLLM would sample at that, "
        "and the learner compute with another; above the largest, vLLM refuses every request.",
        minimum=MIN_TEMPERATURE,
        maximum=2.0,
        if_changed=REFUSED,
    )
    max_new_tokens: int = key(256, "Longest completion, in tokens.", minimum=1, if_changed=REFUSED)
    repeatable: bool = key(
        False,
        "Seed every completion from run.seed and the number of its prompt, so that the same policy samples the same "
        "tokens at any timing; costs some throughput.",
        if_changed=ACCEPTED,
    )


@dataclass
class AlgorithmConfig:
    """How rollouts become a gradient. algorithm.name sets the other keys; each of them can also be set on its own."""

    name: str = key(
        "grpo",
        "The method; its name stands for values of the other keys of this section.",
        choices=tuple(METHODS),
        if_changed=REFUSED,
    )
    advantage: str = key(
        "group",
        "What a reward is compared with: the mean of its group (group), the mean of the others in the group (rloo), "
        "the batch (reinforce_pp), the group and then the batch (reinforce_pp_baseline), a greedy completion of the "
        "prompt (remax), or the values of a critic (gae).",
        choices=("group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "gae"),
        if_changed=REFUSED,
    )
    normalize_std: bool = key(
        True,
        "Divide advantages of algorithm.advantage=group by the standard deviation of the group's rewards.",
        if_changed=REFUSED,
    )
    dynamic_sampling: bool = key(
        False,
        "Do not train on groups whose rewards are all equal; other prompts are leased in their place.",
        if_changed=REFUSED,
    )
    gamma: float = key(1.0, "Discount per token; used with a critic.", above=0.0, maximum=1.0, if_changed=REFUSED)
    lam: float = key(
        0.95,
        "Lambda of generalised advantage estimation (GAE); used with a critic.",
        minimum=0.0,
        maximum=1.0,
        if_changed=REFUSED,
    )
    value_targets: str = key(
        "vtrace",
        "How the critic's targets and the advantages treat old rollouts: as if they were new (gae), with terms "
        "weighted by importance ratios (is_gae), or with targets and advantages corrected (vtrace).",
        choices=("gae", "is_gae", "vtrace"),
        if_changed=REFUSED,
    )
    rho_bar: float = key(
        1.0, "With vtrace: the importance ratio of a token is truncated at this value.", above=0.0, if_changed=REFUSED
    )
    c_bar: float = key(
        1.0,
        "With vtrace and is_gae: the ratios that weight the errors of later tokens are truncated here.",
        above=0.0,
        if_changed=REFUSED,
    )
    loss: str = key(
        "ppo_clip", "The policy loss.", choices=("ppo_clip", "gspo", "cispo", "reinforce", "topr"), if_changed=REFUSED
    )
    aggregation: str = key(
        "token-mean",
        "How the losses of tokens become one number; seq-mean-token-sum-norm divides by sampling.max_new_tokens.",
        choices=("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
        if_changed=REFUSED,
    )
    clip_low: float = key(
        0.2, "The clip of the loss lets the ratio fall to 1 - clip_low.", above=0.0, maximum=1.0, if_changed=REFUSED
    )
    clip_high: float = key(
        0.28, "The clip of the loss lets the ratio rise to 1 + clip_high.", above=0.0, if_changed=REFUSED
    )
    dual_clip: float = key(
        0.0,
        "Dual clip: a token with a negative advantage costs at most this many times its advantage (3 is usual); "
        "0 = off.",
        minimum=0.0,
        if_changed=REFUSED,
    )
    proximal: str = key(
        "behaviour",
        "The policy in the denominator of the loss's ratio: the one that sampled the token (behaviour), the one at the "
        "start of the step (recomputed, one more forward pass), or one between them by the age of the token "
        "(interpolated).",
        choices=("behaviour", "recomputed", "interpolated"),
        if_changed=REFUSED,
    )
    correction: str = key(
        "tis",
        "Importance weight of old rollouts: truncated for each token (tis), truncated for each sequence "
        "(sequence_tis), or none.",
        choices=("tis", "sequence_tis", "none"),
        if_changed=REFUSED,
    )
    tis_cap: float = key(
        2.0, "Value at which tis and sequence_tis truncate an importance weight.", minimum=1.0, if_changed=REFUSED
    )
    masks: list[str] = key(
        [],
        "What is left out of the loss: tokens whose ratio leaves the band (band, as in IcePop), sequences whose mean "
        "ratio leaves it (sequence_band), sequences with a negative advantage that drifted (opsm), the tokens with the "
        "largest log-ratios (second_moment).",
        choices=("band", "sequence_band", "opsm", "second_moment"),
        if_changed=REFUSED,
    )
    mask_low: float = key(
        0.5,
        "Lower end of the band of ratios that the masks band and sequence_band keep.",
        minimum=0.0,
        maximum=1.0,
        if_changed=REFUSED,
    )
    mask_high: float = key(
        5.0,
        "Upper end of the band of ratios that the masks band and sequence_band keep.",
        minimum=1.0,
        if_changed=REFUSED,
    )
    opsm_delta: float = key(
        0.5,
        "The mask opsm keeps a sequence that drifted by at most this many nats per token.",
        above=0.0,
        if_changed=REFUSED,
    )
    second_moment: float = key(
        0.04,
        "The mask second_moment keeps tokens whose squared log-ratios have at most this mean.",
        above=0.0,
        if_changed=REFUSED,
    )
    age_schedule: str = key(
        "none",
        "What gets narrower the older a token is: tis_cap (cap), the clip (clip), or nothing (none).",
        choices=("none", "cap", "clip"),
        if_changed=REFUSED,
    )
    kl_coef: float = key(
        0.0,
        "Weight of the KL to the reference policy, the initial model; 0 loads no reference.",
        minimum=0.0,
        if_changed=REFUSED,
    )
    kl_in: str = key(
        "loss",
        "Whether the KL is added to the loss or taken off the reward.",
        choices=("loss", "reward"),
        if_changed=REFUSED,
    )
    kl_estimator: str = key(
        "auto",
        "Estimator of the KL from log-probs: k1 in the reward and k3 in the loss (auto), k2, or k3 weighted by the "
        "importance ratio up to tis_cap, for old tokens (k3_weighted). One that does not have the gradient of the KL "
        "where algorithm.kl_in puts it is refused.",
        choices=("auto", "k1", "k2", "k3", "k3_weighted", "abs"),
        if_changed=REFUSED,
    )
    kl_target: float = key(
        0.0,
        "Adapt kl_coef so that the KL stays near this many nats per token; 0 = kl_coef is fixed.",
        minimum=0.0,
        if_changed=REFUSED,
    )
    entropy_coef: float = key(0.0, "Weight of the entropy bonus in the loss.", minimum=0.0, if_changed=REFUSED)
    i_know: bool = key(False, "Start even with a combination of keys that is known to collapse.", if_changed=ACCEPTED)


@dataclass
class CriticConfig:
    """The value model, which exists with algorithm.advantage=gae only."""

    trunk: str = key(
        "own",
        "Where the critic's head gets its hidden states: from a model of its own (own) or from the actor (shared).",
        choices=("own", "shared"),
        if_changed=REFUSED,
    )
    path: str = key("", "Folder of the model that an own trunk starts from; empty = model.path.", if_changed=REFUSED)
    lr: float = key(1e-5, "AdamW learning rate of the critic.", above=0.0, if_changed=ACCEPTED)
    warmup_steps: int = key(
        0, "First steps of the run, in which only the critic is trained.", minimum=0, if_changed=REFUSED
    )
    coef: float = key(
        0.5,
        "With a shared trunk: weight of the value loss where its gradient enters the actor.",
        minimum=0.0,
        if_changed=REFUSED,
    )
    value_clip: float = key(
        0.2,
        "How far a value may move from what it was before the step until its gradient is cut off; 0 = any.",
        minimum=0.0,
        if_changed=REFUSED,
    )
    loss: str = key("mse", "Loss of the values.", choices=("mse", "huber"), if_changed=REFUSED)


@dataclass
class UpdateConfig:
    """Which parameters of the actor are trained. The others cost no optimizer state and no bytes in a sync."""

    what: str = key(
        "full",
        "All parameters (full), low-rank adapters (lora), or the parameters of update.names (partial).",
        choices=("full", "lora", "partial"),
        if_changed=REFUSED,
    )
    names: list[str] = key(
        [],
        "With partial: shell patterns of the parameters to train, for example model.layers.[23].* and lm_head.*.",
        if_changed=REFUSED,
    )
    lora_rank: int = key(16, "Rank of the adapters.", minimum=1, if_changed=REFUSED)
    lora_alpha: float = key(
        32.0, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0.0, if_changed=REFUSED
    )
    lora_targets: list[str] = key(
        [],
        "Names of the linear layers that get an adapter, such as q_proj; empty = all linear layers but the head.",
        if_changed=REFUSED,
    )
    lora_sync: str = key(
        "adapter",
        "What a sync sends: the adapters, which generators fold into their weights (adapter), or the layers with the "
        "adapters folded in (merged).",
        choices=("adapter", "merged"),
        if_changed=ACCEPTED,
    )


@dataclass
class StalenessConfig:
    """How old a token may be when it is trained on. Its age is counted in optimizer steps since it was sampled."""

    max_age: int = key(
        4,
        "Largest age of a trained token; leases are paced so that it holds. 0 = synchronous training.",
        minimum=0,
        if_changed=RULED,
    )
    over_age: str = key(
        "drop",
        "What happens to a group that is too old all the same: it is dropped and its prompt leased again (drop), or it "
        "is trained on with the correction (train).",
        choices=("drop", "train"),
        if_changed=ACCEPTED,
    )


@dataclass
class EvalConfig:
    """Evaluation on held-out prompts, which generators answer between training rollouts."""

    every: int = key(
        0,
        "Evaluate after every so many steps, besides at start and end; 0 = at start and end only.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    prompts: int = key(
        128,
        "Held-out prompts in each evaluation; 0 = no evaluation at all.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    samples: int = key(
        1,
        "Completions of each held-out prompt. Of several, the figures are the mean (avg@k) and the mean of the best of "
        "each prompt (pass@k).",
        minimum=1,
        maximum=4096,
        if_changed=ACCEPTED,
    )
    temperature: float = key(
        0.0,
        "Softmax temperature at which they are sampled; 0 = greedy.",
        minimum=0.0,
        maximum=2.0,
        if_changed=ACCEPTED,
    )
