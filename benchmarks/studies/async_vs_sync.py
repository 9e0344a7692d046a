"""Asynchronous against synchronous training: the two commands on two pinned CPUs, the same task, the same steps.

    python -m benchmarks.studies.async_vs_sync [--quick]
    python -m benchmarks.studies.async_vs_sync --config my.yaml     # a task and a model of your own

The daemons run in the working directory, so that the module of a task is found as it is by the commands. Outside of the
repository, PYTHONPATH must name its root.

Runs alternate: staleness.max_age=0 (the generator waits for every step) and the configuration's own max_age. The time
is that of the training part alone, from the moment the trainer was ready to the end of the last step as metrics.jsonl
has it: start-up and the last evaluation are the same for both and are left out. The evaluation at the end is in the
table too: speed must not be bought with quality.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.config.loading import load_config
from asyncrl.metrics import METRICS_FILE, read_records
from benchmarks import common

ROOT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STOP_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 1800.0
FIGURES = {"learner_idle_share": "share", "generator_idle_share": "share", "policy_age_mean": "steps"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    seconds: float  # of the training part
    steps: int
    eval_last: float | None
    learner_idle_share: float
    generator_idle_share: float
    policy_age_mean: float


def main() -> int:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default %(default)s)")
    parser.add_argument("--config", type=Path, help="configuration to compare with itself (default quickstart)")
    parser.add_argument("--model", type=Path, help="model folder (default: that of --config; of quickstart: made)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further configuration keys, for both sides")
    options = common.parse(parser)
    if options.quick:
        options.pairs, options.steps = 1, 4
        options.overrides = [*options.overrides, "learner.groups_per_step=4", "eval.prompts=8"]
    choose_model(options)
    max_age = load_config(options.config, options.overrides).staleness.max_age
    if max_age == 0:
        parser.error(f"{options.config} has staleness.max_age=0: both sides would be synchronous")
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: must be 2 or more")
    report = common.Report("async_vs_sync", options)
    outcomes = measure(options, max_age, report)
    asynchronous, synchronous = outcomes[max_age], outcomes[0]
    seconds = [[outcome.seconds for outcome in side] for side in (asynchronous, synchronous)]
    report.pairs(f"training, {options.steps} steps", "s", *seconds, "max_age=0")
    for name, unit in FIGURES.items():
        for age in (0, max_age):
            report.figure(f"{name}, max_age={age}", unit, [getattr(outcome, name) for outcome in outcomes[age]])
    for age in (0, max_age):
        scores = [outcome.eval_last for outcome in outcomes[age] if outcome.eval_last is not None]
        if scores:
            report.figure(f"eval at the end, max_age={age}", "reward", scores)
    report.note("a ratio below 1: asynchronous training took less time")
    report.finish()
    return 0


def measure(options: argparse.Namespace, max_age: int, report: common.Report) -> dict[int, list[Outcome]]:
    """Alternating runs; the outcomes by max_age."""
    outcomes: dict[int, list[Outcome]] = {0: [], max_age: []}
    for pair in range(options.pairs):
        for age in (0, max_age) if pair % 2 == 0 else (max_age, 0):
            with tempfile.TemporaryDirectory() as folder, common.watch() as watch:
                outcomes[age].append(run(options, age, Path(folder)))
            report.watched(watch)
            last = outcomes[age][-1]
            print(f"pair {pair + 1}, max_age={age}: {last.seconds:.1f} s, eval {last.eval_last}", flush=True)
    return outcomes


def run(options: argparse.Namespace, max_age: int, folder: Path) -> Outcome:
    """One run of the two commands to its end. Raises RuntimeError with the end of the log when one of them fails."""
    arguments = [
        str(options.config),
        f"run.steps={options.steps}",
        f"run.dir={folder / 'run'}",
        f"staleness.max_age={max_age}",
        f"transport.address=tcp://127.0.0.1:{free_port()}",
        "eval.every=0",
        "checkpoint.every=0",
        *options.overrides,
    ]
    with contextlib.ExitStack() as stack:
        generator = stack.enter_context(command("generator", arguments, folder))
        learner = stack.enter_context(command("learner", arguments, folder))
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while learner.poll() is None:
            if generator.poll() or time.monotonic() > deadline:
                raise RuntimeError(f"the generator failed, or {RUN_TIMEOUT_S:.0f} s are over:\n{tail(folder)}")
            time.sleep(0.2)
        if learner.returncode:
            raise RuntimeError(f"the learner ended with code {learner.returncode}:\n{tail(folder)}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            generator.wait(STOP_TIMEOUT_S)
    return outcome_of(folder / "run", options.steps)


@contextlib.contextmanager
def command(role: str, arguments: list[str], folder: Path) -> Any:
    """A daemon whose output goes to `folder`; it is stopped at the end of the body, if it still runs."""
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen([COMMANDS / f"asyncrl-{role}", *arguments], stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def outcome_of(run_dir: Path, steps: int) -> Outcome:
    """What the run wrote."""
    records, _ = read_records(run_dir / METRICS_FILE)
    taken = [record for record in records if record["kind"] == "step"]
    if [record["version"] for record in taken] != list(range(1, steps + 1)):
        raise RuntimeError(f"{run_dir}: steps {[record['version'] for record in taken]}, wanted 1 to {steps}")
    summary = json.loads((run_dir / "summary.json").read_text())
    return Outcome(
        seconds=sum(record["interval_s"] for record in taken),
        steps=len(taken),
        eval_last=summary["eval_last"],
        learner_idle_share=summary["learner_idle_share"],
        generator_idle_share=summary["generator_idle_share"],
        policy_age_mean=summary["policy_age_mean"],
    )


def choose_model(options: argparse.Namespace) -> None:
    """Settles configuration and model: quickstart's base model is made; of another configuration its own stays."""
    if options.config is None:
        options.config = QUICKSTART
        options.model = options.model or ROOT / "runs" / "models" / "arithmetic"
        make_base_model(options.model)
    options.config = options.config.resolve()
    if options.model is not None:
        options.overrides = [f"model.path={options.model.resolve()}", *options.overrides]


def make_base_model(folder: Path) -> None:
    """The model of `bin/quickstart`, if it is not there yet."""
    if not (folder / "config.json").exists():
        subprocess.run([ROOT / "bin" / "warmup", "arithmetic", folder], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(folder: Path) -> str:
    """The ends of both logs."""
    logs = {path.name: path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))}
    return "\n".join(f"--- {name}\n{text[-2000:]}" for name, text in logs.items())


if __name__ == "__main__":
    sys.exit(main())
