"""Alarms on what a run learns from: RULES is the table of thresholds, each with the reason for it. Pure, no torch.

An alarm goes on after a few steps in a row beyond its limit, and off after as many steps on the healthy side of
another limit: one bad batch says nothing, and a figure that hovers does not flood the log. A figure that was not
measured, or is NaN, changes nothing. Alarms only speak; training goes on.

ratio_max is left out of the table on purpose: it is one token of many thousands, and where it matters ess_share falls.
A task that is solved looks like a policy that collapsed, in entropy and in rewards that are all equal: either way no
more is learned, and the warning says that it may be the one or the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from asyncrl.metrics.types import StepMetrics, youngest_age


@dataclass(frozen=True, slots=True)
class AlarmRule:
    """When one alarm goes on and off. Its name is that of the figure of StepMetrics that it watches.

    limit, clears_at     in the unit of the figure, or, with of_canary_tolerance, in shares of weights.canary_tolerance
    steps                how many in a row it takes to go on, and to go off
    why                  the reason for the limit, for the reader of the table
    cause, remedy        the end of the warning; with an empty cause the warning works out whether the policy or the
                         engine moved, and what helps against that
    """

    figure: str
    side: Literal["below", "above"]
    limit: float
    clears_at: float
    steps: int
    why: str
    remedy: str
    cause: str = ""
    of_canary_tolerance: bool = False

    @property
    def advice(self) -> str:
        """Cause and remedy, as far as they are known without a step."""
        return f"{self.cause}; {self.remedy}" if self.cause else self.remedy

    def is_bad(self, value: float) -> bool:
        """Whether `value` is beyond the limit."""
        return value < self.limit if self.side == "below" else value > self.limit

    def is_good(self, value: float) -> bool:
        """Whether `value` is far enough on the healthy side to clear the alarm."""
        return value >= self.clears_at if self.side == "below" else value <= self.clears_at

    def in_nats(self, canary_tolerance: float) -> AlarmRule:
        """The rule with limits in nats, where they are given as shares of canary_tolerance (nats)."""
        if not self.of_canary_tolerance:
            return self
        limit, clears_at = self.limit * canary_tolerance, self.clears_at * canary_tolerance
        return replace(self, limit=limit, clears_at=clears_at, of_canary_tolerance=False)


RULES = (
    AlarmRule(
        "ess_share",
        "below",
        limit=0.3,
        clears_at=0.4,
        steps=3,
        why="Below about 0.3 a few tokens carry the gradient; VCPO and PipelineRL found that this precedes collapse.",
        remedy="algorithm.masks=[second_moment] leaves out the tokens that moved most",
    ),
    AlarmRule(
        "kl_behaviour",
        "above",
        limit=0.1,
        clears_at=0.05,
        steps=3,
        why="M2PO bounds the second moment of log-ratios by 0.04, which is a KL of 0.02; this is five times as much.",
        remedy="algorithm.name=decoupled bears more of it",
    ),
    AlarmRule(
        "clip_fraction",
        "above",
        limit=0.3,
        clears_at=0.2,
        steps=3,
        why="Asynchronous GSPO runs with a clip that was too narrow showed 0.35 to 0.44, synchronous ones about 0 "
        "(verl issue 7356).",
        remedy="algorithm.clip_low and clip_high may be too narrow for this loss, or set algorithm.proximal=recomputed",
    ),
    AlarmRule(
        "masked_share",
        "above",
        limit=0.2,
        clears_at=0.1,
        steps=3,
        why="Masks are for outliers (M2PO left out 0.06 % of tokens); a fifth of all tokens is work thrown away, and "
        "the rest is no fair sample.",
        remedy="algorithm.mask_low, mask_high, second_moment or opsm_delta may be too strict",
    ),
    AlarmRule(
        "gap_engine",
        "above",
        limit=0.25,
        clears_at=0.15,
        steps=3,
        why="Among some hundred tokens the largest difference is three to four times their mean, so from a quarter of "
        "the tolerance on the next syncs will be refused.",
        cause="generator and learner compute differently with equal weights",
        remedy="compare their versions, dtype and devices; model.dtype=float32 narrows it, weights.canary_tolerance "
        "only hides it",
        of_canary_tolerance=True,
    ),
    AlarmRule(
        "lost_share",
        "above",
        limit=0.1,
        clears_at=0.05,
        steps=5,
        why="Rollouts are not lost by chance: long completions go first, and training sees the rest. The learner ends "
        "the run at the same share of given-up prompts.",
        cause="rollouts failed or were over age",
        remedy="raise generator.lease_timeout_s or reward_timeout_s, or lower sampling.max_new_tokens; for dropped "
        "ones raise staleness.max_age",
    ),
    AlarmRule(
        "reward_std",
        "below",
        limit=1e-6,
        clears_at=2e-6,
        steps=3,
        why="Advantages compare rewards; where all of them are equal there is nothing to learn.",
        cause="all rewards are equal",
        remedy="read completions, and what task.path and reward.parts make of them; train on easier prompts, or start "
        "from a model.path that succeeds now and then",
    ),
    AlarmRule(
        "zero_variance_share",
        "above",
        limit=0.95,
        clears_at=0.9,
        steps=3,
        why="A group with equal rewards gives no gradient. Of 20 groups one teaches at most, and makes the step alone.",
        cause="almost no group has two different rewards, so almost nothing is learned from",
        remedy="a larger sampling.group_size makes rewards differ, algorithm.dynamic_sampling=true leaves such groups "
        "out; if all are wrong the task is too hard or the reward mistaken, if all are right it is solved",
    ),
    AlarmRule(
        "truncated_share",
        "above",
        limit=0.9,
        clears_at=0.7,
        steps=3,
        why="A completion that was cut has no answer yet as a rule, and its reward says nothing about the answer.",
        cause="almost every completion ends at sampling.max_new_tokens and not by itself",
        remedy="raise sampling.max_new_tokens, or see whether the model of model.path knows its end token",
    ),
    AlarmRule(
        "entropy",
        "below",
        limit=0.005,
        clears_at=0.01,
        steps=10,
        why="At 0.005 nats a token, completions of 100 tokens are the same in six of ten cases: nothing new is tried.",
        cause="the policy is certain of every token, because it collapsed or because the task is solved",
        remedy="if it is not solved, go back to an older checkpoint with a lower learner.lr, a higher "
        "sampling.temperature or algorithm.entropy_coef",
    ),
    AlarmRule(
        "kl_reference",
        "above",
        limit=0.5,
        clears_at=0.3,
        steps=3,
        why="Half a nat a token is e^50 for a completion of 100 tokens; runs with a KL stay below 0.1 as a rule.",
        cause="the policy is far from the reference that it is to stay near",
        remedy="raise algorithm.kl_coef, or set algorithm.kl_target, or lower learner.lr",
    ),
    AlarmRule(
        "explained_variance",
        "below",
        limit=0.0,
        clears_at=0.1,
        steps=20,
        why="Below 0 the critic predicts worse than one constant for all tokens; early in a run that is no fault.",
        cause="the critic does not follow the returns",
        remedy="raise critic.lr or critic.warmup_steps, and with old rollouts set algorithm.value_targets=vtrace",
    ),
)


@dataclass(frozen=True, slots=True)
class Change:
    """An alarm that went on or off, and the line that says so."""

    name: str
    is_on: bool
    line: str


class Alarms:
    """Watches the steps of a run. `active` holds the names of the alarms that are on, in the order of RULES."""

    def __init__(self, canary_tolerance: float, rules: tuple[AlarmRule, ...] = RULES) -> None:
        """canary_tolerance: nats, as the weight sync uses it."""
        self.rules = tuple(rule.in_nats(canary_tolerance) for rule in rules)
        self.active: list[str] = []
        self._streaks: Counter[str] = Counter()  # steps in a row that speak for a change

    def update(self, step: StepMetrics) -> list[Change]:
        """Takes in one step, each once and in order; returns the alarms that it turned on or off."""
        return [change for rule in self.rules if (change := self._apply(rule, step)) is not None]

    def _apply(self, rule: AlarmRule, step: StepMetrics) -> Change | None:
        value = getattr(step, rule.figure)
        if value is None or math.isnan(value):
            return None
        was_on = rule.figure in self.active
        speaks_for_change = rule.is_good(value) if was_on else rule.is_bad(value)
        self._streaks[rule.figure] = self._streaks[rule.figure] + 1 if speaks_for_change else 0
        if self._streaks[rule.figure] < rule.steps:
            return None
        self._streaks[rule.figure] = 0
        now_active = {*self.active} ^ {rule.figure}
        self.active = [known.figure for known in self.rules if known.figure in now_active]
        line = (
            f"alarm off at step {step.version}: {rule.figure} is {value:.3g}" if was_on else _onset(rule, value, step)
        )
        return Change(rule.figure, not was_on, line)


class AlarmedStep(Protocol):
    """What an explanation reads of a step: StepMetrics as it is measured, or a record of it read back."""

    @property
    def reward_mean(self) -> float | None:
        """As in StepMetrics, and so are the others."""

    @property
    def rollouts_failed(self) -> Mapping[str, int]:
        """By reason."""

    @property
    def rollouts_dropped(self) -> int | None:
        """Those that were over age."""

    @property
    def gap_engine(self) -> float | None:
        """In nats."""

    @property
    def gap_drift(self) -> float | None:
        """In nats."""

    @property
    def age_health(self) -> Mapping[str, Mapping[str, float | None]]:
        """By bucket of ages."""


def explain(rule: AlarmRule, step: AlarmedStep) -> tuple[str, str]:
    """Likely cause and remedy of an alarm, as far as a step at which it is on tells them."""
    if rule.figure == "lost_share":
        return _most_lost(step) or rule.cause, rule.remedy
    if rule.figure == "reward_std" and step.reward_mean is not None:
        every = f"every reward is {step.reward_mean:.3f}"
        return f"{every}: the reward tells no completion from another, or all are wrong", rule.remedy
    return (rule.cause, rule.remedy) if rule.cause else _off_policy(rule, step)


def _onset(rule: AlarmRule, value: float, step: StepMetrics) -> str:
    """The warning of an alarm that goes on: value, limit, likely cause and remedy."""
    beyond = f"alarm at step {step.version}: {rule.figure} {value:.3g} is {rule.side} {rule.limit:.3g}"
    cause, remedy = explain(rule, step)
    return f"{beyond} for {rule.steps} steps; {cause}; {remedy}"


def _most_lost(step: AlarmedStep) -> str:
    """The commonest reason why rollouts were lost in this step; empty when this very step lost none."""
    reasons = Counter({reason: count for reason, count in step.rollouts_failed.items() if reason != "returned"})
    reasons["over age"] = step.rollouts_dropped or 0
    (reason, count), *_ = reasons.most_common(1)
    return f"most of them: {reason} ({count} rollouts in this step)" if count else ""


def _off_policy(rule: AlarmRule, step: AlarmedStep) -> tuple[str, str]:
    """Cause and remedy, by whether the engine or the policy opened the gap to what sampled the tokens."""
    engine, drift = step.gap_engine, step.gap_drift
    if engine is not None and drift is not None and engine > drift:
        cause = f"most of the gap is engine mismatch ({engine:.2g} nats, policy drift {drift:.2g})"
        return cause, f"model.dtype=float32 narrows it, a lower staleness.max_age does not; {rule.remedy}"
    cause = "the policy moved away from the one that sampled"
    if engine is not None and drift is not None:
        cause += f" (drift {drift:.2g} nats, engine mismatch {engine:.2g})"
    by_age = _by_age(rule.figure, step)
    if by_age:
        cause += "; by age " + ", ".join(f"{bucket}: {value:.2g}" for bucket, value in by_age.items())
    return cause, f"lower {_age_to_try(rule, by_age)}or learner.lr; {rule.remedy}"


def _by_age(figure: str, step: AlarmedStep) -> dict[str, float]:
    buckets = sorted(step.age_health, key=youngest_age)
    return {bucket: value for bucket in buckets if (value := step.age_health[bucket].get(figure)) is not None}


def _age_to_try(rule: AlarmRule, by_age: dict[str, float]) -> str:
    """The key to lower, with the largest value that keeps out every age beyond the limit, followed by a space."""
    first_bad = next((youngest_age(bucket) for bucket, value in by_age.items() if rule.is_bad(value)), None)
    if first_bad is None:
        return "staleness.max_age "
    if first_bad == 0:  # tokens of age 0 are as bad: the updates within one step move the policy that far
        return "learner.epochs, learner.mini_batches "
    return f"staleness.max_age (to {first_bad - 1}) "
