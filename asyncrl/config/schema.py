"""The configuration: every key with its default, its sentence and its bounds. `config.loading` loads and checks.

The same file configures both daemons, so that what they must agree on is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncrl.config.methods import METHODS

# Keys that had another name once, old → new. The old name is refused in a message with the new one.
RENAMED_KEYS: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which values of a key's type are allowed; of a list, which elements."""

    choices: tuple[str, ...] = ()  # empty: any
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None


def key(default: Any, sentence: str, **bounds: Any) -> Any:
    """Declares one key: its default, its sentence, and its bounds (the fields of `Bounds`).

    A list or dict default is copied for each instance.
    """
    metadata = {"sentence": sentence, "bounds": Bounds(**bounds)}
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
    seed: int = key(
        0, "Seeds the order of the prompts, new parts of the model (a critic, adapters) and the trainer.", minimum=0
    )


@dataclass
class ModelConfig:
    """The model that is trained, called the actor or the policy."""

    path: str = key(
        "",
        "Folder with the initial model and its tokenizer in Hugging Face format, or the name of a model in the local "
        "Hugging Face cache (`hf download NAME`).",
    )
    dtype: str = key(
        "float32",
        "Precision in which trainer and rollout engine compute; master weights are always float32.",
        choices=("float32", "bfloat16"),
    )
    max_length: int = key(1024, "Longest prompt and completion together, in tokens.", minimum=2)


@dataclass
class TaskConfig:
    """Where prompts come from and how completions are rewarded."""

    path: str = key(
        "asyncrl.tasks.arithmetic:Arithmetic",
        "Import path `module:Class` of the task; a module of your own works too.",
    )
    args: dict[str, Any] = key({}, "Arguments of the task's constructor, which documents them.")


@dataclass
class RewardConfig:
    """What the reward is made of: the weighted sum of the parts that the task returns and of those named here."""

    parts: dict[str, Any] = key(
        {},
        "Further parts by name; each is a mapping with its kind and arguments, which asyncrl.rewards.parts documents.",
    )
    weights: dict[str, Any] = key(
        {}, "Weight of each part by name, those of the task included; a part that is not named here has weight 1."
    )


@dataclass
class SamplingConfig:
    """How completions are sampled: with a temperature alone, so that recorded log-probs are those of the policy."""

    group_size: int = key(8, "Completions that are sampled for each prompt; together they are a group.", minimum=1)
    temperature: float = key(
        1.0, "Softmax temperature at which training rollouts are sampled; evaluation is greedy.", above=0.0
    )
    max_new_tokens: int = key(256, "Longest completion, in tokens.", minimum=1)
    repeatable: bool = key(
        False,
        "Seed every completion from run.seed and the number of its prompt, so that the same policy samples the same "
        "tokens at any timing; costs some throughput.",
    )


@dataclass
class AlgorithmConfig:
    """How rollouts become a gradient. algorithm.name sets the other keys; each of them can also be set on its own."""

    name: str = key(
        "grpo", "The method; its name stands for values of the other keys of this section.", choices=tuple(METHODS)
    )
    advantage: str = key(
        "group",
        "What a reward is compared with: the mean of its group (group), the mean of the others in the group (rloo), "
        "the batch (reinforce_pp), the group and then the batch (reinforce_pp_baseline), a greedy completion of the "
        "prompt (remax), or the values of a critic (gae).",
        choices=("group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "gae"),
    )
    normalize_std: bool = key(
        True, "Divide advantages of algorithm.advantage=group by the standard deviation of the group's rewards."
    )
    dynamic_sampling: bool = key(
        False, "Do not train on groups whose rewards are all equal; other prompts are leased in their place."
    )
    gamma: float = key(1.0, "Discount per token; used with a critic.", above=0.0, maximum=1.0)
    lam: float = key(
        0.95, "Lambda of generalised advantage estimation (GAE); used with a critic.", minimum=0.0, maximum=1.0
    )
    value_targets: str = key(
        "vtrace",
        "How the critic's targets and the advantages treat old rollouts: as if they were new (gae), with terms "
        "weighted by importance ratios (is_gae), or with targets and advantages corrected (vtrace).",
        choices=("gae", "is_gae", "vtrace"),
    )
    rho_bar: float = key(1.0, "With vtrace: the importance ratio of a token is truncated at this value.", above=0.0)
    c_bar: float = key(
        1.0, "With vtrace and is_gae: the ratios that weight the errors of later tokens are truncated here.", above=0.0
    )
    loss: str = key("ppo_clip", "The policy loss.", choices=("ppo_clip", "gspo", "cispo", "reinforce", "topr"))
    aggregation: str = key(
        "token-mean",
        "How the losses of tokens become one number; seq-mean-token-sum-norm divides by sampling.max_new_tokens.",
        choices=("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    )
    clip_low: float = key(0.2, "The clip of the loss lets the ratio fall to 1 - clip_low.", above=0.0, maximum=1.0)
    clip_high: float = key(0.28, "The clip of the loss lets the ratio rise to 1 + clip_high.", above=0.0)
    dual_clip: float = key(
        0.0,
        "Dual clip: a token with a negative advantage costs at most this many times its advantage (3 is usual); "
        "0 = off.",
        minimum=0.0,
    )
    proximal: str = key(
        "behaviour",
        "The policy in the denominator of the loss's ratio: the one that sampled the token (behaviour), the one at the "
        "start of the step (recomputed, one more forward pass), or one between them by the age of the token "
        "(interpolated).",
        choices=("behaviour", "recomputed", "interpolated"),
    )
    correction: str = key(
        "tis",
        "Importance weight of old rollouts: truncated for each token (tis), truncated for each sequence "
        "(sequence_tis), or none.",
        choices=("tis", "sequence_tis", "none"),
    )
    tis_cap: float = key(2.0, "Value at which tis and sequence_tis truncate an importance weight.", minimum=1.0)
    masks: list[str] = key(
        [],
        "What is left out of the loss: tokens whose ratio leaves the band (band, as in IcePop), sequences whose mean "
        "ratio leaves it (sequence_band), sequences with a negative advantage that drifted (opsm), the tokens with the "
        "largest log-ratios (second_moment).",
        choices=("band", "sequence_band", "opsm", "second_moment"),
    )
    mask_low: float = key(
        0.5, "Lower end of the band of ratios that the masks band and sequence_band keep.", minimum=0.0, maximum=1.0
    )
    mask_high: float = key(
        5.0, "Upper end of the band of ratios that the masks band and sequence_band keep.", minimum=1.0
    )
    opsm_delta: float = key(
        0.5, "The mask opsm keeps a sequence that drifted by at most this many nats per token.", above=0.0
    )
    second_moment: float = key(
        0.04, "The mask second_moment keeps tokens whose squared log-ratios have at most this mean.", above=0.0
    )
    age_schedule: str = key(
        "none",
        "What gets narrower the older a token is: tis_cap (cap), the clip (clip), or nothing (none).",
        choices=("none", "cap", "clip"),
    )
    kl_coef: float = key(
        0.0, "Weight of the KL to the reference policy, the initial model; 0 loads no reference.", minimum=0.0
    )
    kl_in: str = key("loss", "Whether the KL is added to the loss or taken off the reward.", choices=("loss", "reward"))
    kl_estimator: str = key("k3", "Estimator of the KL from log-probs.", choices=("k1", "k2", "k3", "abs"))
    kl_target: float = key(
        0.0, "Adapt kl_coef so that the KL stays near this many nats per token; 0 = kl_coef is fixed.", minimum=0.0
    )
    entropy_coef: float = key(0.0, "Weight of the entropy bonus in the loss.", minimum=0.0)
    i_know: bool = key(False, "Start even with a combination of keys that is known to collapse.")


@dataclass
class CriticConfig:
    """The value model, which exists with algorithm.advantage=gae only."""

    trunk: str = key(
        "own",
        "Where the critic's head gets its hidden states: from a model of its own (own) or from the actor (shared).",
        choices=("own", "shared"),
    )
    path: str = key("", "Folder of the model that an own trunk starts from; empty = model.path.")
    lr: float = key(1e-5, "AdamW learning rate of the critic.", above=0.0)
    warmup_steps: int = key(0, "First steps of the run, in which only the critic is trained.", minimum=0)
    coef: float = key(
        0.5, "With a shared trunk: weight of the value loss where its gradient enters the actor.", minimum=0.0
    )
    value_clip: float = key(
        0.2,
        "How far a value may move from what it was before the step until its gradient is cut off; 0 = any.",
        minimum=0.0,
    )
    loss: str = key("mse", "Loss of the values.", choices=("mse", "huber"))


@dataclass
class UpdateConfig:
    """Which parameters of the actor are trained. The others cost no optimizer state and no bytes in a sync."""

    what: str = key(
        "full",
        "All parameters (full), low-rank adapters (lora), or the parameters of update.names (partial).",
        choices=("full", "lora", "partial"),
    )
    names: list[str] = key(
        [],
        "With partial: shell patterns of the parameters to train, for example model.layers.[23].* and lm_head.*.",
    )
    lora_rank: int = key(16, "Rank of the adapters.", minimum=1)
    lora_alpha: float = key(32.0, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0.0)
    lora_targets: list[str] = key(
        [],
        "Names of the linear layers that get an adapter, such as q_proj; empty = all linear layers but the head.",
    )
    lora_sync: str = key(
        "adapter",
        "What a sync sends: the adapters, which generators fold into their weights (adapter), or the layers with the "
        "adapters folded in (merged).",
        choices=("adapter", "merged"),
    )


@dataclass
class LearnerConfig:
    """The trainer: the batch, the optimizer, and the process."""

    groups_per_step: int = key(16, "Groups (prompts) in the batch of one optimizer step.", minimum=1)
    epochs: int = key(1, "Passes over the batch in one step.", minimum=1)
    mini_batches: int = key(
        1,
        "Parts into which each pass cuts the batch, with one optimizer update for each; the step still makes one "
        "policy version.",
        minimum=1,
    )
    lr: float = key(1e-6, "AdamW learning rate.", above=0.0)
    lr_warmup_steps: int = key(0, "First steps, over which the learning rate rises linearly to learner.lr.", minimum=0)
    betas: list[float] = key([0.9, 0.95], "AdamW betas.")
    weight_decay: float = key(0.0, "AdamW weight decay.", minimum=0.0)
    grad_clip: float = key(1.0, "Largest L2 norm of the gradient; a larger one is scaled down to it.", above=0.0)
    micro_batch_tokens: int = key(
        16384,
        "Tokens, padding included, in one forward and backward pass; gradients add up over the passes of an update.",
        minimum=1,
    )
    device: str = key(
        "auto", "Device of the trainer; auto = cuda if there is a GPU, else cpu.", choices=("auto", "cpu", "cuda")
    )
    threads: int = key(1, "CPU threads of each trainer rank.", minimum=1)
    cpus: list[int] = key([], "CPUs that desk and trainer are pinned to; empty = they are not pinned.")
    max_trainer_restarts: int = key(
        3, "How often in a row a trainer that died without making a step is started again.", minimum=0
    )


@dataclass
class StalenessConfig:
    """How old a token may be when it is trained on. Its age is counted in optimizer steps since it was sampled."""

    max_age: int = key(
        4,
        "Largest age of a trained token; leases are paced so that it holds. 0 = synchronous training.",
        minimum=0,
    )
    over_age: str = key(
        "drop",
        "What happens to a group that is too old all the same: it is dropped and its prompt leased again (drop), or it "
        "is trained on with the correction (train).",
        choices=("drop", "train"),
    )


@dataclass
class GeneratorConfig:
    """The rollout engine and its rewards."""

    id: str = key("", "Lasting name of this generator; empty = the host name and a number, which is kept in run.dir.")
    max_sequences: int = key(64, "Sequences that are decoded at once.", minimum=1)
    tensor_parallel_size: int = key(1, "GPUs (or CPU workers) over which one copy of the model is spread.", minimum=1)
    kv_cache_gib: float = key(
        1.0, "Size of the KV cache on the CPU, in GiB; on a GPU see generator.gpu_memory_fraction.", above=0.0
    )
    gpu_memory_fraction: float = key(
        0.85, "Share of the GPU's memory that the engine may take.", above=0.0, maximum=1.0
    )
    compile: str = key(
        "auto",
        "Let vLLM compile the model: a slower start for faster steps. auto = on GPUs only; small models gain nothing.",
        choices=("auto", "always", "never"),
    )
    device: str = key(
        "auto", "Device of the engine; auto = cuda if there is a GPU, else cpu.", choices=("auto", "cpu", "cuda")
    )
    threads: int = key(1, "CPU threads of each engine worker.", minimum=1)
    cpus: list[int] = key(
        [],
        "CPUs that the generator and its engine are pinned to; empty = they are not pinned. Tensor-parallel workers "
        "take the first of them, generator.threads each, so give two such generators of one host different ones.",
    )
    reward_workers: int = key(1, "Processes that compute rewards.", minimum=1)
    reward_timeout_s: float = key(
        10.0, "Deadline of one reward, in seconds; then its worker is killed and the lease fails.", above=0.0
    )
    lease_timeout_s: float = key(
        600.0, "Deadline of one lease from grant to result, in seconds; then its prompt is leased again.", above=0.0
    )
    outbox_bytes: int = key(
        64 * 2**20,
        "Bytes of results that are kept until the learner has them on disk; when they are full, no lease is taken.",
        minimum=1,
    )
    unreachable_timeout_s: float = key(
        600.0, "Give up (exit code 3) when the learner has not answered for this many seconds.", above=0.0
    )
    drain_timeout_s: float = key(
        6.0,
        "After SIGTERM, finish what can be finished within this many seconds, and hand back the other leases.",
        above=0.0,
    )


@dataclass
class TransportConfig:
    """The rollout link between generators and learner."""

    address: str = key(
        "tcp://127.0.0.1:5770", "Where the learner listens and the generators connect; never a wildcard."
    )
    server_key_file: str = key(
        "", "File with the learner's secret CURVE key; required for an address that is not loopback."
    )
    server_public_key_file: str = key("", "File with the learner's public CURVE key, for the generators.")
    client_key_file: str = key("", "File with the secret CURVE key of this generator.")
    allowed_keys_file: str = key(
        "", "File with the public keys of the generators that the learner admits, one per line."
    )
    max_frame_bytes: int = key(
        64 * 2**20, "Largest message, in bytes; a larger one is refused before it is decoded.", minimum=4096
    )
    credit_bytes: int = key(
        64 * 2**20, "Bytes of results that a generator may send ahead of the learner's acknowledgements.", minimum=4096
    )


@dataclass
class WeightsConfig:
    """How new policies reach the generators."""

    host: str = key(
        "127.0.0.1",
        "Private address of the learner at which generators meet it for weights. There is no authentication: use a "
        "trusted network only.",
    )
    backend: str = key(
        "auto",
        "How weights travel; auto = nccl if learner and generators have GPUs, else gloo. ipc is for one machine: "
        "generators copy out of the learner's own buffer, on one GPU (where nccl does not work) or on the CPU; all run "
        "as one user in one PID namespace.",
        choices=("auto", "gloo", "nccl", "ipc"),
    )
    bucket_bytes: int = key(64 * 2**20, "Bytes that are sent in one collective.", minimum=1024)
    timeout_s: float = key(
        30.0, "Deadline of each phase of a sync, in seconds; a generator that exceeds it is left out.", above=0.0
    )
    cell_size: int = key(
        8,
        "Largest number of generators that share one collective; the learner sends once for each such cell. A "
        "generator that hangs delays those of its cell alone, for one deadline.",
        minimum=1,
    )
    canary_sequences: int = key(4, "Probe sequences that learner and generator both score at each sync.", minimum=1)
    canary_tolerance: float = key(
        0.0,
        "Largest difference of a log-prob on the probe sequences, in nats; 0 = 1e-4 in float32, 0.35 in bfloat16.",
        minimum=0.0,
    )


@dataclass
class EvalConfig:
    """Greedy evaluation on held-out prompts, which generators answer between training rollouts."""

    every: int = key(
        0, "Evaluate after every so many steps, besides at start and end; 0 = at start and end only.", minimum=0
    )
    prompts: int = key(128, "Held-out prompts in each evaluation; 0 = no evaluation.", minimum=0)


@dataclass
class CheckpointConfig:
    """What a restarted learner goes on from. Weights never reach generators this way."""

    every: int = key(
        50, "Save after every so many steps, besides at the end and on SIGTERM; 0 = at those two only.", minimum=0
    )
    keep: int = key(2, "Verified checkpoints that are kept.", minimum=1)
    resume: str = key(
        "auto",
        "Go on from the newest verified checkpoint and the journal after it (auto), or refuse a run.dir that was used "
        "before (never).",
        choices=("auto", "never"),
    )


@dataclass
class LogConfig:
    """What is logged, besides metrics.jsonl, which has every figure."""

    wandb: str = key(
        "off",
        "Also log to Weights & Biases: not at all (off), into files for `wandb sync` (offline), or at once, which "
        "needs a key (online).",
        choices=("off", "offline", "online"),
    )
    wandb_project: str = key("asyncrl", "Project of the run at Weights & Biases.")
    level: str = key(
        "info", "Least important messages that the daemons log.", choices=("debug", "info", "warning", "error")
    )


@dataclass
class Config:
    """All sections. Both daemons read the same file."""

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
