"""The dry run: what a daemon would bind, load, render and need, and whether the hardware has it.

Nothing is started but the task's helper process, which makes a few prompts as they would be leased, and a worker that
computes a reward. Nothing is written.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from asyncrl.cli.forecast import DISK, GPU, HOST, Need, generator_needs, kv_cache, learner_needs
from asyncrl.cli.hardware import EXAMPLE, Hardware
from asyncrl.config import Config
from asyncrl.config.checks import on_loopback
from asyncrl.config.gpus import visible_gpus
from asyncrl.config.host_checks import is_on_gpu, weight_backends
from asyncrl.config.loading import to_yaml
from asyncrl.host.addresses import AUTO, ROLLOUT_SOCKET, first_of_this_host, rollout_addresses
from asyncrl.host.model_config import vocab_size
from asyncrl.host.model_folder import ModelFiles, find_model

SHOWN_CHARACTERS = 400  # of a prompt
REWARD_GRACE_S = 60.0  # beyond the reward's own deadline: its worker imports the task

Rows = list[tuple[str, str]]

REMEDIES = {
    GPU: "lower learner.micro_batch_tokens, set model.dtype=bfloat16 or update.what=lora, or take a larger GPU",
    HOST: "lower learner.micro_batch_tokens or generator.kv_cache_gib, set model.dtype=bfloat16 or update.what=lora, "
    "or take a larger machine",
    DISK: "lower checkpoint.keep or checkpoint.every, or set run.dir to a larger disk",
}


@dataclass(slots=True)
class DryRun:
    """What is printed, and what keeps the daemon from running, a sentence each with what to change."""

    text: str
    problems: list[str] = field(default_factory=list)


def dry_run(config: Config, role: str, hardware: Hardware) -> DryRun:
    """The resolved configuration, what the daemon `role` ("learner" or "generator") would do with it, and a verdict.

    Binds the learner's port for a moment, to see whether it is free. Raises ModelError when the model's files cannot
    be read, TaskError when the task cannot be made or gives no prompt that fits.
    """
    model = find_model(config.model.path)
    on_gpu = is_on_gpu(getattr(config, role).device, gpu_here=hardware.gpus > 0)
    needs = (learner_needs if role == "learner" else generator_needs)(config, model, on_gpu=on_gpu)
    problems = _hardware_problems(config, role, needs, hardware, on_gpu=on_gpu)
    blocks = {
        "configuration": to_yaml(config).rstrip(),
        "network": _table(
            _learner_network(config, hardware) if role == "learner" else _generator_network(config, hardware)
        ),
        "model": _table([*_model(config, model), ("computed on", _device(config, role, hardware, on_gpu=on_gpu))]),
        "task": _table(_task(config, role, model, problems)),
        "memory and disk": _table(_needs(config, role, model, needs, hardware, problems, on_gpu=on_gpu)),
    }
    title = f"asyncrl-{role}: dry run, nothing was started"
    return DryRun("\n\n".join([title, *(f"{name}\n{text}" for name, text in blocks.items())]), problems)


def verdict(result: DryRun, hardware: Hardware) -> str:
    """The last line of a dry run, or several where something does not fit."""
    if result.problems:
        return "\n".join(f"does not fit: {problem}" for problem in result.problems)
    return "fits" if hardware.is_here else "fits the hardware that --for names"


# -- task ----------------------------------------------------------------------------------------------------


def _task(config: Config, role: str, model: ModelFiles, problems: list[str]) -> Rows:
    """One prompt as the model would be given it, and a reward as it would be computed."""
    from asyncrl.tasks.trial import trial  # it imports numpy

    tried = trial(config)
    size = "endless" if tried.train_size is None else f"{tried.train_size:,} examples"
    rows = [
        ("path", config.task.path),
        ("training", size),
        ("held-out prompts", f"{len(tried.held_out)}"),
        *(("left out", what) for what in tried.left_out[:5]),
    ]
    if len(tried.left_out) > 5:
        rows.append(("left out", f"and {len(tried.left_out) - 5} more"))
    rows.append(("longest prompt of those tried", f"{tried.longest_prompt} tokens"))
    rows.append(("largest token id", f"{tried.largest_token_id}, the model knows {vocab_size(model.config):,}"))
    if not tried.train:
        problems.append("none of the first training prompts can be used; correct the data or raise model.max_length")
        return rows
    first = tried.train[0]
    rows.append((f"training example {first.index}, {len(first.token_ids)} tokens", _shown(first.text)))
    rows.append(("reward of an empty completion", asyncio.run(_try_reward(config, first.text, first.payload))))
    return rows


async def _try_reward(config: Config, prompt: str, payload: dict[str, object]) -> str:
    """The parts of the reward of an empty completion, or why there is none. Parts that ask a server are left out."""
    from asyncrl.rewards.base import RemotePart  # what they import is needed here alone
    from asyncrl.rewards.parts import make_parts
    from asyncrl.rewards.pool import RewardPool

    remote = {name for name, part in make_parts(config.reward.parts).items() if isinstance(part, RemotePart)}
    local = {name: spec for name, spec in config.reward.parts.items() if name not in remote}
    weights = {name: weight for name, weight in config.reward.weights.items() if name not in remote}
    timeout_s = config.generator.reward_timeout_s
    pool = RewardPool(config.task.path, config.task.args, 1, timeout_s, parts=local, weights=weights)
    try:
        await pool.start()
        async with asyncio.timeout(timeout_s + REWARD_GRACE_S):
            (outcome,) = await pool.score([""], dict(payload), prompt, [1])
    finally:
        await pool.close()
    if outcome.parts is None:
        return f"none ({outcome.detail or outcome.reason}); rollouts without a reward are never trained on"
    shown = ", ".join(f"{name} {value:g}" for name, value in outcome.parts.items())
    asked = f"; {', '.join(sorted(remote))} ask a server and were not tried" if remote else ""
    return f"{shown}{asked}"


def _shown(text: str) -> str:
    """A prompt in one line, with its line ends visible, cut in the middle where it is long."""
    line = repr(text)[1:-1]
    if len(line) <= SHOWN_CHARACTERS:
        return line
    half = SHOWN_CHARACTERS // 2
    return f"{line[:half]} ... {line[-half:]}"


# -- network -------------------------------------------------------------------------------------------------


def _learner_network(config: Config, hardware: Hardware) -> Rows:
    port = _probe_addresses(config) if hardware.is_here else "not tried"
    return [
        (
            "rollouts, binds",
            f"{_rollout_place(config)}, {_security(config)}; {port}",
        ),
        (
            "weights, binds",
            f"{_weights_port(config)} {config.weights.host}, backend {_backend(config, hardware)}, not authenticated",
        ),
    ]


def _weights_port(config: Config) -> str:
    return f"port {config.weights.port} of" if config.weights.port else "a free port of"


def _generator_network(config: Config, hardware: Hardware) -> Rows:
    return [
        ("rollouts, connects to", f"{_rollout_place(config)}, {_security(config)}"),
        (
            "weights, connects to",
            f"{config.weights.host}, backend {_backend(config, hardware)}",
        ),
    ]


def _rollout_place(config: Config) -> str:
    address = config.transport.address
    return f"{config.run.dir}/{ROLLOUT_SOCKET}" if address == AUTO else address


def _probe_addresses(config: Config) -> str:
    """Whether the learner could listen now."""
    address = first_of_this_host(rollout_addresses(config.transport.address, config.run.dir))
    return _probe(address.host, address.port) if address.is_tcp else "a socket file needs no port"


def _security(config: Config) -> str:
    keyed = config.transport.server_key_file or config.transport.client_key_file
    if config.transport.address == AUTO and not keyed:
        return "for its user only"
    return "CURVE" if keyed else "loopback without keys" if on_loopback(config) else "CURVE keys missing"


def _backend(config: Config, hardware: Hardware) -> str:
    return weight_backends(config, gpu_here=hardware.gpus > 0)


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


def _device(config: Config, role: str, hardware: Hardware, *, on_gpu: bool) -> str:
    """Where `role` computes, as the keys and the machine have it."""
    key = f"{role}.device={getattr(config, role).device}"
    if not on_gpu:
        return f"the CPU ({key})"
    count = config.generator.tensor_parallel_size if role == "generator" else 1
    if not hardware.is_here:
        return f"{count} of its {hardware.gpus} GPUs ({key})"
    return f"GPU {', '.join(visible_gpus()[:count])} ({key})"


# -- memory and disk -------------------------------------------------------------------------------------------


def _needs(
    config: Config,
    role: str,
    model: ModelFiles,
    needs: list[Need],
    hardware: Hardware,
    problems: list[str],
    *,
    on_gpu: bool,
) -> Rows:
    """Each need under its place, the sum, and what is there."""
    rows: Rows = []
    for place in (GPU, HOST, DISK):
        here = [need for need in needs if need.place == place]
        if not here:
            continue
        rows += [(f"{place}: {need.name}", _size(need.num_bytes)) for need in here]
        rows.append((f"{place}: sum", _size(sum(need.num_bytes for need in here))))
        there = _available(place, hardware)
        which = {GPU: "each has", HOST: "available", DISK: "free"}[place]
        where = f" at {Path(config.run.dir).absolute()}" if place == DISK else ""
        rows.append((f"{place}: {which}", f"{'not known' if there is None else _size(there)}{where}"))
    if role == "generator":
        longest = kv_cache(config, model, needs, hardware.gpu_bytes, on_gpu=on_gpu)
        rows.append(("sequences of full length in the KV cache", "not known" if longest is None else f"{longest:,}"))
        if longest == 0:
            problems.append(
                f"the KV cache holds no sequence of model.max_length={config.model.max_length} tokens; lower that, or "
                + (
                    "raise generator.gpu_memory_fraction or generator.tensor_parallel_size"
                    if on_gpu
                    else "raise generator.kv_cache_gib"
                )
            )
    return rows


def _hardware_problems(config: Config, role: str, needs: list[Need], hardware: Hardware, *, on_gpu: bool) -> list[str]:
    problems = []
    wanted = (config.generator.tensor_parallel_size if role == "generator" else 1) if on_gpu else 0
    if wanted > hardware.gpus:
        problems.append(
            f"{role} needs {wanted} GPUs, there are {hardware.gpus}; set {role}.device=cpu, or name a machine, "
            f"{EXAMPLE}"
        )
    elif on_gpu and hardware.gpu_bytes is None:
        problems.append(f"how much memory a GPU has is not known here; name it, {EXAMPLE}")
    for place in (GPU, HOST, DISK):
        needed, there = sum(need.num_bytes for need in needs if need.place == place), _available(place, hardware)
        if there is not None and needed > there:
            what = {GPU: "memory of each GPU", HOST: "host memory", DISK: "disk"}[place]
            problems.append(f"{_size(needed)} of {what} are needed, {_size(there)} are there; {REMEDIES[place]}")
    return problems


def _available(place: str, hardware: Hardware) -> int | None:
    return {GPU: hardware.gpu_bytes, HOST: hardware.host_bytes, DISK: hardware.disk_bytes}[place]


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
