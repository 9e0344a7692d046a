"""The configuration: every key, its sentence and its default. Loading and checking live in `config.loading`.

The same file configures both daemons, so that what they must agree on is written once. Keys without a default
that everybody wants are few; the rest is derived and logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncrl.config.methods import METHODS


def key(default: Any, sentence: str, **checks: Any) -> Any:
    """Declares one key: its default, its sentence, and its checks (`choices`, `minimum`, `above`, `maximum`).

    A list or dict default is copied for each instance.
    """
    metadata = {"sentence": sentence, **checks}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """The run as a whole."""

    name: str = key(
        "run",
        "Names the run in logs, checkpoints and the handshake; daemons of different runs refuse each other.",
    )
    dir: str = key("runs/${run.name}", "Folder for everything the run writes: journal, checkpoints, metrics, export.")
    steps: int = key(100, "Optimizer steps to train; the run ends at this policy version.", minimum=1)
    seed: int = key(0, "Seeds the order of prompts, the model initialisation of new parts and the trainer.", minimum=0)


@dataclass
class ModelConfig:
    """The actor."""

    path: str = key(
        "",
        "Folder with the initial model and tokenizer in Hugging Face format, or the name of a model in the "
        "local Hugging Face cache (`hf download NAME`).",
    )
    dtype: str = key(
        "float32",
        "Compute precision of trainer and rollout engine; master weights are float32.",
        choices=["float32", "bfloat16"],
    )
    max_length: int = key(1024, "Longest prompt plus completion, in tokens.", minimum=2)


@dataclass
class TaskConfig:
    """Prompts in, rewards out."""

    path: str = key(
        "asyncrl.tasks.arithmetic:Arithmetic",
        "Import path `module:Class` of the task; your own module works too.",
    )
    args: dict[str, Any] = key({}, "Arguments of the task's constructor; the task documents them.")


@dataclass
class RewardConfig:
    """What the reward is made of, besides what the task returns: the sum of named parts, each with its weight."""

    parts: dict[str, Any] = key(
        {}, "Further parts by name, each a mapping with its kind and arguments; asyncrl.rewards.parts documents them."
    )
    weights: dict[str, Any] = key({}, "Weight of a part, the task's own included; 1 where none is given.")


@dataclass
class SamplingConfig:
    """How completions are sampled. Temperature only: recorded log-probs are those of the policy itself."""

    group_size: int = key(8, "Completions per prompt.", minimum=1)
    temperature: float = key(1.0, "Softmax temperature of training rollouts; evaluation is greedy.", above=0.0)
    max_new_tokens: int = key(256, "Longest completion, in tokens.", minimum=1)
    repeatable: bool = key(
        False,
        "Seed every completion from run.seed and its ordinal: same tokens at any timing, at some throughput.",
    )


@dataclass
class AlgorithmConfig:
    """How rollouts become a gradient. algorithm.name sets all of it; each key can be set besides."""

    name: str = key("grpo", "The method: values for the other keys of this section.", choices=list(METHODS))
    advantage: str = key(
        "group",
        "Reward against what: the group's mean, the mean of the others (rloo), the batch (reinforce_pp), the group and "
        "then the batch (reinforce_pp_baseline), a greedy completion (remax), a critic (gae).",
        choices=["group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "gae"],
    )
    normalize_std: bool = key(True, "Divide group-relative advantages by the group's standard deviation.")
    dynamic_sampling: bool = key(
        False, "Groups whose rewards are all equal are not trained on; other prompts are leased in their place."
    )
    gamma: float = key(1.0, "Discount per token, with a critic.", above=0.0, maximum=1.0)
    lam: float = key(0.95, "Lambda of generalised advantage estimation, with a critic.", minimum=0.0, maximum=1.0)
    value_targets: str = key(
        "vtrace",
        "Targets of the critic and advantages from it: gae takes old rollouts for new ones, is_gae weights its sum by "
        "importance ratios, vtrace corrects targets and advantages.",
        choices=["gae", "is_gae", "vtrace"],
    )
    rho_bar: float = key(1.0, "V-trace: importance ratios are truncated here.", above=0.0)
    c_bar: float = key(1.0, "V-trace and is_gae: ratios of later tokens are truncated here.", above=0.0)
    loss: str = key("ppo_clip", "The policy loss.", choices=["ppo_clip", "gspo", "cispo", "reinforce", "topr"])
    aggregation: str = key(
        "token-mean",
        "How token losses become one: the norm of seq-mean-token-sum-norm is sampling.max_new_tokens.",
        choices=["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"],
    )
    clip_low: float = key(0.2, "Clip: the ratio may fall to 1 - clip_low.", above=0.0, maximum=1.0)
    clip_high: float = key(0.28, "Clip: the ratio may rise to 1 + clip_high.", above=0.0)
    dual_clip: float = key(
        0.0, "Dual clip: loss of a bad token is at most this times its advantage, 3 is usual; 0 = off.", minimum=0.0
    )
    proximal: str = key(
        "behaviour",
        "The ratio is taken against: the policy that sampled (behaviour), the one at the start of the step "
        "(recomputed, one more forward pass), or between them by token age (interpolated).",
        choices=["behaviour", "recomputed", "interpolated"],
    )
    correction: str = key(
        "tis",
        "Importance weight of old rollouts: truncated per token (tis), per sequence (sequence_tis), or none.",
        choices=["tis", "sequence_tis", "none"],
    )
    tis_cap: float = key(2.0, "Truncated importance sampling: no weight is above this.", minimum=1.0)
    masks: list[str] = key(
        [],
        "What is left out of the loss: tokens whose ratio leaves the band (band, as in IcePop), sequences whose mean "
        "ratio does (sequence_band), bad sequences that drifted (opsm), the largest log-ratios (second_moment).",
        choices=["band", "sequence_band", "opsm", "second_moment"],
    )
    mask_low: float = key(0.5, "Lower end of the band of ratios that masks keep.", minimum=0.0, maximum=1.0)
    mask_high: float = key(5.0, "Upper end of the band of ratios that masks keep.", minimum=1.0)
    opsm_delta: float = key(0.5, "opsm: nats per token that a bad sequence may have drifted.", above=0.0)
    second_moment: float = key(
        0.04, "second_moment: largest mean of squared log-ratios among the tokens that stay.", above=0.0
    )
    age_schedule: str = key(
        "none",
        "Older tokens get less room: a lower tis_cap (cap), a narrower clip (clip), or neither.",
        choices=["none", "cap", "clip"],
    )
    kl_coef: float = key(0.0, "Weight of the KL to the reference policy; 0 loads no reference.", minimum=0.0)
    kl_in: str = key("loss", "Where the KL counts: in the loss, or in the reward.", choices=["loss", "reward"])
    kl_estimator: str = key("k3", "Estimator of the KL.", choices=["k1", "k2", "k3", "abs"])
    kl_target: float = key(
        0.0, "Adapt kl_coef so that the KL stays near this, in nats per token; 0 = kl_coef is fixed.", minimum=0.0
    )
    entropy_coef: float = key(0.0, "Weight of the entropy bonus.", minimum=0.0)
    i_know: bool = key(False, "Start with a combination that is known to collapse.")


@dataclass
class CriticConfig:
    """The value model, used when algorithm.advantage=gae."""

    trunk: str = key(
        "own", "A model of its own, or the actor's hidden states under a head of its own.", choices=["own", "shared"]
    )
    path: str = key("", "Folder of the model that an own trunk starts from; empty = model.path.")
    lr: float = key(1e-5, "AdamW learning rate of the critic.", above=0.0)
    warmup_steps: int = key(0, "First steps, in which the critic is trained and the actor is not.", minimum=0)
    coef: float = key(0.5, "shared: weight of the value loss in the actor's hidden states.", minimum=0.0)
    value_clip: float = key(
        0.2, "A value may move this far from the one before the step; 0 = as it likes.", minimum=0.0
    )
    loss: str = key("mse", "Loss of the values.", choices=["mse", "huber"])


@dataclass
class UpdateConfig:
    """Which parameters of the actor are trained. The others cost no optimizer state and no sync bytes."""

    what: str = key(
        "full",
        "All parameters, low-rank adapters (lora), or those named (partial).",
        choices=["full", "lora", "partial"],
    )
    names: list[str] = key([], "partial: parameters to train, by shell pattern, model.layers.[23].* for example.")
    lora_rank: int = key(16, "Rank of the adapters.", minimum=1)
    lora_alpha: float = key(32.0, "Scale of the adapters: alpha / rank.", above=0.0)
    lora_targets: list[str] = key(
        [], "Names of the linear layers that get an adapter, q_proj for example; empty = all below the head."
    )
    lora_sync: str = key(
        "adapter",
        "What travels to generators: the adapters, which they fold into their weights, or the merged weights.",
        choices=["adapter", "merged"],
    )


@dataclass
class LearnerConfig:
    """The trainer."""

    groups_per_step: int = key(16, "Groups (prompts) in the batch of one optimizer step.", minimum=1)
    epochs: int = key(1, "Passes over the batch in one step.", minimum=1)
    mini_batches: int = key(
        1, "Optimizer updates per pass; the batch is cut into as many. A step stays one policy version.", minimum=1
    )
    lr: float = key(1e-6, "AdamW learning rate.", above=0.0)
    lr_warmup_steps: int = key(0, "Steps over which the learning rate rises from 0.", minimum=0)
    betas: list[float] = key([0.9, 0.95], "AdamW betas.")
    weight_decay: float = key(0.0, "AdamW weight decay.", minimum=0.0)
    grad_clip: float = key(1.0, "Largest gradient norm; larger ones are scaled down.", above=0.0)
    micro_batch_tokens: int = key(
        16384, "Padded tokens in one forward and backward pass; gradients add up over the batch.", minimum=1
    )
    device: str = key("auto", "Device of the trainer: cuda if there is one, else cpu.", choices=["auto", "cpu", "cuda"])
    threads: int = key(1, "CPU threads of each trainer rank.", minimum=1)
    cpus: list[int] = key([], "Pin desk and trainer to these CPUs; empty = do not pin.")
    max_trainer_restarts: int = key(
        3, "How often a trainer that died without a step in between is started again.", minimum=0
    )


@dataclass
class StalenessConfig:
    """How old a token may be, in optimizer steps, when it is trained on."""

    max_age: int = key(
        4,
        "Largest policy age of a trained token. 0 = synchronous. Leases are paced so that it holds.",
        minimum=0,
    )
    over_age: str = key(
        "drop",
        "What happens to a group found older all the same: dropped and leased again, or trained with correction.",
        choices=["drop", "train"],
    )


@dataclass
class GeneratorConfig:
    """The rollout engine and its rewards."""

    id: str = key("", "Stable name of this generator; empty = host name and a number kept in run.dir.")
    max_sequences: int = key(64, "Sequences decoded at once.", minimum=1)
    tensor_parallel_size: int = key(1, "GPUs (or CPU workers) one copy of the model is spread over.", minimum=1)
    kv_cache_gib: float = key(1.0, "KV cache on the CPU; on a GPU see gpu_memory_fraction.", above=0.0)
    gpu_memory_fraction: float = key(0.85, "Share of GPU memory the engine may take.", above=0.0, maximum=1.0)
    compile: str = key(
        "auto",
        "Let vLLM compile the model: a slower start for faster steps. auto = on GPUs only; small models gain nothing.",
        choices=["auto", "always", "never"],
    )
    device: str = key("auto", "Device of the engine: cuda if there is one, else cpu.", choices=["auto", "cpu", "cuda"])
    threads: int = key(1, "CPU threads of each engine worker.", minimum=1)
    cpus: list[int] = key(
        [],
        "Pin the generator and its engine to these CPUs; empty = do not pin. Tensor-parallel workers take the first "
        "of them, `threads` each: give two such generators of one host different ones.",
    )
    reward_workers: int = key(1, "Reward worker processes.", minimum=1)
    reward_timeout_s: float = key(
        10.0, "Deadline of one reward; then its worker is killed and the lease fails.", above=0.0
    )
    lease_timeout_s: float = key(
        600.0, "Deadline of one lease, from grant to result; then the prompt is leased again.", above=0.0
    )
    outbox_bytes: int = key(
        64 * 2**20,
        "Results kept until the learner has them on disk; when full, no new leases are taken.",
        minimum=1,
    )
    unreachable_timeout_s: float = key(
        600.0, "Give up (exit 3) when the learner has not answered for this long.", above=0.0
    )
    drain_timeout_s: float = key(
        6.0, "After SIGTERM: finish what can be finished within this, hand back the rest.", above=0.0
    )


@dataclass
class TransportConfig:
    """The rollout link."""

    address: str = key(
        "tcp://127.0.0.1:5770", "Where the learner listens and the generators connect. Never a wildcard."
    )
    server_key_file: str = key("", "CURVE secret key of the learner; required for any address that is not loopback.")
    server_public_key_file: str = key("", "CURVE public key of the learner, for the generators.")
    client_key_file: str = key("", "CURVE secret key of this generator.")
    allowed_keys_file: str = key("", "Public keys of the generators the learner admits, one per line.")
    max_frame_bytes: int = key(
        64 * 2**20, "Largest message; larger ones are refused before they are decoded.", minimum=4096
    )
    credit_bytes: int = key(
        64 * 2**20, "Results a generator may have under way without an acknowledgement.", minimum=4096
    )


@dataclass
class WeightsConfig:
    """Broadcast of new policies."""

    host: str = key(
        "127.0.0.1",
        "Private address of the learner's weight store. The weight plane has no authentication: a trusted "
        "network only.",
    )
    backend: str = key(
        "auto",
        "auto = nccl if learner and generators have GPUs, else gloo. ipc is for one machine: generators copy out of "
        "the learner's own buffer, on one GPU (where nccl does not work) or on the CPU; all run as one user in one PID "
        "namespace.",
        choices=["auto", "gloo", "nccl", "ipc"],
    )
    bucket_bytes: int = key(64 * 2**20, "Bytes sent in one collective.", minimum=1024)
    timeout_s: float = key(
        30.0, "Deadline of each phase of a sync; a generator that exceeds it is left out.", above=0.0
    )
    cell_size: int = key(
        8,
        "Most generators that share one collective: one that hangs stalls no more than these, for one deadline. The "
        "learner sends once per cell.",
        minimum=1,
    )
    canary_sequences: int = key(4, "Probe sequences scored by learner and generator at each sync.", minimum=1)
    canary_tolerance: float = key(
        0.0, "Largest log-prob difference on the canary; 0 = 1e-4 in float32, 0.35 in bfloat16.", minimum=0.0
    )


@dataclass
class EvalConfig:
    """Greedy evaluation on held-out prompts, riding on leases."""

    every: int = key(0, "Evaluate every N steps, besides start and end; 0 = only start and end.", minimum=0)
    prompts: int = key(128, "Held-out prompts per evaluation; 0 = no evaluation.", minimum=0)


@dataclass
class CheckpointConfig:
    """Recovery. Never the way to move weights."""

    every: int = key(50, "Save every N steps, and always at the end and on SIGTERM; 0 = only then.", minimum=0)
    keep: int = key(2, "Verified checkpoints to keep.", minimum=1)
    resume: str = key(
        "auto",
        "auto = newest verified checkpoint and the journal after it; never = refuse a used run.dir.",
        choices=["auto", "never"],
    )


@dataclass
class LogConfig:
    """Where metrics go, besides metrics.jsonl."""

    wandb: str = key(
        "off",
        "Weights & Biases: off, offline (no key needed) or online.",
        choices=["off", "offline", "online"],
    )
    wandb_project: str = key("asyncrl", "Weights & Biases project.")
    level: str = key("info", "Log level of the daemons.", choices=["debug", "info", "warning", "error"])


@dataclass
class Config:
    """Everything. Both daemons read the same file."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
