"""Every method by its one line of configuration: the two commands train the arithmetic task, three seeds each.

    python -m benchmarks.studies.method_matrix [--quick]

    asyncrl-learner CONFIG algorithm.name=NAME     asyncrl-generator CONFIG algorithm.name=NAME

The daemons are real, with one pinned CPU each; nothing but the method and the seed differs between runs. Passed: the
mean over seeds of held-out accuracy (greedy, at the end) is at the bar or above. The column of the least seed says how
much of it is luck.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl.metrics import METRICS_FILE, read_records
from benchmarks import common
from benchmarks.studies import shared
from benchmarks.studies.async_vs_sync import STOP_TIMEOUT_S, command, free_port, tail
from benchmarks.studies.shared import Job, JobLog

METHODS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "cispo", "decoupled", "m2po", "ppo")
BAR = 0.85
SETTINGS = ("critic.lr=1e-3", "eval.every=0", "checkpoint.every=0")
CURVE_EVERY = 4
RUN_TIMEOUT_S = 900.0
FROM_SUMMARY = (
    "eval_first",
    "eval_last",
    "reward_last",
    "wall_s",
    "policy_age_mean",
    "policy_age_max",
    "ess_share_min",
    "groups_filtered",
    "rollouts_dropped",
    "rollouts_failed",
    "sync_failed",
    "canary_max_abs_diff",
    "tokens_trained_per_s",
    "learner_idle_share",
    "generator_idle_share",
    "alarms",
)


def main() -> int:
    parser = shared.arguments(__doc__ or "", "method_matrix", steps=60)
    parser.add_argument("--config", type=Path, default=shared.ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help="of %(default)s")
    parser.add_argument("--bar", type=float, default=BAR, help="accuracy that passes (default %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further configuration keys")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.methods = 4, ["grpo", "ppo"]
        options.set = ["learner.groups_per_step=4", "eval.prompts=8", *options.set]
    shared.settle(options)
    run = partial(shared.run_in_turn, run=run_job)
    return shared.carry_out(options, make_jobs(options), run, partial(report, options))


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """All of one seed before the next, so that a study cut short has whole tables."""
    return [
        {
            "method": method,
            "seed": seed,
            "steps": options.steps,
            "config": str(options.config),
            "overrides": [f"model.path={options.model}", *SETTINGS, *options.set],
        }
        for seed in range(options.seeds)
        for method in options.methods
    ]


def run_job(job: Job) -> dict[str, Any]:
    """One run of the two commands to its end. Raises RuntimeError with the ends of the logs when one of them fails."""
    learner_cpu, generator_cpu = common.cpus()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = [
            job["config"],
            f"algorithm.name={job['method']}",
            f"run.name=matrix-{job['method']}",
            f"run.dir={folder / 'run'}",
            f"run.seed={job['seed']}",
            f"run.steps={job['steps']}",
            f"learner.cpus=[{learner_cpu}]",
            f"generator.cpus=[{generator_cpu}]",
            f"transport.address=tcp://127.0.0.1:{free_port()}",
            *job["overrides"],
        ]
        _run_daemons(arguments, folder)
        return _result(folder / "run", job["steps"]) | {"total_s": round(time.perf_counter() - started, 1)}


def _run_daemons(arguments: list[str], folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(command("generator", arguments, folder))
        learner = stack.enter_context(command("learner", arguments, folder))
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while learner.poll() is None:
            if generator.poll():
                raise RuntimeError(f"the generator ended with code {generator.returncode}:\n{tail(folder)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not done after {RUN_TIMEOUT_S:.0f} s:\n{tail(folder)}")
            time.sleep(0.2)
        if learner.returncode:
            raise RuntimeError(f"the learner ended with code {learner.returncode}:\n{tail(folder)}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            generator.wait(STOP_TIMEOUT_S)


def _result(run_dir: Path, steps: int) -> dict[str, Any]:
    """What the run wrote."""
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["steps"] != steps or summary["eval_last"] is None:
        raise RuntimeError(f"{summary['steps']} steps of {steps}, evaluation {summary['eval_last']}")
    taken = [record for record in read_records(run_dir / METRICS_FILE)[0] if record["kind"] == "step"]
    return {
        "accuracy": summary["eval_last"],
        **{name: summary[name] for name in FROM_SUMMARY if summary.get(name) is not None},
        "curve_every": CURVE_EVERY,
        "reward_curve": shared.thinned([record["reward_mean"] for record in taken], CURVE_EVERY),
    }


# -- what came out -----------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, jobs: list[Job], log: JobLog) -> None:
    """The table on stdout, everything measured in the JSON file."""
    rows = [row for method in options.methods if (row := summary_of(method, options.bar, jobs, log)) is not None]
    notes = [*verdict(rows, options.bar), *shared.notes(options, jobs, log)]
    print("\nMean ± std over seeds:\n")
    header = [
        "algorithm.name",
        "accuracy before",
        "accuracy after",
        "least seed",
        f">= {options.bar}",
        "age",
        "time, s",
    ]
    lines = [
        [
            row["method"],
            f"{shared.mean(row['eval_first']):.3f}",
            shared.mean_std(row["accuracy"]),
            f"{min(row['accuracy']):.3f}",
            "yes" if row["passed"] else "NO",
            f"{shared.mean(row['policy_age_mean']):.2f}",
            f"{shared.mean(row['total_s']):.0f}",
        ]
        for row in rows
    ]
    print(shared.table(header, lines))
    print()
    for note in notes:
        print(note)
    shared.write(options, {"settings": list(SETTINGS), "bar": options.bar, "summary": rows, "notes": notes}, jobs, log)


def summary_of(method: str, bar: float, jobs: list[Job], log: JobLog) -> dict[str, Any] | None:
    """The figures of one method, seed by seed; None if no run of it has ended well."""
    results = [result for job in jobs if job["method"] == method and (result := log.result_of(job)) is not None]
    if not results:
        return None
    names = ("accuracy", "eval_first", "policy_age_mean", "total_s")
    row: dict[str, Any] = {"method": method, **{name: [result[name] for result in results] for name in names}}
    return row | {"passed": shared.mean(row["accuracy"]) >= bar}


def verdict(rows: list[dict[str, Any]], bar: float) -> list[str]:
    missed = [row["method"] for row in rows if not row["passed"]]
    by_luck = [row["method"] for row in rows if row["passed"] and min(row["accuracy"]) < bar]
    sentences = [f"{len(rows) - len(missed)} of {len(rows)} methods reach {bar}" + _named("; not", missed)]
    return sentences + ([f"in the mean, though not with every seed: {', '.join(by_luck)}"] if by_luck else [])


def _named(word: str, names: list[str]) -> str:
    return f"{word} {', '.join(names)}" if names else ""


if __name__ == "__main__":
    sys.exit(main())
