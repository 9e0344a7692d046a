"""What a measured stretch of a run comes to, and what is to be concluded from several of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from asyncrl.metrics.ledger import add, in_words, shares
from asyncrl.report.advisor import Advice, bottleneck

RESAMPLES = 500
CONFIDENCE = 0.9
MB = 1e6


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


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One stretch of a run under one bound on the policy age. Rates are per second of wall time.

    effective_per_s         trained tokens times the effective sample size of their batch
    learner_could_per_s     trained tokens per second in which the learner did not wait for a batch
    generators_could_per_s  sampled tokens per second, had no generator ever been without a sequence
    learner_time, generator_time  shares of their seconds by activity; empty where the run does not tell
    advised                 what to change, foretold from this stretch and the steps before it
    """

    max_age: int
    steps: int
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
    memory_bytes: int
    bounded_by: str
    learner_time: dict[str, float] = field(default_factory=dict)
    generator_time: dict[str, float] = field(default_factory=dict)
    advised: Advice = field(default_factory=Advice)


def measure(
    max_age: int,
    steps: Sequence[Mapping[str, Any]],
    *,
    ready_s: float,
    memory_bytes: int,
    advised: Advice | None = None,
) -> BenchResult:
    """Sums up lines of steps of metrics.jsonl."""
    seconds = _total(steps, "interval_s")
    trained, generated = _total(steps, "tokens_trained"), _total(steps, "tokens_generated")
    learner_idle_s = _total(steps, "learner_idle_s")
    busy_s, idle_s = _total(steps, "generator_busy_s"), _total(steps, "generator_idle_s")
    ess = [float(step["ess_share"]) for step in steps if step.get("ess_share") is not None]
    learner_idle = learner_idle_s / seconds
    generator_idle = idle_s / (busy_s + idle_s) if busy_s + idle_s else 0.0
    generators = (busy_s + idle_s) / seconds
    learner_time_s, generator_time_s = _time(steps, "learner_time_s"), _time(steps, "generator_time_s")
    found = bottleneck(learner_time_s, generator_time_s)
    return BenchResult(
        max_age=max_age,
        steps=len(steps),
        seconds=seconds,
        trained_per_s=interval(steps, _trained),
        generated_per_s=generated / seconds,
        effective_per_s=interval(steps, _effective),
        ess_share=fmean(ess) if ess else None,
        age_mean=sum(float(step["policy_age_mean"]) * _trained(step) for step in steps) / max(1.0, trained),
        age_max=max(int(step["policy_age_max"]) for step in steps),
        learner_could_per_s=trained / max(1e-9, seconds - learner_idle_s),
        generators_could_per_s=generated / busy_s * generators if busy_s else 0.0,
        learner_idle_share=learner_idle,
        generator_idle_share=generator_idle,
        step_s=fmean(float(step.get("step_s") or 0.0) for step in steps),
        ready_s=ready_s,
        memory_bytes=memory_bytes,
        bounded_by=f"{found.name}: {found.evidence}" if found is not None else "-",
        learner_time=shares(learner_time_s),
        generator_time=shares(generator_time_s),
        advised=advised or Advice(),
    )


def interval(steps: Sequence[Mapping[str, Any]], amount: Callable[[Mapping[str, Any]], float]) -> Interval:
    """The rate of an amount per second over the steps, with its interval by the bootstrap (Efron 1979)."""
    amounts, seconds = [amount(step) for step in steps], [float(step["interval_s"]) for step in steps]
    rng, rates = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = [rng.randrange(len(steps)) for _ in steps]
        rates.append(sum(amounts[n] for n in drawn) / max(1e-9, sum(seconds[n] for n in drawn)))
    rates.sort()
    cut = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Interval(sum(amounts) / sum(seconds), rates[cut], rates[-1 - cut])


def _trained(step: Mapping[str, Any]) -> float:
    return float(step.get("tokens_trained") or 0.0)


def _effective(step: Mapping[str, Any]) -> float:
    share = step.get("ess_share")
    return _trained(step) * (1.0 if share is None else float(share))


def _total(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(step.get(name) or 0.0) for step in steps)


def _time(steps: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Seconds by activity, added up over the steps."""
    total: dict[str, float] = {}
    for step in steps:
        add(total, step.get(name) or {})
    return total


# -- what is said --------------------------------------------------------------------------------------------


def measured_lines(result: BenchResult) -> list[str]:
    """One stretch as lines for the terminal."""
    lines = [
        (
            f"  {result.trained_per_s.shown()} tokens/s trained, {result.generated_per_s:,.0f} generated; "
            f"{result.steps} steps in {result.seconds:.0f} s, ready after {result.ready_s:.0f} s"
        ),
        (
            f"  bounded by {result.bounded_by}; without waiting the learner could train "
            f"{result.learner_could_per_s:,.0f}, the generators sample {result.generators_could_per_s:,.0f} tokens/s"
        ),
        f"  memory of all processes {result.memory_bytes / MB:,.0f} MB at most",
    ]
    for side, shares_of_side in (("learner", result.learner_time), ("generators", result.generator_time)):
        if shares_of_side:
            lines.append(f"  {side}: {in_words(shares_of_side)}")
    return lines


def table(results: Sequence[BenchResult]) -> list[str]:
    """A line for each bound."""
    titles = ("max_age", "trained tokens/s", "ESS", "effective tokens/s", "age mean", "age max", "learner idle",
              "generators idle")  # fmt: skip
    rows = [titles, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _row(result: BenchResult) -> tuple[str, ...]:
    return (
        str(result.max_age),
        result.trained_per_s.shown(),
        "-" if result.ess_share is None else f"{result.ess_share:.3f}",
        result.effective_per_s.shown(),
        f"{result.age_mean:.2f}",
        str(result.age_max),
        f"{result.learner_idle_share:.0%}",
        f"{result.generator_idle_share:.0%}",
    )


def advice(results: Sequence[BenchResult]) -> list[str]:
    """Which bound to take: the smallest that cannot be told from the best by effective tokens per second."""
    best = max(results, key=lambda result: result.effective_per_s.mean)
    if len(results) == 1:
        return [f"bounded by {best.bounded_by}", *(f"change {line}" for line in best.advised.lines())]
    alike = sorted(result.max_age for result in results if result.effective_per_s.overlaps(best.effective_per_s))
    taken = alike[0]
    lines = [f"take staleness.max_age={taken}: the least one whose effective tokens/s cannot be told from the best"]
    if len(alike) > 1:
        others = ", ".join(str(age) for age in alike[1:])
        lines.append(f"the data cannot separate {taken} from {others}; a longer --seconds may")
    lines.append(
        "effective tokens/s count throughput and how far the policy has moved from its rollouts; what a bound does to "
        "the reward in the long run is not measured here"
    )
    chosen = next(result for result in results if result.max_age == taken)
    return [*lines, *(f"at max_age={taken}, change {line}" for line in chosen.advised.lines())]
