"""What an optimizer step is made of, so that another batch or another micro-batch can be thought over.

    step = passes x pass_s + inputs x input_s + rest_s

A trainer tells the sums that a line through its passes is found by (`extra` of a step's metrics, `PASS_SUMS`). Passes
that are all of one size tell no line; then all of a pass may be there with no input, or nothing of it (`settled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from asyncrl.config import Config

PASS_SUMS = ("passes", "pass_inputs", "pass_inputs_squared", "pass_s", "pass_inputs_s")
ENOUGH_SPREAD = 0.1  # of the inputs of passes, deviation / mean: below it a line is anybody's
REST_OF_TOKENS = 0.5  # of what a step does beside its passes: the part that grows with its tokens


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The mean step of a run. input_s is None where the run does not tell it from pass_s."""

    passes: float
    inputs: float
    pass_s: float
    input_s: float | None
    rest_s: float
    micro_batch_tokens: int
    updates: int

    def settled(self, share: float) -> StepCosts:
        """Where the line is not known: so much of a pass is there without inputs, the rest grows with them."""
        if self.input_s is not None or not self.inputs:
            return self
        whole = self.passes * self.pass_s
        return replace(self, pass_s=share * self.pass_s, input_s=(1 - share) * whole / self.inputs)

    def seconds(self, *, inputs: float, micro_batch_tokens: int, updates: int) -> float:
        """A step over so many inputs (all epochs together) in so many updates."""
        passes = self.passes * _passes(inputs, micro_batch_tokens, updates)
        passes /= _passes(self.inputs, self.micro_batch_tokens, self.updates)
        growth = inputs / self.inputs if self.inputs else 1.0
        rest_s = self.rest_s * (1 - REST_OF_TOKENS + REST_OF_TOKENS * growth)
        return passes * self.pass_s + inputs * (self.input_s or 0.0) + rest_s


def step_costs(steps: Sequence[Mapping[str, Any]], config: Config) -> StepCosts | None:
    """From lines of steps of metrics.jsonl; None where they do not tell their passes."""
    told = [step for step in steps if step.get("step_s") and all(name in step.get("extra", {}) for name in PASS_SUMS)]
    sums = {name: sum(float(step["extra"][name]) for step in told) for name in PASS_SUMS}
    passes, inputs = sums["passes"], sums["pass_inputs"]
    seconds = sums["pass_s"]
    if not passes or not inputs:
        return None
    count = len(told)
    mean_inputs = inputs / passes
    variance = max(0.0, sums["pass_inputs_squared"] / passes - mean_inputs**2)
    costs = StepCosts(
        passes=passes / count,
        inputs=inputs / count,
        pass_s=seconds / passes,
        input_s=None,
        rest_s=max(0.0, fmean(float(step["step_s"]) for step in told) - seconds / count),
        micro_batch_tokens=config.learner.micro_batch_tokens,
        updates=_updates(config),
    )
    if variance**0.5 < ENOUGH_SPREAD * mean_inputs:
        return costs
    slope = (sums["pass_inputs_s"] / passes - mean_inputs * seconds / passes) / variance
    slope = min(max(0.0, slope), seconds / inputs)  # neither part takes less than nothing
    return replace(costs, pass_s=max(0.0, (seconds - slope * inputs) / passes), input_s=slope)


def step_growth(costs: StepCosts | None, before: Config, after: Config) -> float:
    """How much longer a step takes under `after`, of a run that was made under `before`.

    It has the tokens of another batch, other passes and updates. Where nobody told the passes, it grows with tokens.
    """
    growth = _rollouts(after) / _rollouts(before)
    if costs is None:
        return growth
    learner = after.learner
    then = costs.seconds(
        inputs=growth * costs.inputs, micro_batch_tokens=learner.micro_batch_tokens, updates=_updates(after)
    )
    now = costs.seconds(inputs=costs.inputs, micro_batch_tokens=costs.micro_batch_tokens, updates=costs.updates)
    return then / now


def _rollouts(config: Config) -> int:
    """That a step makes passes over, each epoch counted."""
    return config.learner.groups_per_step * config.sampling.group_size * config.learner.epochs


def _updates(config: Config) -> int:
    return config.learner.epochs * config.learner.mini_batches


def _passes(inputs: float, micro_batch_tokens: int, updates: int) -> float:
    """Passes that `inputs` in `updates` parts make: the last of each is filled by half in the mean."""
    each = inputs / updates / micro_batch_tokens
    return updates * max(1.0, each + 0.5 if each > 1 else 1.0)
