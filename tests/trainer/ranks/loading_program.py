"""One rank of a world of gloo processes that loads models slice by slice, and whole for comparison.

python -m tests.trainer.ranks.loading_program FOLDER bits CASE...    whether both are the same, to the bit;
                                                 for the first case, whether rows are packed when ranks do not agree
python -m tests.trainer.ranks.loading_program FOLDER peak WAY...     memory that loading takes; WAY is slices or whole

What each rank saw goes to FOLDER/seen.RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.config import Config
from asyncrl.trainer.critic import load_critic
from asyncrl.trainer.engines.base import Engines
from asyncrl.trainer.engines.fsdp import fsdp_engines_for, load_fsdp_engines
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.engines.policy import Policy, load_policy
from asyncrl.trainer.engines.trunk import is_packed
from asyncrl.trainer.world import RankPlace, World
from benchmarks.speed.memory_forecast import resident
from tests.trainer.ranks.loading_cases import CASES, CPU, config_of, tensors_of


def main() -> None:
    folder, what, *names = sys.argv[1:]
    torch.set_num_threads(1)
    world = World.form(RankPlace.from_environment(), CPU, timeout_s=120.0)
    measure: Any = differences if what == "bits" else peak
    seen = {name: measure(name, Path(folder), world) for name in names}
    if what == "bits":
        seen["packed"] = [packs_rows(names[0], Path(folder), world, spoiled) for spoiled in (False, True)]
    (Path(folder) / f"seen.{world.rank}.json").write_text(json.dumps(seen))
    world.close()


def loaded_whole(config: Config, world: World) -> Engines:
    """As every rank loads a model whose files cannot be read slice by slice."""
    policy = load_policy(config.model, CPU, update=config.update, seed=config.run.seed)
    return fsdp_engines_for(policy, config, CPU, world, critic=load_critic(config, policy))


def differences(name: str, folder: Path, world: World) -> list[str]:
    """What is not the same in this rank's slices."""
    config = config_of(name, folder / name)
    engines, expected = load_fsdp_engines(config, CPU, world), loaded_whole(config, world)
    found = [] if (engines.actor.policy.weights is None) == CASES[name].is_whole else ["the way it is loaded"]
    mine, theirs = tensors_of(engines), tensors_of(expected)
    found += sorted(mine.keys() ^ theirs.keys())
    for key in mine.keys() & theirs.keys():
        if mine[key].dtype != theirs[key].dtype or not torch.equal(local(mine[key]), local(theirs[key])):
            found.append(key)
    if engines.actor.identity() != expected.actor.identity():
        found.append("identity")
    if engines.actor.tensors().patch != expected.actor.tensors().patch:
        found.append("patch")
    sequences = engines.actor.sample_sequences(4, 8, seed=1)
    if not all(map(_same, engines.actor.score(sequences), expected.actor.score(sequences))):
        found.append("scores")
    return found


def packs_rows(name: str, folder: Path, world: World, spoiled: bool) -> bool:
    """Whether this rank packs rows. spoiled: the last rank has found that it computes packed ones wrongly."""
    check = Policy.check

    def spoiling_check(policy: Policy) -> None:
        check(policy)
        if spoiled and world.rank == world.size - 1:
            policy.model.set_attn_implementation("sdpa")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "check", spoiling_check)
        return is_packed(load_fsdp_engines(config_of(name, folder / name), CPU, world).actor.policy.model)


def peak(way: str, folder: Path, world: World) -> int:
    """Bytes by which the largest resident size grew until a model was there, before the first pass over shards.

    A small model first: what is imported for it is no model's.
    """
    load = {"slices": load_fsdp_engines, "whole": lambda config, _, world: loaded_whole(config, world)}[way]
    peaks: list[int] = []
    check = Policy.check

    def noting_check(policy: Policy) -> None:
        if policy.weights is not None:
            peaks.append(resident("VmHWM"))
        check(policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "check", noting_check)
        for name in ("small", "large"):
            config = config_of("tied", folder / name)
            config.algorithm.kl_coef = 0.0
            before = resident("VmRSS")
            engines = load(config, CPU, world)
            assert (engines.actor.policy.weights is None) == (way == "whole")
    return (peaks[-1] if way == "slices" else resident("VmHWM")) - before


def _same(one: Any, other: Any) -> bool:
    return bool((one == other).all())


if __name__ == "__main__":
    main()
