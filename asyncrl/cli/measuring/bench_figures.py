"""What a measured stretch of a run comes to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from asyncrl.cli.measuring.bench_pages import GeneratorWindow
from asyncrl.metrics.ledger import GeneratorActivity, LearnerActivity, shares
from asyncrl.report.advisor import Advice, bottleneck
from asyncrl.report.run_records import StepRecord, mean, measured, total, totals

RESAMPLES = 500
CONFIDENCE = 0.9
BUSY = (GeneratorActivity.SWAP, GeneratorActivity.DECODE, GeneratorActivity.EVAL)
LEDGER_TOLERANCE = 0.01
DRIFT_WORTH_NAMING = 0.15
FEW_STEPS = 8


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval that holds it with 90 % confidence, by resampling steps."""

    mean: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= other.high and other.low <= self.high

    def shown(self, form: str = ",.0f") -> str:
        """The mean with its interval."""
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a stretch was measured under, beside its steps. Memory is the most that was held, in bytes.

    warm_steps  steps that were left out before it
    ready_s     from the start of the run to the first of them
    """

    max_age: int
    ready_s: float
    warm_steps: int
    learner_bytes: int
    generator_bytes: int


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One stretch of a run under one bound on the policy age. Rates are per second of wall time.

    effective_per_s         trained tokens times the effective sample size of their batch
    learner_could_per_s     trained tokens per second in which the learner did not wait for a batch
    generators_could_per_s  sampled tokens per second, had no generator ever been without a sequence
    learner_time, generator_time  shares of their seconds by activity; empty where the run does not tell
    learner_ledger, generator_ledger  the sum of those seconds / the wall time that passed
    notes                   what to mind when reading the figures
    advised                 what to change, foretold from this run; of the bound that is advised alone
    """

    max_age: int
    steps: int
    warm_steps: int
    seconds: float
    trained_per_s: Interval
    generated_per_s: float
    effective_per_s: Interval
    ess_share: float | None
    age_mean: float
    age_max: int
    learner_could_per_s: float
    generators_could_per_s: float
    learner_idle_share: float
    generator_idle_share: float
    step_s: float
    ready_s: float
    learner_bytes: int
    generator_bytes: int
    bounded_by: str
    learner_time: dict[str, float] = field(default_factory=dict)
    generator_time: dict[str, float] = field(default_factory=dict)
    learner_ledger: float = 0.0
    generator_ledger: float = 0.0
    notes: list[str] = field(default_factory=list)
    advised: Advice = field(default_factory=Advice)


def measure(steps: Sequence[StepRecord], generators: GeneratorWindow, under: Circumstances) -> BenchResult:
    """Sums up the steps of a stretch and what the generators did in it."""
    seconds = total(step.interval_s for step in steps)
    trained = total(step.tokens_trained for step in steps)
    learner_s = totals(step.learner_time_s for step in steps)
    waited_s = learner_s.get(LearnerActivity.DATA, 0.0)
    busy_s = sum(generators.time_s.get(activity, 0.0) for activity in BUSY)
    found = bottleneck(learner_s, generators.time_s)
    learner_ledger = sum(learner_s.values()) / seconds
    generator_ledger = sum(generators.time_s.values()) / generators.wall_s
    return BenchResult(
        max_age=under.max_age,
        steps=len(steps),
        warm_steps=under.warm_steps,
        seconds=seconds,
        trained_per_s=interval(steps, _trained),
        generated_per_s=generators.tokens_per_s,
        effective_per_s=interval(steps, _effective),
        ess_share=mean(step.ess_share for step in steps),
        age_mean=sum((step.policy_age_mean or 0.0) * _trained(step) for step in steps) / max(1.0, trained),
        age_max=max(measured(step.policy_age_max for step in steps), default=0),
        learner_could_per_s=trained / max(1e-9, seconds - waited_s),
        generators_could_per_s=generators.tokens * generators.num_generators / busy_s if busy_s else 0.0,
        learner_idle_share=waited_s / seconds,
        generator_idle_share=1.0 - busy_s / max(1e-9, sum(generators.time_s.values())),
        step_s=mean(step.step_s for step in steps) or 0.0,
        ready_s=under.ready_s,
        learner_bytes=under.learner_bytes,
        generator_bytes=under.generator_bytes,
        bounded_by=f"{found.name}: {found.evidence}" if found is not None else "-",
        learner_time=shares(learner_s),
        generator_time=shares(generators.time_s),
        learner_ledger=learner_ledger,
        generator_ledger=generator_ledger,
        notes=[*_notes(steps, under), *_ledger_notes(learner=learner_ledger, generators=generator_ledger)],
    )


def interval(steps: Sequence[StepRecord], amount: Callable[[StepRecord], float]) -> Interval:
    """The rate of an amount per second over the steps, with its interval by the bootstrap (Efron 1979)."""
    amounts, seconds = [amount(step) for step in steps], [step.interval_s or 0.0 for step in steps]
    rng, rates = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = [rng.randrange(len(steps)) for _ in steps]
        rates.append(sum(amounts[n] for n in drawn) / max(1e-9, sum(seconds[n] for n in drawn)))
    rates.sort()
    cut = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Interval(sum(amounts) / sum(seconds), rates[cut], rates[-1 - cut])


def needed_warm_steps(max_age: int) -> int:
    """Steps before rates are steady: the first batches come from engines that fill up, and ages grow to their bound."""
    return max(4, max_age + 2)


def _trained(step: StepRecord) -> float:
    return float(step.tokens_trained or 0)


def _effective(step: StepRecord) -> float:
    return _trained(step) * (1.0 if step.ess_share is None else step.ess_share)


def _notes(steps: Sequence[StepRecord], under: Circumstances) -> list[str]:
    """What a reader would take the figures wrongly for without being told."""
    notes = []
    if idle := sum(step.ess_share is None for step in steps):
        notes.append(
            f"in {idle} of {len(steps)} steps all rewards of each group were equal: nothing was trained on, so a step "
            "took less than it will, and no ESS was measured; look at the rewards (--keep, then asyncrl rollouts)"
            if idle == len(steps)
            else f"{idle} of {len(steps)} steps had no gradient, because all rewards of each group were equal"
        )
    flat = mean(step.zero_variance_share for step in steps)
    if flat is not None and flat >= 0.5 and not idle:
        notes.append(f"{flat:.0%} of the groups had equal rewards, and the learner skips those: its steps are short")
    if under.warm_steps < needed_warm_steps(under.max_age):
        notes.append(
            f"measured after {under.warm_steps} steps; {needed_warm_steps(under.max_age)} would be needed until ages "
            "are steady: give a larger --within"
        )
    if len(steps) < FEW_STEPS:
        notes.append(f"only {len(steps)} steps: the intervals are rough; give a larger --within, or fewer --ages")
    lengths = measured(step.completion_tokens_mean for step in steps)
    if len(lengths) >= 4:
        half = len(lengths) // 2
        drift = fmean(lengths[-half:]) / max(1e-9, fmean(lengths[:half])) - 1.0
        if abs(drift) > DRIFT_WORTH_NAMING:
            notes.append(f"completions changed in length by {drift:+.0%} while it was measured: rates will move too")
    return notes


def _ledger_notes(**ledgers: float) -> list[str]:
    return [
        f"the time of the {side} by activity adds up to {share:.1%} of the wall time: do not rely on its shares"
        for side, share in ledgers.items()
        if abs(share - 1.0) > LEDGER_TOLERANCE
    ]
