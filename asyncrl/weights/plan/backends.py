"""How weights reach a generator: over which backend, by where it and the learner compute."""

from __future__ import annotations

from asyncrl.link.weight_records import Placement

ONE_CARD = "NCCL refuses two processes on one card"


class BackendRefused(Exception):
    """Weights cannot reach a generator as things are placed. The message says why, and what to change."""


def backend_for(wanted: str, learner: Placement, generator: Placement) -> str:
    """The backend for the channels of a generator; `wanted` is weights.backend.

    auto is ipc on the learner's own GPU, nccl between GPUs, and gloo where one of both computes on the CPU.

    Raises:
        BackendRefused: what is wanted cannot work between these two, or nothing can.
    """
    shared = shared_gpus(learner, generator)
    if wanted == "auto":
        if shared:
            wanted = "ipc"
        else:
            wanted = "nccl" if learner.gpus and generator.gpus else "gloo"
    if wanted == "nccl":
        _check_nccl(learner, generator, shared)
    elif wanted == "ipc":
        _check_ipc(learner, generator, shared)
    return wanted


def shared_gpus(one: Placement, other: Placement) -> list[str]:
    """UUIDs of the cards that both compute on."""
    return [gpu for gpu in one.gpus if gpu in other.gpus] if one.machine == other.machine else []


def fit_together(backend: str, one: Placement, other: Placement) -> bool:
    """Whether two generators can be members of one channel of this backend."""
    return backend != "nccl" or not shared_gpus(one, other)


def _check_nccl(learner: Placement, generator: Placement, shared: list[str]) -> None:
    for name, placement in (("learner", learner), ("generator", generator)):
        if not placement.gpus:
            raise BackendRefused(
                f"weights.backend=nccl moves weights between GPUs, but the {name} computes on the CPU; set "
                f"weights.backend=auto, or {name}.device=cuda"
            )
    if shared:
        raise BackendRefused(
            f"learner and generator both compute on GPU {shared[0]}, and {ONE_CARD}; give them different cards "
            "(CUDA_VISIBLE_DEVICES), or set weights.backend=auto or ipc"
        )


def _check_ipc(learner: Placement, generator: Placement, shared: list[str]) -> None:
    where = f"learner ({_words(learner)}) and generator ({_words(generator)})"
    if learner.machine != generator.machine:
        raise BackendRefused(f"weights.backend=ipc shares memory, but {where} run on two machines; use gloo or nccl")
    if set(generator.gpus) != set(learner.gpus) or len(learner.gpus) > 1:
        raise BackendRefused(
            f"{where} must compute on one and the same device to share memory"
            + (f", and {ONE_CARD}" if shared else "")
            + "; give them different cards (CUDA_VISIBLE_DEVICES), or weights.backend=gloo"
        )
    if learner.memory != generator.memory:
        raise BackendRefused(
            f"{where} can share no memory: run both as one user in one PID namespace (user@namespace is "
            f"{learner.memory} and {generator.memory})"
            + (f"; {ONE_CARD}, so give them different ones, or set weights.backend=gloo" if shared else "")
        )


def _words(placement: Placement) -> str:
    return f"GPU {', '.join(placement.gpus)}" if placement.gpus else "the CPU"
