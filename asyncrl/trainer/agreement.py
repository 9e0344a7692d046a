"""What all ranks must have alike, compared now and then: a rank that differs is named where it begins to.

What every rank keeps for itself can differ: the version, coefficients, random state, buffers of the model, and at the
start the configuration and the libraries. A slice of weights and optimizer state is in one place, and cannot; where
there are replicas, it is in each of them, and must be the same to the bit.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import asyncrl
from asyncrl.config import Config
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.trainer.replicas import differing_slice
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import World

CHECK_EVERY = 10  # steps
SAMPLE_BYTES = 2**16


def check_start(world: World, config: Config) -> None:
    """Raises ConfigError unless all ranks have what decides the steps alike: keys and versions of libraries."""
    # Of these each host has its own.
    learner = replace(config.learner, cpus=[], threads=1, device="", http="")
    sections = {
        "learner": asdict(learner),
        "algorithm": asdict(config.algorithm),
        "critic": asdict(replace(config.critic, path="")),
        "update": asdict(config.update),
        "sampling": asdict(config.sampling),
        "model": asdict(replace(config.model, path="")),
        "run.seed": config.run.seed,
        "weights.canary_sequences": config.weights.canary_sequences,
    }
    own = {f"the section {name} of the configuration": _digest(repr(value)) for name, value in sections.items()}
    own["the model's files"] = _digest_of_model(Path(config.model.path))
    own |= {"the version of torch": _digest(torch.__version__), "that of asyncrl": _digest(asyncrl.__version__)}
    if problem := world.first_difference(own, _rank_0):
        raise ConfigError(f"{problem}; start all ranks with one configuration and one installation")


def check_agreement(world: World, runner: StepRunner) -> None:
    """Raises AsyncRLError when a rank's state is not that of rank 0, or a slice not that of the first replica.

    All ranks call it after the same step.
    """
    problem = world.first_difference(shared_state(runner), _rank_0)
    problem = problem or differing_slice(world, sliced_state(runner))
    if problem:
        raise AsyncRLError(
            f"{problem}, after the step to version {runner.version}: they would train different policies"
        )


def shared_state(runner: StepRunner) -> dict[str, int]:
    """What the next step depends on and every rank has for itself, as one number each, by what it is."""
    state = runner.state()
    numbers = {
        "the version": state.version,
        "kl_coef": _bits(state.kl_coef),
        "the random state of the CPU": _digest(state.cpu_rng.numpy().tobytes()),
    }
    for name, part in (("policy", state.engines.policy), ("critic", state.engines.critic)):
        if part is None:
            continue
        whole = {key: value for key, value in part.weights.items() if not isinstance(value, DTensor)}
        numbers |= {f"{key} of the {name}": _digest(value.cpu().numpy().tobytes()) for key, value in whole.items()}
        steps = sum(float(moments["step"]) for moments in part.optimizer.values() if "step" in moments)
        numbers[f"the count of updates of the {name}"] = int(steps)
    return numbers


def sliced_state(runner: StepRunner) -> dict[str, Tensor]:
    """The slices that this rank holds of all that training changes, by what they are."""
    engines = runner.state().engines
    slices: dict[str, Tensor] = {}
    for name, part in (("policy", engines.policy), ("critic", engines.critic)):
        if part is not None:
            slices |= {f"{key} of the {name}": tensor for key, tensor in part.weights.items()}
            moments = ((key, which, value) for key, of in part.optimizer.items() for which, value in of.items())
            slices |= {f"{which} of {key} of the {name}": value for key, which, value in moments}
    return {name: tensor for name, tensor in slices.items() if isinstance(tensor, DTensor)}


def _rank_0(rank: int) -> int:
    return 0


def _digest_of_model(folder: Path) -> int:
    """Of names, sizes and ends of the weights' files: enough to tell one training run's from another's."""
    seen = []
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(SAMPLE_BYTES)
            opened.seek(max(0, size - SAMPLE_BYTES))
            seen.append((file.name, size, _digest(first), _digest(opened.read())))
    return _digest(repr(seen))


def _digest(content: str | bytes) -> int:
    return zlib.crc32(content.encode() if isinstance(content, str) else content)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)
