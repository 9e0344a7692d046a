"""How learning bears with old rollouts: forced policy ages against methods, several seeds, one table and one picture.

    python -m benchmarks.studies.staleness_study [--quick]

Every run is the same task, model, batch size, learning rate and number of steps; what differs is how many versions old
the policy is that samples (see delayed_sampling.py) and how the trainer corrects for it. A step makes several updates
of the batch (learner.mini_batches), as PPO does: without a correction that is where old rollouts do their harm.

Figure of a run: held-out accuracy (greedy), mean of the last three evaluations. Flat to an age: at every age up to it
the mean over seeds is no more than one standard deviation (over seeds, at age 0) below that of age 0. Methods marked
"ours" are more than one candidate: which of them is best is said after the fact, from the same runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies import shared
from benchmarks.studies.shared import Job, JobLog

AGES = (0, 4, 16, 64)
FLAT_TO = 16
METHODS: dict[str, tuple[str, ...]] = {
    "no correction": ("algorithm.proximal=recomputed", "algorithm.correction=none", "algorithm.i_know=true"),
    "PPO clip": ("algorithm.correction=none", "algorithm.i_know=true"),
    "TIS": (),
    "decoupled": ("algorithm.name=decoupled",),
    "M2PO": ("algorithm.name=m2po",),
    "ours: cap by age": ("algorithm.age_schedule=cap",),
    "ours: sequence band": ("algorithm.masks=[sequence_band]", "algorithm.mask_low=0.8", "algorithm.mask_high=1.25"),
}
OURS = "ours: "
SETTINGS = (
    "model.max_length=32",
    "sampling.group_size=8",
    "sampling.max_new_tokens=12",
    "learner.groups_per_step=16",
    "learner.mini_batches=2",
    "learner.lr=4e-5",
    "learner.lr_warmup_steps=5",
    "learner.micro_batch_tokens=1024",
)
EVAL_EVERY, EVAL_PROMPTS = 20, 512
BEST_FROM_AGE = 16


def main() -> int:
    parser = shared.arguments(__doc__ or "", "staleness_study", steps=160)
    parser.add_argument("--ages", type=int, nargs="+", default=list(AGES), help="in steps (default %(default)s)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further configuration keys")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.ages, options.methods = 6, [0, 2], ["no correction", "TIS", "ours: cap by age"]
    shared.settle(options)
    run = shared.run_in_workers
    return shared.carry_out(options, make_jobs(options), run, partial(report, options))


def make_jobs(options: argparse.Namespace) -> list[Job]:
    return [
        delayed_job(options, method, age, seed, METHODS[method])
        for seed in range(options.seeds)
        for age in options.ages
        for method in options.methods
    ]


def delayed_job(options: argparse.Namespace, method: str, age: int, seed: int, overrides: Sequence[str]) -> Job:
    """A run for `delayed_sampling`. Seeds come outermost, so that a study cut short has whole tables."""
    return {
        "method": method,
        "age": age,
        "seed": seed,
        "steps": options.steps,
        "eval_every": min(EVAL_EVERY, options.steps),
        "eval_prompts": 64 if options.quick else EVAL_PROMPTS,
        "overrides": [f"model.path={options.model}", *SETTINGS, *overrides, *options.set],
    }


# -- what came out -----------------------------------------------------------------------------------------------------


class Outcome:
    """Results by method and age, seeds side by side."""

    def __init__(self, options: argparse.Namespace, jobs: list[Job], log: JobLog) -> None:
        self.methods, self.ages = list(options.methods), sorted(options.ages)
        self._results: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for job in jobs:
            if (result := log.result_of(job)) is not None:
                self._results.setdefault((job["method"], job["age"]), []).append(result)

    def results(self, method: str, age: int) -> list[dict[str, Any]]:
        return self._results.get((method, age), [])

    def accuracies(self, method: str, age: int) -> list[float]:
        return [result["accuracy"] for result in self.results(method, age)]

    def figures(self, method: str, age: int, name: str) -> list[float]:
        """Means over the second half of each run."""
        return [found["last_half"][name] for found in self.results(method, age) if name in found["last_half"]]

    def is_flat(self, method: str, to_age: int) -> bool | None:
        """Whether no age up to `to_age` is more than one std of age 0 below age 0; None if that was not measured."""
        ages = [age for age in self.ages if 0 < age <= to_age]
        fresh = self.accuracies(method, 0)
        if not fresh or to_age not in ages or not all(self.accuracies(method, age) for age in ages):
            return None
        least = shared.mean(fresh) - shared.std(fresh)
        return all(shared.mean(self.accuracies(method, age)) >= least for age in ages)

    def best_of_ours(self) -> str | None:
        """The candidate with the highest mean accuracy over the ages from 16 on."""
        ages = [age for age in self.ages if age >= BEST_FROM_AGE] or self.ages[-1:]
        ours = [name for name in self.methods if name.startswith(OURS)]
        measured = [name for name in ours if all(self.accuracies(name, age) for age in ages)]
        return max(
            measured, key=lambda name: sum(shared.mean(self.accuracies(name, age)) for age in ages), default=None
        )


def report(options: argparse.Namespace, jobs: list[Job], log: JobLog) -> None:
    """Table and verdict on stdout, JSON and PNG in the folder of results."""
    outcome = Outcome(options, jobs, log)
    notes = [*verdict(outcome), *shared.notes(options, jobs, log)]
    print("\nHeld-out accuracy at the end, mean ± std over seeds, by policy age:\n")
    print(accuracy_table(outcome))
    print("\nSecond half of the runs, means over seeds: ESS share / clipped / masked tokens:\n")
    print(health_table(outcome))
    print()
    for note in notes:
        print(note)
    summary = {
        method: {
            str(age): {
                "accuracy_mean": shared.mean(outcome.accuracies(method, age)),
                "accuracy_std": shared.std(outcome.accuracies(method, age)),
                "seeds": len(outcome.accuracies(method, age)),
            }
            for age in outcome.ages
            if outcome.accuracies(method, age)
        }
        for method in outcome.methods
    }
    record = {
        "settings": list(SETTINGS),
        "methods": {name: METHODS[name] for name in outcome.methods},
        "summary": summary,
        "flat_to_16": {name: outcome.is_flat(name, FLAT_TO) for name in outcome.methods},
        "best_of_ours": outcome.best_of_ours(),
        "notes": notes,
    }
    shared.write(options, record, jobs, log)
    print(f"written to {draw(outcome, options.results / (shared.file_stem(options) + '.png'))}")


def accuracy_table(outcome: Outcome) -> str:
    header = ["", *(f"age {age}" for age in outcome.ages), f"flat to {FLAT_TO}"]
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [
        [
            method,
            *(shared.mean_std(outcome.accuracies(method, age)) for age in outcome.ages),
            words[outcome.is_flat(method, FLAT_TO)],
        ]
        for method in outcome.methods
    ]
    return shared.table(header, rows)


def health_table(outcome: Outcome) -> str:
    def cell(method: str, age: int) -> str:
        values = [outcome.figures(method, age, name) for name in ("ess_share", "clip_fraction", "masked_share")]
        return " / ".join(f"{shared.mean(figures):.2f}" if figures else "-" for figures in values)

    rows = [[method, *(cell(method, age) for age in outcome.ages)] for method in outcome.methods]
    return shared.table(["", *(f"age {age}" for age in outcome.ages)], rows)


def verdict(outcome: Outcome) -> list[str]:
    """What the figures say, whatever was hoped for."""
    sentences = []
    for method in outcome.methods:
        flat = outcome.is_flat(method, FLAT_TO)
        if flat is None:
            continue
        fresh = outcome.accuracies(method, 0)
        changes = [
            f"{shared.mean(outcome.accuracies(method, age)) - shared.mean(fresh):+.3f} at {age}"
            for age in outcome.ages
            if age and outcome.accuracies(method, age)
        ]
        sentences.append(
            f"{method}: {'flat' if flat else 'NOT flat'} to age {FLAT_TO}; against its own age 0 "
            f"(std {shared.std(fresh):.3f}) {', '.join(changes)}"
        )
    best = outcome.best_of_ours()
    if best is not None:
        others = [name for name in outcome.methods if outcome.is_flat(name, FLAT_TO)]
        sentences.append(f"best of ours at age {BEST_FROM_AGE} and above: {best.removeprefix(OURS)}")
        sentences.append(f"flat to age {FLAT_TO}: {', '.join(others) or 'none'}")
    return sentences


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(outcome: Outcome, path: Path) -> Path:
    """Above: accuracy and ESS against age. Below: reward over the run, one panel per age."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or touched
    from matplotlib import pyplot

    colors = dict(zip(outcome.methods, pyplot.get_cmap("tab10").colors, strict=False))
    figure = pyplot.figure(figsize=(4.0 * max(3, len(outcome.ages)), 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1.0])
    accuracy, ess = above.subplots(1, 2)
    for number, method in enumerate(outcome.methods):
        _against_age(accuracy, outcome, method, number, colors[method])
        shares = [outcome.figures(method, age, "ess_share") for age in outcome.ages]
        places = [place for place, share in enumerate(shares) if share]
        means = [shared.mean(shares[place]) for place in places]
        ess.plot(places, means, _style(method), color=colors[method], label=method)
    for axis, label in ((accuracy, "held-out accuracy at the end"), (ess, "effective sample size / tokens")):
        axis.set_xticks(range(len(outcome.ages)), [str(age) for age in outcome.ages])
        axis.set_xlabel("forced policy age (steps)")
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.02)
        _tidy(axis)
    accuracy.set_title("mean ± std over seeds", fontsize=10)
    ess.set_title("second half of the runs", fontsize=10)
    ess.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panels = below.subplots(1, len(outcome.ages), sharey=True, squeeze=False)[0]
    for axis, age in zip(panels, outcome.ages, strict=True):
        for method in outcome.methods:
            _reward_curve(axis, outcome, method, age, colors[method])
        axis.set_title(f"age {age}", fontsize=10)
        axis.set_xlabel("step")
        _tidy(axis)
    panels[0].set_ylabel("training reward (of the policy that sampled)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _style(method: str) -> str:
    return "o--" if method.startswith(OURS) else "o-"


def _against_age(axis: Any, outcome: Outcome, method: str, number: int, color: Any) -> None:
    # Side by side, or error bars would hide each other.
    shift = 0.05 * (number - (len(outcome.methods) - 1) / 2)
    places = [place for place, age in enumerate(outcome.ages) if outcome.accuracies(method, age)]
    values = [outcome.accuracies(method, outcome.ages[place]) for place in places]
    axis.errorbar(
        [place + shift for place in places],
        [shared.mean(accuracies) for accuracies in values],
        [shared.std(accuracies) for accuracies in values],
        fmt=_style(method),
        color=color,
        capsize=2,
        linewidth=1.3,
        markersize=4,
        label=method,
    )


def _reward_curve(axis: Any, outcome: Outcome, method: str, age: int, color: Any) -> None:
    found = [result for result in outcome.results(method, age) if result["curves"]]
    if not found:
        return
    curves = [result["curves"]["reward_mean"] for result in found]
    # A run that diverged is shorter; it counts as long as it lasted.
    at = [[curve[place] for curve in curves if place < len(curve)] for place in range(max(map(len, curves)))]
    steps = [found[0]["curve_every"] * (place + 0.5) for place in range(len(at))]
    means = [shared.mean(values) for values in at]
    low = [mean - shared.std(values) for mean, values in zip(means, at, strict=True)]
    high = [mean + shared.std(values) for mean, values in zip(means, at, strict=True)]
    axis.plot(steps, means, "--" if method.startswith(OURS) else "-", color=color, linewidth=1.3)
    axis.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axis.set_ylim(0, 1)


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
