"""What a critic learns from old rollouts: GAE, importance-weighted GAE and V-trace at forced policy ages.

    python -m benchmarks.studies.critic_study [--quick]

PPO with a critic (algorithm.name=ppo), on rollouts that the policy of `age` versions ago has sampled (see
delayed_sampling.py); the runs differ in algorithm.value_targets alone. Figures of a run: held-out accuracy, and the
critic's explained variance, both means of the last three evaluations. The explained variance is that of the returns of
completions which the newest policy has just sampled: the trainer's own figure is measured against the targets it trains
on, which differ from method to method, and is in the table for comparison.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies import shared
from benchmarks.studies.shared import Job, JobLog
from benchmarks.studies.staleness_study import SETTINGS, delayed_job

AGES = (0, 8, 16)
COMPARED_FROM = 8
PLAIN, VTRACE = "gae", "vtrace"
TARGETS = (PLAIN, "is_gae", VTRACE)
CRITIC = ("algorithm.name=ppo", "critic.lr=1e-3")
FRESH, OWN, ACCURACY = "explained variance", "against its own targets", "accuracy"


def main() -> int:
    parser = shared.arguments(__doc__ or "", "critic_study", steps=160)
    parser.add_argument("--ages", type=int, nargs="+", default=list(AGES), help="in steps (default %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further configuration keys")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.ages = 6, [0, 8]
    shared.settle(options)
    run = shared.run_in_workers
    return shared.carry_out(options, make_jobs(options), run, partial(report, options))


def make_jobs(options: argparse.Namespace) -> list[Job]:
    return [
        delayed_job(options, targets, age, seed, [*CRITIC, f"algorithm.value_targets={targets}"])
        for seed in range(options.seeds)
        for age in options.ages
        for targets in TARGETS
    ]


# -- what came out -----------------------------------------------------------------------------------------------------

Figures = dict[tuple[str, int], dict[str, list[float]]]  # by targets and age: each figure, seed by seed


def figures_of(jobs: list[Job], log: JobLog) -> Figures:
    found: Figures = {}
    for job in jobs:
        result = log.result_of(job)
        if result is None:
            continue
        figures = found.setdefault((job["method"], job["age"]), {ACCURACY: [], FRESH: [], OWN: []})
        figures[ACCURACY].append(result["accuracy"])
        for name, value in (
            (FRESH, result.get("fresh_explained_variance")),
            (OWN, result["last_half"].get("explained_variance")),
        ):
            if value is not None:
                figures[name].append(value)
    return found


def report(options: argparse.Namespace, jobs: list[Job], log: JobLog) -> None:
    """Table and verdict on stdout, JSON and PNG in the folder of results."""
    figures, ages = figures_of(jobs, log), sorted(options.ages)
    notes = [*verdict(figures, ages), *shared.notes(options, jobs, log)]
    print("\nMean ± std over seeds:\n")
    rows = [
        [targets, str(age), *(shared.mean_std(figures[targets, age][name]) for name in (FRESH, OWN, ACCURACY))]
        for age in ages
        for targets in TARGETS
        if (targets, age) in figures
    ]
    print(shared.table(["targets", "age", FRESH, OWN, ACCURACY], rows))
    print()
    for note in notes:
        print(note)
    summary = [{"targets": targets, "age": age, **means} for (targets, age), means in figures.items()]
    record = {"settings": [*SETTINGS, *CRITIC], "summary": summary, "notes": notes}
    shared.write(options, record, jobs, log)
    print(f"written to {draw(figures, ages, jobs, log, options.results / (shared.file_stem(options) + '.png'))}")


def verdict(figures: Figures, ages: list[int]) -> list[str]:
    """V-trace against plain GAE at each age it is meant for: in which figures it is ahead, and by how much."""
    sentences = []
    for age in ages:
        if age < COMPARED_FROM or (PLAIN, age) not in figures or (VTRACE, age) not in figures:
            continue
        parts, ahead = [], []
        for name in (FRESH, ACCURACY):
            ours, plain = figures[VTRACE, age][name], figures[PLAIN, age][name]
            if not ours or not plain:
                parts.append(f"{name} was not measured")
                ahead.append(False)
                continue
            difference = shared.mean(ours) - shared.mean(plain)
            spread = max(shared.std(ours), shared.std(plain))
            ahead.append(difference > 0)
            size = "more" if abs(difference) > spread else "no more"
            parts.append(f"{name} {difference:+.3f} ({size} than the larger std, {spread:.3f})")
        word = "beats" if all(ahead) else "does NOT beat"
        sentences.append(f"age {age}: V-trace {word} plain GAE in both figures: {'; '.join(parts)}")
    return sentences


def draw(figures: Figures, ages: list[int], jobs: list[Job], log: JobLog, path: Path) -> Path:
    """Above: both figures by age. Below: explained variance over the run, one panel per age."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or touched
    from matplotlib import pyplot

    colors = dict(zip(TARGETS, pyplot.get_cmap("tab10").colors, strict=False))
    figure = pyplot.figure(figsize=(4.0 * max(3, len(ages)), 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axis, name in zip(above.subplots(1, 2), (FRESH, ACCURACY), strict=True):
        for number, targets in enumerate(TARGETS):
            by_age = [figures.get((targets, age), {}).get(name, []) for age in ages]
            measured = [(place, values) for place, values in enumerate(by_age) if values]
            axis.bar(
                [place + 0.25 * (number - 1) for place, _ in measured],
                [shared.mean(values) for _, values in measured],
                0.23,
                yerr=[shared.std(values) for _, values in measured],
                color=colors[targets],
                capsize=3,
                label=targets,
            )
        axis.set_xticks(range(len(ages)), [str(age) for age in ages])
        axis.set_xlabel("forced policy age (steps)")
        axis.set_ylabel(f"{name} at the end")
        _tidy(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panels = below.subplots(1, len(ages), sharey=True, squeeze=False)[0]
    for panel, age in zip(panels, ages, strict=True):
        for targets in TARGETS:
            _curves(panel, [job for job in jobs if (job["method"], job["age"]) == (targets, age)], log, colors[targets])
        panel.set_title(f"age {age}", fontsize=10)
        panel.set_xlabel("step")
        _tidy(panel)
    panels[0].set_ylabel("explained variance, fresh rollouts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _curves(axis: Any, jobs: list[Job], log: JobLog, color: Any) -> None:
    """One thin line per seed."""
    for job in jobs:
        result = log.result_of(job)
        evals = [record for record in result["evals"] if "explained_variance" in record] if result else []
        axis.plot(
            [record["version"] for record in evals],
            [record["explained_variance"] for record in evals],
            color=color,
            linewidth=1.0,
            alpha=0.8,
        )


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
