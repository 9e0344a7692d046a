"""What `asyncrl bench` says of what it measured, and which bound on the policy age it advises."""

from __future__ import annotations

from collections.abc import Sequence

from asyncrl.cli.measuring.bench_figures import BenchResult
from asyncrl.metrics.ledger import in_words

MB = 1e6


def measured_lines(result: BenchResult) -> list[str]:
    """One stretch as lines for the terminal."""
    ess = "not measured" if result.ess_share is None else f"{result.ess_share:.3f}"
    both = result.learner_bytes + result.generator_bytes
    return [
        (
            f"max_age={result.max_age}: {result.steps} steps in {result.seconds:.0f} s, after {result.ready_s:.0f} s "
            f"of start and {result.warm_steps} steps to warm up"
        ),
        f"  trained      {result.trained_per_s.shown()} tokens/s; generated {result.generated_per_s:,.0f}",
        (
            f"  capacity     without waiting the learner could train {result.learner_could_per_s:,.0f}, the generators "
            f"sample {result.generators_could_per_s:,.0f} tokens/s"
        ),
        f"  bounded by   {result.bounded_by}",
        f"  learner      {_time(result.learner_time, result.learner_ledger)}",
        f"  generators   {_time(result.generator_time, result.generator_ledger)}",
        f"  ages used    mean {result.age_mean:.2f}, max {result.age_max}; effective sample size {ess}",
        (
            f"  memory       learner {result.learner_bytes / MB:,.0f} MB, generators "
            f"{result.generator_bytes / MB:,.0f} MB, together {both / MB:,.0f} MB at most"
        ),
        *(f"  note         {note}" for note in result.notes),
    ]


def _time(shares: dict[str, float], ledger: float) -> str:
    return f"{in_words(shares)}   ({ledger:.1%} of the wall time)"


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


def taken(results: Sequence[BenchResult]) -> BenchResult:
    """The least bound that cannot be told from the best by effective tokens per second."""
    return _alike(results)[0]


def _alike(results: Sequence[BenchResult]) -> list[BenchResult]:
    """The bounds that cannot be told from the best, the least first."""
    best = max(results, key=lambda result: result.effective_per_s.mean)
    alike = (result for result in results if result.effective_per_s.overlaps(best.effective_per_s))
    return sorted(alike, key=lambda result: result.max_age)


def changes(result: BenchResult) -> list[str]:
    """What else to change, and what that would bring."""
    advised = result.advised
    lines = [f"at max_age={result.max_age}, change {change.in_words(advised.measured)}" for change in advised.changes]
    return [*lines, advised.note] if advised.note else lines


def advice(results: Sequence[BenchResult]) -> list[str]:
    """Which bound to take, and what the measurement cannot tell."""
    alike = _alike(results)
    best = alike[0]
    lines = [
        (
            f"take staleness.max_age={best.max_age}: {best.effective_per_s.shown()} effective tokens/s (90 % "
            f"interval), the least bound that cannot be told from the best"
        )
    ]
    if len(alike) > 1:
        others = ", ".join(str(result.max_age) for result in alike[1:])
        lines.append(f"the data cannot separate {best.max_age} from {others}; a longer --seconds may")
    used = max(result.age_max for result in results)
    if unused := [str(result.max_age) for result in results if result.max_age > max(used, best.max_age)]:
        lines.append(f"no token was older than {used}: max_age={', '.join(unused)} changes nothing here")
    lines.append(
        "effective tokens/s count throughput and how far the policy has moved from its rollouts; what a bound does to "
        "the reward in the long run is not measured here"
    )
    if all(result.ess_share is None for result in results):
        lines.append("without a gradient in any step the bounds are compared by throughput alone")
    return lines
