"""What one run of the simulation is: its size, its weather, and which faults come how often; drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config import Config
from tests.simulation.engine import EngineFaults
from tests.simulation.network import MAX_FRAME_BYTES, Weather

FAULT_KINDS = (
    "desk",
    "power",
    "desk, then power",
    "trainer",
    "generator",
    "leave",
    "replace",
    "partition",
    "stall",
    "disk",
    "forge",
)
SEGMENT_BYTES = (1500, 4000, 1 << 20)  # of the journal's segments: some have a handful of records, some all


@dataclass(slots=True)
class Plan:
    """What happens in one run; drawn from its seed."""

    seed: int
    steps: int
    groups_per_step: int
    max_age: int
    num_generators: int
    keep: int
    checkpoint_every: int
    segment_bytes: int
    dynamic_sampling: bool
    num_evals: int
    weather: Weather
    engine: EngineFaults
    kinds: dict[str, float]  # fault -> weight
    faults_for_s: float
    pause_s: float  # mean between two faults
    step_s: float = 0.8  # longest step of the trainer
    sick: bool = False  # one generator's rewards fail until the faults end, those of the others never

    @classmethod
    def of(cls, seed: int) -> Plan:
        chance = random.Random(f"plan {seed}")
        wild = chance.random() < 0.5
        weather = Weather(
            loss=chance.choice((0.0, 0.02, 0.1)),
            repeat=chance.choice((0.0, 0.05, 0.2)) if wild else 0.0,
            reorder=wild,
            delay_s=chance.choice((0.001, 0.02, 0.1)),
            spike=chance.choice((0.0, 0.02)),
        )
        engine = EngineFaults(
            stage_error=chance.choice((0.0, 0.1)),
            flip_bit=chance.choice((0.0, 0.0, 0.15)),
            stale_swap=chance.choice((0.0, 0.0, 0.15)),
            swap_error=chance.choice((0.0, 0.05)),
            swap_hang=chance.choice((0.0, 0.0, 0.03)),
            generate_error=chance.choice((0.0, 0.01)),
            reward_error=chance.choice((0.0, 0.03)),
        )
        kinds = {name: chance.choice((0.0, 1.0, 2.0)) for name in FAULT_KINDS}
        if not any(kinds.values()):
            kinds["desk"] = 1.0
        return cls(
            seed=seed,
            steps=chance.randint(4, 8),
            groups_per_step=chance.randint(1, 3),
            max_age=chance.randint(0, 2),
            num_generators=chance.randint(1, 3),
            keep=chance.randint(1, 2),
            checkpoint_every=chance.randint(1, 3),
            segment_bytes=chance.choice(SEGMENT_BYTES),
            dynamic_sampling=chance.random() < 0.4,
            num_evals=chance.choice((0, 2)),
            weather=weather,
            engine=engine,
            kinds=kinds,
            faults_for_s=60.0,
            pause_s=chance.choice((0.5, 2.0, 5.0)),
            step_s=chance.choice((0.1, 0.8, 4.0)),
            sick=chance.random() < 0.25,
        )


def make_config(plan: Plan, folder: Path) -> Config:
    config = Config()
    config.run.dir, config.run.steps, config.run.name = str(folder / "run"), plan.steps, "sim"
    config.model.path, config.task.path = str(folder / "model"), "tests.simulation.task:Task"
    config.learner.groups_per_step = plan.groups_per_step
    config.learner.max_trainer_restarts = 10_000
    config.sampling.group_size, config.sampling.max_new_tokens = 2, 4
    config.staleness.max_age = plan.max_age
    config.algorithm.dynamic_sampling = plan.dynamic_sampling
    config.generator.lease_timeout_s, config.generator.max_sequences = 20.0, 4
    config.generator.outbox_bytes = 4000
    config.transport.max_frame_bytes = MAX_FRAME_BYTES
    config.transport.credit_bytes = 4096
    config.weights.timeout_s, config.weights.cell_size = 3.0, 2
    config.checkpoint.every, config.checkpoint.keep = plan.checkpoint_every, plan.keep
    config.eval.prompts, config.eval.every = plan.num_evals, 3
    return config
