"""Sections that say how the run and its daemons work: files, learner, generator, links, weights, checkpoints, logs."""

from __future__ import annotations

from dataclasses import dataclass

from asyncrl.config.declaration import ACCEPTED, REFUSED, RULED, key


@dataclass
class RunConfig:
    """The run as a whole."""

    name: str = key(
        "run",
        "Names the run in logs, checkpoints and the handshake; daemons of different runs refuse each other.",
        if_changed=ACCEPTED,
    )
    dir: str = key(
        "runs/${run.name}",
        "Folder for everything the run writes: journal, checkpoints, metrics, export.",
        if_changed=ACCEPTED,
    )
    steps: int = key(100, "Optimizer steps to train; the run ends at this policy version.", minimum=1, if_changed=RULED)
    journal_max_gib: float = key(
        20.0,
        "Size of the journal in GiB up to which rollouts are taken. Each time it has grown by its share of that "
        "(1 / (checkpoint.keep + 2)), a checkpoint is saved out of turn, so that old segments can be deleted.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    journal_keep: bool = key(
        False,
        "Keep the whole journal, within run.journal_max_gib, so that `asyncrl replay` and `asyncrl what-if` can train "
        "the run again; else what no checkpoint needs is deleted. A learner that starts again reads all that is kept.",
        if_changed=ACCEPTED,
    )
    min_free_gib: float = key(
        1.0,
        "Free space on the disk of run.dir, in GiB, below which no rollouts are taken, until there is room again; "
        "training and evaluation go on with what is there. 0 = no such limit.",
        minimum=0.0,
        if_changed=ACCEPTED,
    )
    seed: int = key(
        0,
        "Seeds the order of the prompts, new parts of the model (a critic, adapters) and the trainer.",
        minimum=0,
        maximum=2**31 - 1,
        if_changed=REFUSED,
    )


@dataclass
class LearnerConfig:
    """The trainer: the batch, the optimizer, and the process."""

    groups_per_step: int = key(
        16, "Groups (prompts) in the batch of one optimizer step.", minimum=1, if_changed=REFUSED
    )
    epochs: int = key(1, "Passes over the batch in one step.", minimum=1, if_changed=REFUSED)
    mini_batches: int = key(
        1,
        "Parts into which each pass cuts the batch, with one optimizer update for each; the step still makes one "
        "policy version.",
        minimum=1,
        if_changed=REFUSED,
    )
    lr: float = key(1e-6, "AdamW learning rate.", above=0.0, if_changed=ACCEPTED)
    lr_warmup_steps: int = key(
        0, "First steps, over which the learning rate rises linearly to learner.lr.", minimum=0, if_changed=ACCEPTED
    )
    betas: list[float] = key([0.9, 0.95], "AdamW betas.", if_changed=ACCEPTED)
    weight_decay: float = key(0.0, "AdamW weight decay.", minimum=0.0, if_changed=ACCEPTED)
    grad_clip: float = key(
        1.0, "Largest L2 norm of the gradient; a larger one is scaled down to it.", above=0.0, if_changed=ACCEPTED
    )
    micro_batch_tokens: int = key(
        16384,
        "Tokens in one forward and backward pass, shared by learner.sequence_parallel processes; gradients add up over "
        "the passes of an update.",
        minimum=1,
        if_changed=ACCEPTED,
    )
    device: str = key(
        "auto",
        "Device of the trainer; auto = cuda if there is a GPU, else cpu.",
        choices=("auto", "cpu", "cuda"),
        if_changed=ACCEPTED,
    )
    threads: int = key(1, "CPU threads of each trainer rank.", minimum=1, if_changed=ACCEPTED)
    cpus: list[int] = key(
        [], "CPUs that desk and trainer are pinned to; empty = they are not pinned.", if_changed=ACCEPTED
    )
    ranks: int = key(
        1,
        "Trainer processes on each host; they share every batch, and under learner.engine=fsdp the model too. On GPUs "
        "one for each.",
        minimum=1,
        maximum=1024,
        if_changed=ACCEPTED,
    )
    nodes: int = key(
        1,
        "Hosts with trainer processes. On the learner's own host they are started by it, on each further one by "
        "`asyncrl-trainer-node CONFIG --node N` with N = 1, 2, ...",
        minimum=1,
        maximum=1024,
        if_changed=ACCEPTED,
    )
    port: int = key(
        0,
        "TCP port of weights.host at which trainer processes meet; 0 = any free one, which is for one host only.",
        minimum=0,
        maximum=65535,
        if_changed=ACCEPTED,
    )
    sequence_parallel: int = key(
        1,
        "Neighbouring trainer processes that share the tokens of each micro-batch (Ulysses): for sequences too long "
        "for one GPU. A divisor of learner.ranks x learner.nodes and of the model's attention heads; best one of "
        "learner.ranks, for every layer exchanges tokens between them.",
        minimum=1,
        maximum=1024,
        if_changed=ACCEPTED,
    )
    replicas: int = key(
        1,
        "Copies of the model among the trainer processes (hybrid sharding): each copy lies in slices on as many "
        "neighbouring processes as learner.ranks x learner.nodes / learner.replicas, and gradients are summed over all "
        "copies. With several hosts a multiple of learner.nodes, for then no layer is gathered over the network; a "
        "divisor of it where a copy takes more than one host.",
        minimum=1,
        maximum=1024,
        if_changed=ACCEPTED,
    )
    engine: str = key(
        "auto",
        "How the model is held: whole in one process (single), or in shards by torch's FSDP2 (fsdp); auto = fsdp with "
        "several trainer processes and on GPUs.",
        choices=("auto", "single", "fsdp"),
        if_changed=ACCEPTED,
    )
    activation_checkpointing: str = key(
        "none",
        "What the backward pass computes again instead of keeping it: nothing (none), all but matrix products and "
        "attention (selective), or each layer from its input (full). Only learner.engine=fsdp does this.",
        choices=("none", "selective", "full"),
        if_changed=ACCEPTED,
    )
    offload_optimizer: bool = key(
        False,
        "Keep master weights, gradients and optimizer state in the memory of the host and update them on its CPU. Only "
        "learner.engine=fsdp does this.",
        if_changed=ACCEPTED,
    )
    deterministic: bool = key(
        False,
        "Use only kernels that give the same bits for the same input, which GPUs pay for in speed. On CPUs it changes "
        "nothing: there all of them do.",
        if_changed=ACCEPTED,
    )
    max_trainer_restarts: int = key(
        3,
        "How often in a row a trainer that died without making a new version is started again.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    on_bad_batch: str = key(
        "stop",
        "What happens when the trainer died more often than that on one batch: the run ends and names it (stop), or "
        "its prompts are left out and the run goes on (skip).",
        choices=("stop", "skip"),
        if_changed=ACCEPTED,
    )
    http: str = key(
        "auto",
        "Where the learner answers /healthz and, for Prometheus, /metrics: a free port of 127.0.0.1, which is logged "
        "and written to run.dir/http (auto), a loopback or private HOST:PORT, or nowhere (off). Anybody who reaches it "
        "may read it.",
        if_changed=ACCEPTED,
    )


@dataclass
class GeneratorConfig:
    """The rollout engine and its rewards."""

    id: str = key(
        "",
        "Lasting name of this generator; empty = the host name and a number, which is kept in run.dir.",
        if_changed=ACCEPTED,
    )
    max_sequences: int = key(64, "Sequences that are decoded at once.", minimum=1, if_changed=ACCEPTED)
    tensor_parallel_size: int = key(
        1,
        "GPUs (or CPU workers) over which one copy of the model is spread.",
        minimum=1,
        maximum=1024,
        if_changed=ACCEPTED,
    )
    kv_cache_gib: float = key(
        1.0,
        "Size of the KV cache on the CPU, in GiB; on a GPU see generator.gpu_memory_fraction.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    gpu_memory_fraction: float = key(
        0.85, "Share of the GPU's memory that the engine may take.", above=0.0, maximum=1.0, if_changed=ACCEPTED
    )
    compile: str = key(
        "auto",
        "Let vLLM compile the model: a slower start for faster steps. auto = on GPUs only; small models gain nothing.",
        choices=("auto", "always", "never"),
        if_changed=ACCEPTED,
    )
    device: str = key(
        "auto",
        "Device of the engine; auto = cuda if there is a GPU, else cpu.",
        choices=("auto", "cpu", "cuda"),
        if_changed=ACCEPTED,
    )
    threads: int = key(1, "CPU threads of each engine worker.", minimum=1, if_changed=ACCEPTED)
    cpus: list[int] = key(
        [],
        "CPUs that the generator and its engine are pinned to; empty = they are not pinned. Tensor-parallel workers "
        "take the first of them, generator.threads each, so give two such generators of one host different ones.",
        if_changed=ACCEPTED,
    )
    reward_workers: int = key(1, "Processes that compute rewards.", minimum=1, if_changed=ACCEPTED)
    reward_timeout_s: float = key(
        10.0,
        "Deadline of one reward, in seconds; then its worker is killed and the lease fails.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    lease_timeout_s: float = key(
        600.0,
        "Deadline of one lease from grant to result, in seconds; then its prompt is leased again.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    outbox_bytes: int = key(
        64 * 2**20,
        "Bytes of results that are kept until the learner has them on disk; when they are full, no lease is taken.",
        minimum=1,
        if_changed=ACCEPTED,
    )
    unreachable_timeout_s: float = key(
        600.0,
        "Give up (exit code 3) when the learner has not answered for this many seconds.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    drain_timeout_s: float = key(
        6.0,
        "After SIGTERM, finish what can be finished within this many seconds, and hand back the other leases.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    http: str = key(
        "auto",
        "Where the generator answers /healthz and, for Prometheus, /metrics: a free port of 127.0.0.1, which is logged "
        "and written to run.dir/http (auto), a loopback or private HOST:PORT, or nowhere (off). Anybody who reaches it "
        "may read it.",
        if_changed=ACCEPTED,
    )


@dataclass
class TransportConfig:
    """The rollout link between generators and learner."""

    address: str = key(
        "auto",
        "Where the learner listens and the generators connect. auto = a socket file in run.dir, which only its user "
        "can reach; from other hosts tcp://HOST:PORT, never a wildcard. Several addresses, separated by commas, or "
        "file:PATH with one per line: the learner takes the first of its host, and generators try one after another "
        "while it is silent, so that it can move. The file is read again each time.",
        if_changed=ACCEPTED,
    )
    server_key_file: str = key(
        "",
        "File with the learner's secret CURVE key; required for an address that is not loopback.",
        if_changed=ACCEPTED,
    )
    server_public_key_file: str = key(
        "", "File with the learner's public CURVE key, for the generators.", if_changed=ACCEPTED
    )
    client_key_file: str = key("", "File with the secret CURVE key of this generator.", if_changed=ACCEPTED)
    allowed_keys_file: str = key(
        "",
        "File with the public keys of the generators that the learner admits: one line each, the key and then the "
        "generator.id that it may speak for. It is read again when it changes. bin/keys writes it. Who is admitted is "
        "trusted: it can fill the learner's memory.",
        if_changed=ACCEPTED,
    )
    max_frame_bytes: int = key(
        64 * 2**20,
        "Largest message, in bytes; a larger one is refused before it is decoded.",
        minimum=4096,
        if_changed=ACCEPTED,
    )
    credit_bytes: int = key(
        64 * 2**20,
        "Bytes of results that a generator may send ahead of the learner's acknowledgements.",
        minimum=4096,
        if_changed=ACCEPTED,
    )


@dataclass
class WeightsConfig:
    """How new policies reach the generators."""

    host: str = key(
        "127.0.0.1",
        "Private address of the learner at which generators meet it for weights. There is no authentication: use a "
        "trusted network only.",
        if_changed=ACCEPTED,
    )
    port: int = key(
        0,
        "TCP port of weights.host at which generators meet the learner for weights, one for all of them; 0 = any free "
        "port for each channel. The bytes themselves go over further connections between all members of a cell, each "
        "of which listens at a port of the kernel's choice (net.ipv4.ip_local_port_range): asyncrl/weights/README.md "
        "says what a firewall must let through. ipc stays on one machine and does not use it.",
        minimum=0,
        maximum=65535,
        if_changed=ACCEPTED,
    )
    backend: str = key(
        "auto",
        "How weights travel; auto = for each generator what suits: nccl between GPUs, ipc on the learner's own GPU, "
        "else gloo. ipc is for one machine: "
        "generators copy out of the learner's own buffer, on one GPU (where nccl does not work) or on the CPU; all run "
        "as one user in one PID namespace.",
        choices=("auto", "gloo", "nccl", "ipc"),
        if_changed=ACCEPTED,
    )
    bucket_bytes: int = key(64 * 2**20, "Bytes that are sent in one collective.", minimum=1024, if_changed=ACCEPTED)
    timeout_s: float = key(
        30.0,
        "Deadline of each phase of a sync, in seconds; a generator that exceeds it is left out.",
        above=0.0,
        if_changed=ACCEPTED,
    )
    cell_size: int = key(
        8,
        "Largest number of generators that share one collective; the learner sends once for each such cell. A "
        "generator that hangs delays those of its cell alone, for one deadline.",
        minimum=1,
        if_changed=ACCEPTED,
    )
    canary_sequences: int = key(
        4, "Probe sequences that learner and generator both score at each sync.", minimum=1, if_changed=ACCEPTED
    )
    canary_tolerance: float = key(
        0.0,
        "Largest difference of a log-prob on the probe sequences, in nats; the mean of all may be a quarter of it. "
        "0 = 1e-4 in float32 (0.02 where one of both computes on a GPU), 0.35 in bfloat16.",
        minimum=0.0,
        if_changed=ACCEPTED,
    )


@dataclass
class CheckpointConfig:
    """What a restarted learner goes on from. Weights never reach generators this way."""

    every: int = key(
        50,
        "Save after every so many steps, besides at the end and on SIGTERM; 0 = at those two only.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    keep: int = key(2, "Verified checkpoints that are kept.", minimum=1, if_changed=ACCEPTED)
    resume: str = key(
        "auto",
        "Go on from the newest verified checkpoint and the journal after it (auto), or refuse a run.dir that was used "
        "before (never). The other two go on in the same way, but where the run cannot be gone on with, because a key "
        "that decides it was changed or files are damaged, they set it aside in run.dir/earlier and begin a new run: "
        "with the weights of the newest checkpoint as version 0 (fork), or with model.path (fresh).",
        choices=("auto", "never", "fork", "fresh"),
        if_changed=ACCEPTED,
    )


@dataclass
class LogConfig:
    """What is logged, besides metrics.jsonl, which has every figure."""

    wandb: str = key(
        "off",
        "Also log to Weights & Biases: not at all (off), into files for `wandb sync` (offline), or at once, which "
        "needs a key (online).",
        choices=("off", "offline", "online"),
        if_changed=ACCEPTED,
    )
    wandb_project: str = key("asyncrl", "Project of the run at Weights & Biases.", if_changed=ACCEPTED)
    level: str = key(
        "info",
        "Least important messages that the daemons log.",
        choices=("debug", "info", "warning", "error"),
        if_changed=ACCEPTED,
    )
    rollouts_every: int = key(
        20,
        "Write rollouts of every so many steps to run.dir/rollouts, and of the first and the last step; 0 = of none. "
        "`asyncrl rollouts RUN` shows them.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    rollouts_per_step: int = key(
        12,
        "How many of such a step: about a third with the best rewards, as many with the worst, and others at random.",
        minimum=1,
        maximum=4096,
        if_changed=ACCEPTED,
    )
    rollouts_per_eval: int = key(
        128,
        "Held-out prompts whose completions are written of each evaluation: the first so many, the same ones each "
        "time; 0 = none.",
        minimum=0,
        if_changed=ACCEPTED,
    )
    rollouts_max_mib: float = key(
        256.0,
        "Size of run.dir/rollouts in MiB. Beyond it the oldest files go, those of the first step and the first "
        "evaluation last; one file takes a quarter of it at most, and lines that would not fit are left out.",
        minimum=1.0,
        if_changed=ACCEPTED,
    )
