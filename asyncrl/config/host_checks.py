"""What of a configuration depends on the machine that a daemon starts on: files, CPUs, devices, the model."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from asyncrl.config import Config
from asyncrl.config.checks import KEY_PAIRS, on_loopback, raise_all
from asyncrl.config.keys import value_of
from asyncrl.host.model_folder import ModelFiles, find_model


def check_host(config: Config, role: str) -> ModelFiles:
    """Checks what depends on the machine that `role` ("learner" or "generator") starts on; returns the model.

    Raises ConfigError for missing key files, CPUs and GPUs and for a weights.host that cannot share memory, ModelError
    for a missing or incomplete model.
    """
    raise_all([*_key_file_problems(config, role), *_device_problems(config, role), *_ipc_problems(config)])
    return find_model(config.model.path)


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
    usable = os.sched_getaffinity(0)
    if not set(section.cpus) <= usable:
        yield (
            f"{role}.cpus={section.cpus}: this process may use only CPUs {sorted(usable)}; "
            f"set {role}.cpus to some of them"
        )
    if section.device == "cuda" and not has_gpu():
        yield f"{role}.device=cuda but this host shows no NVIDIA device; set {role}.device=cpu or auto"


def _ipc_problems(config: Config) -> Iterator[str]:
    host = config.weights.host
    if config.weights.backend == "ipc" and not _is_this_host(host):
        yield (
            f"weights.backend=ipc shares the learner's memory, but weights.host={host} is no address of this host; "
            "start all daemons on the learner's machine, or set weights.backend=gloo or nccl"
        )


def _is_this_host(host: str) -> bool:
    """Whether `host` can be listened at here; port 0 takes any that is free."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def weight_backend(config: Config, *, gpu_here: bool) -> str:
    """`weights.backend`, with auto decided: nccl where learner and generators have GPUs, else gloo.

    Args:
        gpu_here: what a device of auto stands for.
    """
    if config.weights.backend != "auto":
        return config.weights.backend
    on_gpu = [
        device == "cuda" or (device == "auto" and gpu_here)
        for device in (config.learner.device, config.generator.device)
    ]
    return "nccl" if all(on_gpu) else "gloo"


def has_gpu() -> bool:
    """Whether the host shows an NVIDIA device, asked of the file system: torch takes seconds to import."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
