"""Checks of a configuration that depend on the machine a daemon starts on: files, CPUs, devices, the model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.checks import KEY_PAIRS, on_loopback, raise_all
from asyncrl.config.gpus import has_gpu, visible_gpus
from asyncrl.config.keys import value_of
from asyncrl.host.model_config import check_generation_config, heads_of, heads_problem, known_context, vocab_size
from asyncrl.host.model_folder import ModelFiles, find_model
from asyncrl.host.model_head import check_head
from asyncrl.host.processes import cpu_problem
from asyncrl.host.tokenizer import check_tokenizer_file


def check_host(config: Config, role: str, *, is_here: bool = True) -> ModelFiles:
    """Checks what depends on the machine that `role` ("learner" or "generator") starts on; returns the model.

    is_here: False where it will start on another machine, so that only files can be looked at.

    Raises ConfigError naming every missing key file, CPU and GPU, a weights.host with which no memory can be shared, a
    weights.port that cannot be had, and a model.max_length beyond what the models can read; ModelError when a model is
    missing or cannot be trained.
    """
    here = [*_device_problems(config, role), *_ipc_problems(config)] if is_here else []
    if is_here and role == "learner":
        here += _port_problems(config)
    raise_all([*_key_file_problems(config, role), *here])
    model = find_model(config.model.path)
    check_generation_config(model.folder, f"model.path={config.model.path}")
    check_tokenizer_file(model.folder, f"model.path={config.model.path}")
    check_head(model, f"model.path={config.model.path}")
    raise_all(list(_length_problems(config, model, "model.path")))
    if role == "learner":
        raise_all(list(_head_problems(config, model, "model.path")))
    if role == "learner" and has_own_critic(config) and config.critic.path:
        critic = find_model(config.critic.path, "critic.path")
        problems = [*_critic_problems(model, critic), *_length_problems(config, critic, "critic.path")]
        raise_all([*problems, *_head_problems(config, critic, "critic.path")])
    return model


def _port_problems(config: Config) -> Iterator[str]:
    host, port = config.weights.host, config.weights.port
    if not port:
        return
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)  # with the option above two can bind, but not listen
    except OSError as error:
        yield (
            f"weights.port={port} cannot be had at weights.host={host}: {error.strerror or error}; choose a free port "
            "of an address of this machine, or 0 for any"
        )


def has_own_critic(config: Config) -> bool:
    """Whether the learner holds a second model, the critic with a trunk of its own."""
    return config.algorithm.advantage == "gae" and config.critic.trunk == "own"


def _length_problems(config: Config, model: ModelFiles, key: str) -> Iterator[str]:
    longest = config.model.max_length
    context = known_context(model.config)
    if context is not None and longest > context:
        yield (
            f"model.max_length={longest} is longer than the context of {key}={model.folder}, {context} tokens; "
            f"set model.max_length to {context} or less"
        )


def _head_problems(config: Config, model: ModelFiles, key: str) -> Iterator[str]:
    """Heads that ranks which share sequences cannot be dealt; where config.json does not say, the trainer looks."""
    ranks, heads = config.learner.sequence_parallel, heads_of(model.config)
    problem = heads_problem(*heads, ranks) if heads else None
    if problem:
        yield f"learner.sequence_parallel={ranks} with {key}={model.folder}: {problem}"


def _critic_problems(model: ModelFiles, critic: ModelFiles) -> Iterator[str]:
    own, needed = vocab_size(critic.config), vocab_size(model.config)
    if own < needed:
        yield (
            f"critic.path={critic.folder} knows {own} tokens and model.path={model.folder} {needed}: the critic reads "
            "what the policy writes; give a critic of the same vocabulary"
        )


def _key_file_problems(config: Config, role: str) -> Iterator[str]:
    names = KEY_PAIRS[role]
    if not on_loopback(config) and not value_of(config, names[0]):
        yield (
            f"transport.address={config.transport.address} is not loopback: a {role} needs CURVE keys; "
            f"set {names[0]} and {names[1]}"
        )
    for name in names:
        path = value_of(config, name)
        if path and not Path(path).is_file():
            yield f"{name}={path}: there is no such file on this host"


def _device_problems(config: Config, role: str) -> Iterator[str]:
    section = getattr(config, role)
    if problem := cpu_problem(section.cpus, f"{role}.cpus"):
        yield problem
    if section.device == "cuda" and not has_gpu():
        yield (
            f"{role}.device=cuda but there is no NVIDIA device that it could use: this host shows none, "
            f"CUDA_VISIBLE_DEVICES hides them, or torch is built for CPUs; set {role}.device=cpu or auto"
        )
    elif role == "generator" and is_on_gpu(section.device, gpu_here=has_gpu()):
        found, wanted = len(visible_gpus()), config.generator.tensor_parallel_size
        if found < wanted:
            yield (
                f"generator.tensor_parallel_size={wanted} needs as many GPUs, {found} are visible; lower it, or name "
                "more in CUDA_VISIBLE_DEVICES"
            )


def _ipc_problems(config: Config) -> Iterator[str]:
    host = config.weights.host
    if config.weights.backend == "ipc" and not _is_this_host(host):
        yield (
            f"weights.backend=ipc shares the learner's memory, but weights.host={host} is no address of this host; "
            "start all daemons on the learner's machine, or set weights.backend=gloo or nccl"
        )


def _is_this_host(host: str) -> bool:
    """Whether a socket can listen at `host` on this machine; port 0 stands for any free one."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def weight_backends(config: Config, *, gpu_here: bool) -> str:
    """`weights.backend` in words, with auto decided as far as devices tell; gpu_here decides what a device of auto is.

    The learner decides it for each generator, by the cards in use: `weights.plan.backends`.
    """
    if config.weights.backend != "auto":
        return config.weights.backend
    both_on_gpu = all(
        is_on_gpu(device, gpu_here=gpu_here) for device in (config.learner.device, config.generator.device)
    )
    return "nccl, or ipc on the learner's own GPU (auto)" if both_on_gpu else "gloo (auto)"


def is_on_gpu(device: str, *, gpu_here: bool) -> bool:
    """Whether the key `learner.device` or `generator.device` stands for a GPU on a host that has one or has none."""
    return device == "cuda" or (device == "auto" and gpu_here)
