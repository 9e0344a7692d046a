"""What a simulated run is told: the sizes of the run, and how long each piece of work takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncrl.errors import ConfigError
from asyncrl.simulator.times import Constant, Distribution


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a run that its configuration sets.

    max_sequences is of one generator. cell_size is how many generators share a weight channel.
    eval_every and checkpoint_every are in steps, 0 for none; an evaluation asks for eval_samples completions of each
    of eval_prompts prompts.
    """

    generators: int
    max_sequences: int
    group_size: int
    groups_per_step: int
    max_age: int
    steps: int
    cell_size: int = 8
    eval_every: int = 0
    eval_prompts: int = 0
    eval_samples: int = 1
    checkpoint_every: int = 0

    def check(self) -> None:
        """Raises ConfigError for sizes that no run can have."""
        for name in ("generators", "max_sequences", "group_size", "groups_per_step", "steps", "cell_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a run has 1 at least")
        if self.max_age < 0:
            raise ConfigError(f"max_age={self.max_age}: 0 is the least, for synchronous training")
        for name in ("eval_every", "eval_prompts", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: 0 is the least, for none")


@dataclass(frozen=True, slots=True)
class Service:
    """How long the pieces of work take, in seconds, on cores that they have for themselves.

    completion_tokens  length of one completion
    decode_s           one decode step of an engine with nothing in it but itself: the part that does not grow
    decode_sequence_s  what each running sequence adds to a decode step
    new_sequence_s     what the prompt of a sequence adds to its first decode step
    reward_s           from the last token of a group to its result at the learner
    step_s             one optimizer step: the part that does not depend on its tokens
    step_token_s       what each completion token of the batch adds to a step
    snapshot_s         for which training stands still when a version goes out
    stage_s            from a snapshot to the moment when a generator could swap it in
    pause_s            a swap, during which a generator samples nothing
    commit_s           from the swap to the proof that the learner grants leases by
    grant_s            from the moment a generator has room to the lease at its engine
    checkpoint_s       for which training stands still when a checkpoint begins
    checkpoint_write_s for which it is written beside training; no other begins meanwhile
    """

    completion_tokens: Distribution
    decode_s: float
    decode_sequence_s: float
    step_s: Distribution
    step_token_s: float = 0.0
    new_sequence_s: float = 0.0
    reward_s: Distribution = field(default_factory=lambda: Constant(0.0))
    snapshot_s: Distribution = field(default_factory=lambda: Constant(0.0))
    stage_s: Distribution = field(default_factory=lambda: Constant(0.0))
    pause_s: Distribution = field(default_factory=lambda: Constant(0.0))
    commit_s: Distribution = field(default_factory=lambda: Constant(0.0))
    grant_s: float = 0.0
    checkpoint_s: Distribution = field(default_factory=lambda: Constant(0.0))
    checkpoint_write_s: Distribution = field(default_factory=lambda: Constant(0.0))


@dataclass(frozen=True, slots=True)
class SharedCores:
    """Cores that learner and generators share, with the threads that each computes in while it works.

    While more threads are at work than there are cores, all of them go slower alike.
    """

    cores: int
    learner_threads: int
    generator_threads: int

    def pace(self, *, learner_works: bool, generators_working: int, writers: int = 0) -> float:
        """The speed of each, 1 where all at work have cores for themselves. writers: threads that write checkpoints."""
        threads = self.learner_threads * learner_works + self.generator_threads * generators_working + writers
        return min(1.0, self.cores / threads) if threads else 1.0
