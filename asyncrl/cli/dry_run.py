"""What a daemon would bind, load and need, worked out from the configuration and the model's file headers."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.checks import largest_group_bytes, on_loopback
from asyncrl.config.host_checks import has_gpu, is_on_gpu, weight_backend
from asyncrl.config.loading import to_yaml
from asyncrl.host.addresses import rollout_address
from asyncrl.host.model_folder import ModelFiles, find_model

MASTER_BYTES = 4  # float32
ADAM_BYTES = 8  # two float32 moments
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}

Rows = list[tuple[str, str]]


def describe(config: Config, role: str) -> str:
    """The resolved configuration, and what the daemon `role` ("learner" or "generator") would do with it.

    Binds the learner's port for a moment, to see whether it is free, and starts nothing. Raises ModelError when the
    model's files cannot be read.
    """
    model = find_model(config.model.path)
    memory = learner_memory(config, model) if role == "learner" else generator_memory(config, model)
    blocks = {
        "configuration": to_yaml(config).rstrip(),
        "network": _table(_learner_network(config) if role == "learner" else _generator_network(config)),
        "model": _table(_model(config, model)),
        "memory": _table(_memory_rows(memory)),
    }
    if role == "learner":
        blocks["disk"] = _table(_disk(config, model))
    title = f"asyncrl-{role}: dry run, nothing was started"
    return "\n\n".join([title, *(f"{name}\n{text}" for name, text in blocks.items())])


# -- network -------------------------------------------------------------------------------------------------


def _learner_network(config: Config) -> Rows:
    address = rollout_address(config.transport.address)
    return [
        ("rollouts, binds", f"{config.transport.address}, {_security(config)}; {_probe(address.host, address.port)}"),
        (
            "weights, binds",
            f"a free port of {config.weights.host}, backend {_backend(config)}, not authenticated",
        ),
    ]


def _generator_network(config: Config) -> Rows:
    return [
        ("rollouts, connects to", f"{config.transport.address}, {_security(config)}"),
        (
            "weights, connects to",
            f"{config.weights.host}, backend {_backend(config)}",
        ),
    ]


def _security(config: Config) -> str:
    keyed = config.transport.server_key_file or config.transport.client_key_file
    return "CURVE" if keyed else "loopback without keys" if on_loopback(config) else "CURVE keys missing"


def _backend(config: Config) -> str:
    backend = weight_backend(config, gpu_here=has_gpu())
    return f"{backend} (auto)" if config.weights.backend == "auto" else backend


def _probe(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"NOT available now ({os.strerror(error.errno) if error.errno else error})"
    return "free now"


# -- model and memory ----------------------------------------------------------------------------------------


def _model(config: Config, model: ModelFiles) -> Rows:
    names = ", ".join(path.name for path in model.weight_files[:3])
    more = f" and {len(model.weight_files) - 3} more" if len(model.weight_files) > 3 else ""
    return [
        ("folder", str(model.folder)),
        ("type", str(model.config.get("model_type", "unknown"))),
        ("files", f"{names}{more} ({_size(model.num_bytes)})"),
        ("parameters", f"{model.num_parameters():,}, computed in {config.model.dtype}"),
    ]


def learner_memory(config: Config, model: ModelFiles) -> dict[str, int]:
    """Upper bound of the bytes that the learner holds, by what they hold; activations come on top.

    With N parameters and e bytes per element of model.dtype: master weights 4N, gradients 4N, Adam moments 8N, two
    staging buffers of the broadcast 2eN; a compute copy eN when model.dtype is not float32; the frozen reference eN
    when algorithm.kl_coef > 0; 16N for a critic with its own trunk, taken to be as large as the actor. The replay
    buffer holds at most (max_age + 1) x groups_per_step groups of the largest size. With update.what=lora or partial,
    gradients and moments are smaller; how much smaller is known only when the model is loaded.
    """
    count, element = model.num_parameters(), ELEMENT_BYTES[config.model.dtype]
    groups = (config.staleness.max_age + 1) * config.learner.groups_per_step
    need = {
        "master weights, float32": MASTER_BYTES * count,
        "gradients, float32": MASTER_BYTES * count,
        "Adam moments, float32": ADAM_BYTES * count,
        "staging buffers of the broadcast, 2": 2 * element * count,
        f"replay buffer, at most {groups} groups": groups * largest_group_bytes(config),
    }
    if config.model.dtype != "float32":
        need[f"compute copy, {config.model.dtype}"] = element * count
    if config.algorithm.kl_coef > 0:
        need[f"reference policy, {config.model.dtype}"] = element * count
    if config.algorithm.advantage == "gae" and config.critic.trunk == "own":
        need["critic with gradients and Adam moments"] = (2 * MASTER_BYTES + ADAM_BYTES) * count
    return need


def generator_memory(config: Config, model: ModelFiles) -> dict[str, int]:
    """Bytes that a generator holds, by what they hold: weights eN, staging buffer eN, KV cache, outbox.

    N is the number of parameters, e the bytes per element of model.dtype. On a GPU the KV cache takes what weights and
    staging buffer leave of generator.gpu_memory_fraction.
    """
    count, element = model.num_parameters(), ELEMENT_BYTES[config.model.dtype]
    need = {
        f"weights, {config.model.dtype}": element * count,
        "staging buffer of the broadcast": element * count,
        "outbox, at most": config.generator.outbox_bytes,
    }
    per_token = model.kv_bytes_per_token(element)
    if is_on_gpu(config.generator.device, gpu_here=has_gpu()):
        label = f"KV cache: what is left of {config.generator.gpu_memory_fraction:.0%} of GPU memory, at least"
        need[label] = (per_token or 0) * config.model.max_length
        return need
    cache = int(config.generator.kv_cache_gib * 2**30)
    label = "KV cache"
    if per_token:
        longest = cache // (per_token * config.model.max_length)
        label = f"KV cache ({cache // per_token:,} tokens, {longest:,} sequences of full length)"
    need[label] = cache
    return need


def _memory_rows(need: dict[str, int]) -> Rows:
    rows = [(name, _size(count)) for name, count in need.items()]
    rows.append(("sum, without activations and libraries", _size(sum(need.values()))))
    available = _available_bytes()
    if available is not None:
        rows.append(("this host has available", _size(available)))
    return rows


def _available_bytes() -> int | None:
    """MemAvailable of the host, in bytes; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _disk(config: Config, model: ModelFiles) -> Rows:
    """What the run writes. A checkpoint is master weights and moments, 12N bytes; the newest is one more to hold."""
    count = model.num_parameters()
    checkpoint = (MASTER_BYTES + ADAM_BYTES) * count
    keep = config.checkpoint.keep
    folder = Path(config.run.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return [
        ("folder", str(folder)),
        (f"checkpoints, {keep} kept and 1 in writing", _size((keep + 1) * checkpoint)),
        ("export", _size(ELEMENT_BYTES[config.model.dtype] * count)),
        ("journal, per step at most", _size(config.learner.groups_per_step * largest_group_bytes(config))),
        ("free there", _size(shutil.disk_usage(existing).free)),
    ]


def _table(rows: Rows) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
