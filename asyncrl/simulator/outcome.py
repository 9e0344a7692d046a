"""What a simulated run came to, in the figures that a real run reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP_SHARE = 0.1  # of the steps at the start, in which nothing is in flight yet: left out of the figures


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One optimizer step, on the groups with these ordinals (if kept). `at` is its end; in ages tokens weigh alike."""

    at: float
    tokens: int
    age_sum: int
    age_max: int
    oldest_age_max: int
    step_s: float
    waited_s: float
    ordinals: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SimulatedOutcome:
    """Rates and ages over the steps after the first tenth.

    age_shares       share of trained tokens of each age, from 0 on
    generator_idle_share  of the time of all generators that were there, without any sequence
    wasted_share     completion tokens that were sampled and not trained on / sampled ones, over the whole run
    wall_s           time to the last step, from the first lease on
    step_s_mean      of one optimizer step, slowed down by shared cores where there are such
    generated_per_busy_s  completion tokens of a generator per second in which it has a sequence, over the whole run,
                     those of evaluations included
    """

    steps: int
    wall_s: float
    steps_per_s: float
    tokens_per_s: float
    age_mean: float
    age_max: int
    age_shares: tuple[float, ...]
    learner_idle_share: float
    generator_idle_share: float
    wasted_share: float
    step_s_mean: float
    generated_per_busy_s: float


def outcome(
    steps: list[SimulatedStep],
    tokens_by_age: dict[int, int],
    *,
    busy_s: float,
    generators: int,
    generated_tokens: int,
    evaluated_tokens: int = 0,
) -> SimulatedOutcome:
    """Sums up. tokens_by_age is over the steps that count; busy_s over all generators and the whole run.

    generated_tokens are all that were sampled, evaluated_tokens those of them that answered evaluations.
    """
    assert steps, "a run has a step"
    first = warm_up_steps(len(steps))
    begin = steps[first - 1].at if first else 0.0
    counted = steps[first:]
    wall_s = steps[-1].at
    seconds = max(wall_s - begin, math.ulp(1.0))
    tokens = sum(step.tokens for step in counted)
    trained = sum(step.tokens for step in steps)
    aged = sum(tokens_by_age.values())
    return SimulatedOutcome(
        steps=len(steps),
        wall_s=wall_s,
        steps_per_s=len(counted) / seconds,
        tokens_per_s=tokens / seconds,
        age_mean=sum(step.age_sum for step in counted) / max(1, tokens),
        age_max=max(step.age_max for step in counted),
        age_shares=tuple(tokens_by_age.get(age, 0) / max(1, aged) for age in range(max(tokens_by_age, default=0) + 1)),
        learner_idle_share=sum(step.waited_s for step in counted) / seconds,
        generator_idle_share=max(0.0, 1 - busy_s / (generators * max(wall_s, math.ulp(1.0)))),
        wasted_share=max(0.0, 1 - trained / max(1, generated_tokens - evaluated_tokens)),
        step_s_mean=sum(step.step_s for step in counted) / len(counted),
        generated_per_busy_s=generated_tokens / max(busy_s, math.ulp(1.0)),
    )


def warm_up_steps(steps: int) -> int:
    """Steps at the start that do not count."""
    return min(int(WARM_UP_SHARE * steps), steps - 1)
