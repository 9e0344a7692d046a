"""How much memory and disk a daemon will need, worked out from the configuration and the headers of the model's files.

N is the number of parameters, T of those that are trained (adapters count as parameters), e the bytes of an element of
model.dtype. What a trainer holds on a CPU was measured and is within a tenth (`benchmarks/speed/memory_forecast.py`).
On GPUs nothing was measured yet; replay buffer and journal are upper bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from asyncrl.config import Config
from asyncrl.config.checks import largest_group_bytes
from asyncrl.config.host_checks import has_own_critic
from asyncrl.host.model_config import size_of, vocab_size
from asyncrl.host.model_folder import ModelFiles, find_model

FLOAT32 = 4
ADAM_BYTES = 8  # two float32 moments
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30

DESK = 120 * 2**20
TRAINER_LIBRARIES = 400 * 2**20  # torch for CPUs and transformers, of one rank after its first pass
GPU_LIBRARIES = 700 * 2**20  # with CUDA's, of one rank; not measured
ENGINE_LIBRARIES = 2 * GIB  # vLLM and its processes
REWARD_WORKER = 150 * 2**20
GPU_CONTEXT = 768 * 2**20  # CUDA, cuBLAS, NCCL
STAGING_SLOTS = 3  # buckets on their way to a tensor-parallel worker
HEAD_CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**30}  # CHUNK_BYTES and MIN_CHUNK_ROWS of algorithms.logprobs
MIN_CHUNK_ROWS = 128
ENGINE_STEP_TOKENS = 8192  # tokens of one step of the engine, for which it keeps room
# Of activations, on CPUs: freed memory between tensors that live, which the C library keeps for later ones. Fitted to
# what small models were measured to take; a pass with adapters, which makes more temporaries, leaves more of it.
HEAP_HOLES, HEAP_HOLES_WITH_ADAPTERS = 0.3, 1.25
NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head", "norm", "router", ".gate.weight")

GPU = "GPU"
HOST = "host"
DISK = "disk"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that something takes in one place: GPU (each of them), host or disk."""

    place: str
    name: str
    num_bytes: int


def learner_needs(config: Config, model: ModelFiles, *, on_gpu: bool) -> list[Need]:
    """What the learner holds in memory and writes to disk: on a GPU of one rank, on a host of all its ranks.

    Raises ModelError when a model's files cannot be read.
    """
    learner, element = config.learner, ELEMENT_BYTES[config.model.dtype]
    count, trained = model.num_parameters(), trained_parameters(config, model)
    critic = _critic_parameters(config, model)
    buffers = 2 if config.model.dtype == "float32" else 3
    # Ranks whose part of a model lies in one place: all of a host, or one on its GPU. They hold slices of it.
    here = 1 if on_gpu else learner.ranks
    world = learner.ranks * learner.nodes
    sharded = _is_sharded(config, on_gpu=on_gpu)
    device = GPU if on_gpu else HOST

    def slices(num_bytes: int, where: str = device, replicas: int = learner.replicas) -> int:
        ranks = learner.ranks if where == HOST else here
        return math.ceil(num_bytes * ranks * replicas / world) if sharded else num_bytes

    # Of slices that several ranks hold, each sends a part.
    snapshot = slices(buffers * _synced_bytes(config, model, trained, element), replicas=1)

    frozen = element if sharded else FLOAT32
    state = HOST if learner.offload_optimizer else device
    needs = [
        Need(state, "master weights, float32", slices(FLOAT32 * trained + frozen * (count - trained), state)),
        Need(state, "gradients, float32", slices(FLOAT32 * trained, state)),
        Need(state, "Adam moments, float32", slices(ADAM_BYTES * trained, state)),
        Need(device, f"snapshot buffers, {buffers}", snapshot),
        Need(device, f"activations of {learner.micro_batch_tokens:,} tokens", here * activation_bytes(config, model)),
        Need(device, "a pass through the head or a layer", here * passing_bytes(config, model, on_gpu=on_gpu)),
        Need(HOST, "copies of a checkpoint that is being written", _checkpoint_copies(config, trained, critic)),
    ]
    if not on_gpu:
        needs.append(Need(HOST, "room that the heap keeps", here * heap_holes(config, model)))
    if sharded:
        needs.append(Need(device, "layers put together, 2", here * 2 * _largest_layer_bytes(model, element)))
    elif config.model.dtype != "float32":
        needs.append(Need(device, f"compute copy, {config.model.dtype}", element * count))
    if config.algorithm.kl_coef > 0 and config.update.what != "lora":
        held = element if sharded else FLOAT32
        needs.append(Need(device, "reference policy", slices(held * (count if sharded else trained))))
    if critic:
        needs.append(Need(state, "critic with gradients and Adam moments", slices((2 * FLOAT32 + ADAM_BYTES) * critic)))
    groups = (config.staleness.max_age + 1) * learner.groups_per_step
    needs.append(Need(HOST, f"replay buffer, at most {groups} groups", groups * largest_group_bytes(config)))
    needs.append(Need(HOST, "desk", DESK))
    needs.append(Need(HOST, "libraries", learner.ranks * (GPU_LIBRARIES if on_gpu else TRAINER_LIBRARIES)))
    if on_gpu:
        needs.append(Need(GPU, "CUDA context", GPU_CONTEXT))
        loaded = _loading_bytes(config, model, world // learner.replicas) if sharded else FLOAT32 * count
        needs.append(Need(HOST, "the model while it is loaded", learner.ranks * loaded))
    return needs + _disk_needs(config, count, trained, critic)


def generator_needs(config: Config, model: ModelFiles, *, on_gpu: bool) -> list[Need]:
    """What a generator holds; on GPUs, of one of generator.tensor_parallel_size. KV cache: see `kv_cache`."""
    count, element = model.num_parameters(), ELEMENT_BYTES[config.model.dtype]
    generator = config.generator
    share = math.ceil(count * element / generator.tensor_parallel_size) if on_gpu else count * element
    device = GPU if on_gpu else HOST
    needs = [
        Need(device, f"weights, {config.model.dtype}", share),
        *_staging_needs(config, model, element, device),
        Need(HOST, "outbox, at most", generator.outbox_bytes),
        Need(HOST, "libraries", ENGINE_LIBRARIES),
        Need(HOST, "reward workers", generator.reward_workers * REWARD_WORKER),
    ]
    if on_gpu:
        needs.append(Need(GPU, "CUDA context", GPU_CONTEXT))
        needs.append(Need(GPU, "activations of the engine", _engine_activations(config, model, element)))
    else:
        needs.append(Need(HOST, "KV cache", int(generator.kv_cache_gib * GIB)))
    return needs


def _staging_needs(config: Config, model: ModelFiles, element: int, device: str) -> list[Need]:
    """A version in staging. Tensor-parallel workers keep their slices, but for the first one, which all have whole."""
    whole = _synced_bytes(config, model, None, element)
    workers = config.generator.tensor_parallel_size
    if config.update.what != "full":
        travels = 0 if config.update.what == "lora" and config.update.lora_sync != "merged" else whole
        return [
            Need(device, "staging buffer of the broadcast", whole),
            Need(device, "what does not travel, from model.path", max(0, model.num_bytes - travels)),
        ]
    if workers == 1:
        return [Need(device, "staging buffer of the broadcast", whole)]
    slots = STAGING_SLOTS * config.weights.bucket_bytes
    kept = math.ceil(whole / workers) + slots if device == GPU else whole + workers * slots
    return [
        Need(device, "staging buffer of the broadcast", kept),
        Need(HOST, f"the first version, whole in each of {workers} workers", workers * whole),
    ]


def kv_cache(
    config: Config, model: ModelFiles, needs: list[Need], gpu_bytes: int | None, *, on_gpu: bool
) -> int | None:
    """Sequences of full length for which the KV cache has room; None where that cannot be said.

    On a GPU the cache takes what the rest leaves of generator.gpu_memory_fraction.
    """
    per_token = model.kv_bytes_per_token(ELEMENT_BYTES[config.model.dtype])
    if not per_token:
        return None
    room = int(config.generator.kv_cache_gib * GIB)
    if on_gpu:
        if gpu_bytes is None:
            return None
        # Each GPU holds its share of the heads.
        per_token = math.ceil(per_token / config.generator.tensor_parallel_size)
        taken = sum(need.num_bytes for need in needs if need.place == GPU)
        room = int(config.generator.gpu_memory_fraction * gpu_bytes) - taken
    return max(0, room) // (per_token * config.model.max_length)


def trained_parameters(config: Config, model: ModelFiles) -> int:
    """How many parameters `update` trains, by the names and shapes in the files' headers."""
    shapes = model.shapes()
    update = config.update
    if update.what == "full":
        return sum(math.prod(shape) for shape in shapes.values())
    if update.what == "partial":
        chosen = [name for name in shapes if any(fnmatchcase(name, pattern) for pattern in update.names)]
        tied_head = "lm_head.weight" not in shapes and any(fnmatchcase("lm_head.weight", p) for p in update.names)
        if tied_head:
            chosen += [name for name in shapes if name.endswith("embed_tokens.weight") and name not in chosen]
        return sum(math.prod(shapes[name]) for name in chosen)
    return sum(update.lora_rank * (out + into) for out, into in _adapted_shapes(config, shapes))


def activation_bytes(config: Config, model: ModelFiles) -> int:
    """What passes of one rank through the layers of a micro-batch keep, in bytes. Measured by counting saved tensors.

    In each layer two norms keep inputs and outputs in float32 (4 x hidden), and 2 more where their weights are trained;
    attention queries, its output, keys and values; the MLP four tensors of its inner size. In bfloat16 the layer's
    input is there once more. The final norm comes on top.
    """
    tokens, element = _own_tokens(config), ELEMENT_BYTES[config.model.dtype]
    sizes = model.config
    layers, hidden = size_of(sizes, "num_hidden_layers"), size_of(sizes, "hidden_size")
    inner = _inner_size(sizes, hidden)
    heads = size_of(sizes, "num_attention_heads") or 1
    head_dim = size_of(sizes, "head_dim") or hidden // heads
    attention = heads * head_dim
    keys = (size_of(sizes, "num_key_value_heads") or heads) * head_dim
    cast = 0 if element == FLOAT32 else element * hidden
    norms = 6 if _trains_norms(config, model) else 4
    layer = FLOAT32 * norms * hidden + element * (2 * attention + 2 * keys + 4 * inner) + cast
    kept = {
        "none": layers * layer,
        # What is cheap is computed again: products and attention stay.
        "selective": layers * (FLOAT32 * hidden + element * (2 * attention + 2 * keys + 2 * inner + 2 * hidden))
        + layer,
        "full": layers * FLOAT32 * hidden + layer,
    }[config.learner.activation_checkpointing]
    # A critic's own trunk comes after the actor's backward pass, and needs as much again, but not at the same time.
    return tokens * (kept + 9 * hidden)


def passing_bytes(config: Config, model: ModelFiles, *, on_gpu: bool) -> int:
    """What the part of the model that a pass is in takes while it is there, beside what is kept: head or layer."""
    sizes = model.config
    hidden = size_of(sizes, "hidden_size")
    inner = _inner_size(sizes, hidden)
    element = ELEMENT_BYTES[config.model.dtype]
    gradients = _own_tokens(config) * element * (3 * inner + 2 * hidden)
    return max(gradients, head_bytes(config, model, on_gpu=on_gpu))


def heap_holes(config: Config, model: ModelFiles) -> int:
    """What a trainer on a CPU has resident and does not use while activations are at their largest."""
    share = HEAP_HOLES_WITH_ADAPTERS if config.update.what == "lora" else HEAP_HOLES
    return int(share * activation_bytes(config, model))


def head_bytes(config: Config, model: ModelFiles, *, on_gpu: bool) -> int:
    """Chunks of logits, and the head's gradient a second time, before it is added to what is there."""
    vocab, hidden = vocab_size(model.config), size_of(model.config, "hidden_size")
    row = FLOAT32 * vocab
    chunk = max(HEAD_CHUNK_BYTES["cuda" if on_gpu else "cpu"], MIN_CHUNK_ROWS * row)
    chunks = 3 * min(chunk, _own_tokens(config) * row)
    gradients = row * hidden if config.update.what == "full" else 0  # the embedding's comes when activations are gone
    operands = 0
    if config.model.dtype != "float32" and not on_gpu:
        operands = (FLOAT32 + ELEMENT_BYTES[config.model.dtype]) * vocab * hidden  # a CPU multiplies them as float32
    return chunks + gradients + operands


def _own_tokens(config: Config) -> int:
    """Of a micro-batch, those that one rank computes."""
    return math.ceil(config.learner.micro_batch_tokens / config.learner.sequence_parallel)


def _inner_size(sizes: dict[str, Any], hidden: int) -> int:
    """Of the MLP that one token passes: of all its experts together."""
    experts = size_of(sizes, "num_experts_per_tok")
    if experts and size_of(sizes, "moe_intermediate_size"):
        return experts * size_of(sizes, "moe_intermediate_size")
    return size_of(sizes, "intermediate_size") or 4 * hidden


def _trains_norms(config: Config, model: ModelFiles) -> bool:
    """Whether weights of norms within layers are trained: then their inputs are kept normalised, too."""
    update = config.update
    if update.what != "partial":
        return update.what == "full"
    norms = [name for name in model.shapes() if "norm" in name and ".layers." in name]
    return any(fnmatchcase(name, pattern) for name in norms for pattern in update.names)


def _is_sharded(config: Config, *, on_gpu: bool) -> bool:
    learner = config.learner
    several = learner.ranks * learner.nodes > 1
    return learner.engine == "fsdp" or (learner.engine == "auto" and (several or on_gpu))


def _largest_layer_bytes(model: ModelFiles, element: int) -> int:
    """Of what is put together for one pass: the embedding with the head, or a layer."""
    layers = size_of(model.config, "num_hidden_layers") or 1
    sizes: dict[str, int] = {}
    for name, shape in model.shapes().items():
        parts = name.split(".")
        number = next((part for part in parts if part.isdecimal() and int(part) < layers), "root")
        sizes[number] = sizes.get(number, 0) + math.prod(shape)
    return element * max(sizes.values(), default=0)


def _loading_bytes(config: Config, model: ModelFiles, ranks: int) -> int:
    """What one of the ranks of a replica holds on its way to a GPU: its rows of one tensor, as stored and as float32.

    Whole are experts, which are one tensor in memory, and what is not trained, for its digest. A kind of model that is
    loaded whole (see `trainer/engines/stored_weights.py`) takes more.
    """
    sizes: dict[str, int] = {}
    for name, shape in model.shapes().items():
        fused, expert, _ = name.partition(".experts.")
        name = fused + expert if expert else name
        rows = math.prod(shape) if expert or config.update.what != "full" else math.ceil(math.prod(shape) / ranks)
        sizes[name] = sizes.get(name, 0) + rows
    return 2 * FLOAT32 * max(sizes.values(), default=0)


def _checkpoint_copies(config: Config, trained: int, critic: int) -> int:
    """Weights and moments of all that is trained, in host memory, of the ranks of one host."""
    return math.ceil((FLOAT32 + ADAM_BYTES) * (trained + critic) / config.learner.nodes)


def _adapted_shapes(config: Config, shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """(outputs, inputs) of the layers that get an adapter."""
    targets = config.update.lora_targets
    found = []
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        if targets:
            adapted = any(layer == target or layer.endswith(f".{target}") for target in targets)
        else:
            adapted = not any(word in name for word in NOT_ADAPTED)
        if adapted:
            found.append((shape[0], shape[1]))
    return found


def _synced_bytes(config: Config, model: ModelFiles, trained: int | None, element: int) -> int:
    """Bytes of one sync: of all weights, of the adapters, or of the layers that they are folded into."""
    if config.update.what == "lora" and config.update.lora_sync == "merged":
        return element * sum(out * into for out, into in _adapted_shapes(config, model.shapes()))
    return element * (trained_parameters(config, model) if trained is None else trained)


def _critic_parameters(config: Config, model: ModelFiles) -> int:
    """Parameters of a critic with a trunk of its own, which has no head of a language model; 0 without one."""
    if not has_own_critic(config):
        return 0
    files = find_model(config.critic.path, "critic.path") if config.critic.path else model
    return sum(math.prod(shape) for name, shape in files.shapes().items() if not name.startswith("lm_head."))


def _engine_activations(config: Config, model: ModelFiles, element: int) -> int:
    sizes = model.config
    hidden = size_of(sizes, "hidden_size")
    inner = size_of(sizes, "intermediate_size") or 4 * hidden
    tokens = max(ENGINE_STEP_TOKENS, config.model.max_length)
    return (
        tokens * (4 * hidden + 2 * inner) * element + config.generator.max_sequences * vocab_size(sizes) * 2 * FLOAT32
    )


def _disk_needs(config: Config, count: int, trained: int, critic: int) -> list[Need]:
    """What the run writes. The newest checkpoint is one more to hold while it is written."""
    element = ELEMENT_BYTES[config.model.dtype]
    exported = element * count
    weights = FLOAT32 * count if config.update.what == "full" else exported + FLOAT32 * trained
    checkpoint = weights + ADAM_BYTES * trained + (FLOAT32 + ADAM_BYTES) * critic
    keep, every = config.checkpoint.keep, config.checkpoint.every
    steps = config.run.steps
    kept_steps = min(steps, keep * every if every else steps) + config.staleness.max_age + 1
    groups = kept_steps * config.learner.groups_per_step
    journal = min(groups * largest_group_bytes(config), int(config.run.journal_max_gib * GIB))
    return [
        Need(DISK, f"checkpoints, {keep} kept and 1 in writing", (keep + 1) * checkpoint),
        Need(DISK, "export", exported),
        Need(DISK, f"journal of {kept_steps} steps, at most", journal),
        Need(DISK, "left free (run.min_free_gib)", int(config.run.min_free_gib * GIB)),
    ]
