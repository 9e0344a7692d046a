"""One rank of a world of gloo processes: runs cases and mutants, and on rank 0 writes how far they are from one rank.

python -m tests.trainer.ranks.world_program RESULTS STEPS SEQUENCE REPLICAS CASE... -- MUTANT...

SEQUENCE ranks share the tokens of each micro-batch; with more than one, cases and mutants are those that are for it.
There are REPLICAS copies of the model. A case or mutant may have other numbers than these: "grpo s1 x2" has one rank
for each micro-batch and two copies. Where there are several, more is asked of them: see `replica_checks`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from asyncrl.algorithms.reducer import OneRank
from asyncrl.errors import AsyncRLError
from asyncrl.report.rollouts.records import KeptRollout
from asyncrl.trainer import step as step_module
from asyncrl.trainer.agreement import check_agreement, check_start
from asyncrl.trainer.engines import fsdp as fsdp_module
from asyncrl.trainer.engines import sequence_parallel
from asyncrl.trainer.engines.fsdp import FSDPModule
from asyncrl.trainer.step import StepRunner
from asyncrl.trainer.world import RankPlace, World
from tests.trainer.ranks.cases import (
    CASES,
    CPU,
    LONG,
    MUTANTS,
    REPLICA_MUTANTS,
    SEQUENCE_MUTANTS,
    SHARED_SEQUENCES,
    VARIANTS,
    Case,
    groups_of,
    runner_of,
)
from tests.trainer.ranks.replica_checks import look_at_replicas

KEPT = 2  # rollouts, of batches of two and more


def main() -> None:
    results, steps, sequence, replicas, *names = sys.argv[1:]
    cases, mutants = names[: names.index("--")], names[names.index("--") + 1 :]
    worlds = Worlds(World.form(RankPlace.from_environment(), CPU, timeout_s=120.0), int(sequence), int(replicas))
    found: dict[str, Any] = {}
    for spec in cases:
        name, world = worlds.of(spec)
        found[spec] = compare(case_of(name, int(steps), world), world, int(steps) if name in LONG else 2)
    for spec in mutants:
        name, world = worlds.of(spec)
        case = CASES[(MUTANTS | SEQUENCE_MUTANTS | REPLICA_MUTANTS | VARIANTS)[name]]
        mend = spoil_models(name, world)
        runner = runner_of(case, world)
        undo = spoil(name, runner)
        found[spec] = compare(case, world, 2, runner)
        undo()
        mend()
    _, world = worlds.of("")
    found["canary"] = canary(world)
    found["differing"] = differing(world)
    if (copied := worlds.with_copies) is not None:
        found["replicas"] = look_at_replicas(copied, Path(results).parent)
    if world.rank == 0:
        Path(results).write_text(json.dumps(found))
    worlds.formed.close()


class Worlds:
    """The ranks that have met, divided in one way and in others."""

    def __init__(self, formed: World, sequence: int, replicas: int) -> None:
        self.formed = formed
        self._default = (sequence, replicas)
        self._known: dict[tuple[int, int], World] = {}

    def of(self, spec: str) -> tuple[str, World]:
        """The name in a case or mutant, and the world that it is for."""
        name, *numbers = spec.split(" ")
        sequence, replicas = (int(number[1:]) for number in numbers) if numbers else self._default
        if (sequence, replicas) not in self._known:
            world = World(self.formed._place, self.formed._store, self.formed._control)
            world.share_sequences(sequence)
            world.hold_replicas(replicas)
            world.hurry()
            self._known[sequence, replicas] = world
        return name, self._known[sequence, replicas]

    @property
    def with_copies(self) -> World | None:
        """The first with several copies of models."""
        return next((world for world in self._known.values() if world.num_replicas > 1), None)


def case_of(name: str, steps: int, world: World) -> Case:
    """The case, with rows for the ranks of all copies; in a long run with few passes in each step."""
    case = (CASES | SHARED_SEQUENCES)[name]
    case = replace(case, groups=case.groups * world.num_replicas)
    return case if steps < 20 else replace(case, settings=case.settings | {"learner.micro_batch_tokens": 150})


def compare(case: Case, world: World, steps: int, runner: StepRunner | None = None) -> dict[str, Any]:
    """Largest difference of each figure, and of the gradient in the last step, relative to that of one rank."""
    runner = runner or runner_of(case, world)
    alone = runner_of(case) if world.rank == 0 else None
    worst: dict[str, float] = {}
    dummies = 0
    for number in range(steps):
        is_last = number == steps - 1
        gradients = recorded(runner, world) if is_last else {}
        if world.rank != 0:
            runner.follow()
            continue
        assert alone is not None
        expected_gradients = recorded(alone, None) if is_last else {}
        groups = groups_of(case, number)
        ours, theirs = runner.step(groups, keep=KEPT), alone.step(groups, keep=KEPT)
        figures, expected = ours.metrics, theirs.metrics
        worst["rollouts kept"] = max(worst.get("rollouts kept", 0.0), kept_difference(ours.kept, theirs.kept))
        dummies += int(-figures["micro_batches"] % world.num_shares)
        worst |= dict.fromkeys(figures.keys() ^ expected.keys(), 1e9)  # there in one of them only
        for name, value in expected.items():
            off = abs(figures.get(name, 1e9) - value) / max(1e-3, abs(value))
            worst[name] = max(worst.get(name, 0.0), off if off == off else 1e9)
        for name, gradient in expected_gradients.items():
            off = float((gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
            worst[f"gradient of {name}"] = off
    return {"worst": worst, "dummies": dummies}


def kept_difference(ours: list[KeptRollout], theirs: list[KeptRollout]) -> float:
    """The largest difference of what is said of the tokens that are kept, relative to the largest there is."""
    worst = 0.0 if len(ours) == len(theirs) == KEPT else 1e9
    for one, other in zip(ours, theirs, strict=False):
        for name in ("old_logprobs", "current_logprobs", "token_advantages"):
            mine, expected = getattr(one, name), getattr(other, name)
            if mine is None or expected is None:
                worst = max(worst, 0.0 if mine is expected else 1e9)
                continue
            off = float(abs(mine - expected).max() / max(1.0, abs(expected).max()))
            worst = max(worst, off if off == off else 1e9)
    return worst


def recorded(runner: StepRunner, world: World | None) -> dict[str, torch.Tensor]:
    """The whole gradients, by name, of the last update that is made from now on; filled when it is made."""
    gradients: dict[str, torch.Tensor] = {}
    for number, engine in enumerate(runner.engines.all):
        make_update = engine.update

        def update(engine=engine, number=number, make_update=make_update):
            for part in engine._pending:
                for name, parameter in part._named.items():
                    gradient = parameter.grad
                    whole = gradient if world is None else gradient.full_tensor()
                    gradients[f"{number}.{name}"] = whole.clone()
            make_update()

        engine.update = update
    return gradients


def spoil(mutant: str, runner: StepRunner):
    """Breaks one thing of this rank; returns how to mend what outlives the runner."""
    preparation, world = runner.preparation, runner.world
    match mutant:
        case "mean_of_ranks":
            for module in runner.engines.actor.root.modules():
                if isinstance(module, FSDPModule):
                    module.set_gradient_divide_factor(float(world.size))
        case "dummies_that_count":
            honest = step_module._without_weight
            step_module._without_weight = lambda outputs, sums: (
                0.1 * (outputs.values if outputs.logprobs is None else outputs.logprobs).sum(),
                sums,
            )
            return lambda: setattr(step_module, "_without_weight", honest)
        case "whitening_per_rank" | "moments_per_rank" | "kl_per_rank":
            preparation._ranks = OneRank()
        case "replicas_by_themselves":
            pass  # see spoil_models
        case "summed_each_pass" | "summed_each_pass_offloaded":  # this must be right
            for engine in runner.engines.all:
                engine.sums_each_pass = True
        case _:
            return spoil_sequences(mutant, runner)
    return lambda: None


def spoil_models(mutant: str, world: World):
    """Breaks how models are sharded from now on; returns how to mend that."""
    if mutant != "replicas_by_themselves":
        return lambda: None
    honest = fsdp_module.mesh_of
    fsdp_module.mesh_of = lambda world, device: DeviceMesh.from_group(world.replica_group, device.type)
    return lambda: setattr(fsdp_module, "mesh_of", honest)


def spoil_sequences(mutant: str, runner: StepRunner):
    """As `spoil`, of ranks that share sequences."""
    world = runner.world
    match mutant:
        case "inputs_of_another_slice":
            return changed_slice(lambda whole, own: replace(own, input_ids=whole.input_ids.roll(1)[own.layout.own]))
        case "positions_of_another_slice":
            first = lambda own: replace(own.layout, own=slice(0, own.num_inputs))  # noqa: E731
            return changed_slice(lambda whole, own: replace(own, layout=first(own)))
        case "sums_counted_by_each":
            for engine in runner.engines.all:
                engine._over_ranks = lambda sums: fsdp_module.sums_of_ranks(sums, world)
        case "kl_counted_by_each":
            runner.preparation._ranks = world
        case "gradients_counted_by_each":
            honest = sequence_parallel._Whole.backward

            def summed(ctx, grad):
                own, *others = honest(ctx, grad)
                return world.sequence_ranks * own, *others

            sequence_parallel._Whole.backward = staticmethod(summed)
            return lambda: setattr(sequence_parallel._Whole, "backward", staticmethod(honest))
        case _:
            raise AssertionError(mutant)
    return lambda: None


def changed_slice(change):
    """Has ranks compute another slice of rows than theirs; returns how to mend that."""
    honest = fsdp_module.OwnSlice

    class Changed(honest):
        def __init__(self, whole, group):
            super().__init__(whole, group)
            self.rows = change(whole, self.rows)

    fsdp_module.OwnSlice = Changed
    return lambda: setattr(fsdp_module, "OwnSlice", honest)


def canary(world: World) -> dict[str, Any]:
    """What all ranks say of the canary, against one process with the same weights."""
    case = Case(dtype=torch.float32)
    engine = runner_of(case, world).engines.actor
    sequences = engine.sample_sequences(4, 8, seed=1)
    scores = engine.score(sequences)
    one = runner_of(case).engines.actor
    off = max(float(abs(a - b).max()) for a, b in zip(scores, one.score(sequences), strict=True))
    mean = sum(float(row.sum()) for row in scores) / sum(len(row) for row in scores)
    return {"off": off, "mean": mean, "shapes": [len(row) for row in scores], "dtype": str(scores[0].dtype)}


def differing(world: World) -> list[str]:
    """What is said of a rank that differs: in nothing, in its state, in its configuration."""
    torch.manual_seed(0)  # rank 0 has drawn more numbers than the others by now
    runner = runner_of(Case(), world)
    said = [refusal(check_agreement, world, runner), refusal(check_start, world, runner.config)]
    if world.rank == world.size - 1:
        runner.kl_coef += 1e-12
        runner.config.learner.lr *= 2
    return [*said, refusal(check_agreement, world, runner), refusal(check_start, world, runner.config)]


def refusal(check, *arguments) -> str:
    try:
        check(*arguments)
    except AsyncRLError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
