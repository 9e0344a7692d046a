"""`asyncrl bench CONFIG`: how fast a configuration is on this machine, what bounds it, which max_age it should have.

For each bound on the policy age a run of its own is started as `asyncrl run` starts it, in a temporary folder, measured
for some seconds after its first steps, and stopped. Evaluations and periodic checkpoints are off meanwhile.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncrl.cli.common import Parser, is_configuration, shipped_or_given
from asyncrl.cli.measuring.bench_figures import BenchResult, advice, measure, measured_lines, table
from asyncrl.errors import ConfigError, UserError
from asyncrl.host.process_memory import memory_of_tree
from asyncrl.metrics import METRICS_FILE, iterate_records
from asyncrl.metrics.types import StepMetrics
from asyncrl.simulator.advice import advise

EXAMPLE = "asyncrl bench configs/quickstart.yaml --ages 0 1 2 4"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0
POLL_S = 0.25
MEMORY_EVERY_S = 3.0
WARM_STEPS = 4  # whose tokens were sampled before the engines were full
FEWEST_STEPS = 8  # of a measurement; it goes on for them beyond its time
LONGEST = 4.0  # times the seconds asked for
OWN_SETTINGS = ("run.steps=1000000", "eval.prompts=0", "checkpoint.every=0", "log.wandb=off", "transport.address=auto")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: the configuration and how long each measurement takes."""

    config: str
    settings: tuple[str, ...]
    generators: int | None
    seconds: float


def bench(argv: Sequence[str]) -> int:
    """Runs the command; returns 0. Raises UserError when a run does not start or makes no steps."""
    arguments = _parser().parse_intermixed_args(argv)
    if not is_configuration(arguments.config):
        raise ConfigError(f"give a configuration file, for example: {EXAMPLE}")
    if not arguments.seconds > 0:
        raise ConfigError(f"--seconds {arguments.seconds:g}: give more than 0")
    from asyncrl.config.loading import load_config

    path = shipped_or_given(arguments.config)
    config = load_config(path, arguments.overrides)  # a mistake is told before anything starts
    ages = arguments.ages or [config.staleness.max_age]
    plan = Plan(path, tuple(arguments.overrides), arguments.generators, arguments.seconds)
    root = Path(tempfile.mkdtemp(prefix="asyncrl-bench-"))
    results: list[BenchResult] = []
    try:
        for age in ages:
            _say(f"max_age={age}: starting; measured for {plan.seconds:g} s after the first {WARM_STEPS} steps")
            results.append(measure_age(plan, age, root / f"age-{age}"))
            _say("\n".join(measured_lines(results[-1])))
    finally:
        if arguments.keep:
            _say(f"the runs are kept in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=1), flush=True)
    else:
        print("\n".join([*table(results), "", *advice(results)]), flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="asyncrl bench",
        description="Measures a configuration on this machine with its own task and model: tokens per second, what "
        "each side could do, what bounds the run, what to change and what that would bring, the ages of its tokens, "
        "memory; with --ages at several bounds, and says which one to take. Nothing is written but to a temporary "
        "folder.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("config", nargs="?", help="a YAML file, or the name of one that comes with asyncrl")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file")
    parser.add_argument("--ages", type=int, nargs="+", metavar="A", help="bounds on the policy age (default: its own)")
    parser.add_argument("--generators", type=int, metavar="N", help="as for asyncrl run")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement (default 30)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def measure_age(plan: Plan, age: int, folder: Path) -> BenchResult:
    """Starts one run, measures it, and stops it.

    Raises UserError with the end of its output when it does not start, ends by itself, or makes too few steps.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "asyncrl.cli.main", "run", plan.config, *plan.settings, *OWN_SETTINGS]
    command += [f"run.dir={folder / 'run'}", f"staleness.max_age={age}"]
    command += [] if plan.generators is None else ["--generators", str(plan.generators)]
    log = folder / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        _wait_for_steps(folder / "run", WARM_STEPS, process, log, began + START_TIMEOUT_S)
        ready_s = time.monotonic() - began
        counted, memory_bytes = _watch(folder / "run", process, log, plan.seconds)
    finally:
        _stop(process)
    if len(counted) < 2:
        raise UserError(
            f"max_age={age}: {len(counted)} steps in {LONGEST * plan.seconds:.0f} s; give a larger --seconds, or a "
            "smaller batch"
        )
    return measure(age, counted, ready_s=ready_s, memory_bytes=memory_bytes, advised=advise(folder / "run"))


def _watch(
    run_dir: Path, process: subprocess.Popen[bytes], log: Path, seconds: float
) -> tuple[list[dict[str, Any]], int]:
    """The steps that a run makes from now on, and the most memory that its processes hold, in bytes."""
    begin = time.monotonic()
    memory_bytes, looked_at = 0, -MEMORY_EVERY_S
    seen = len(read_steps(run_dir))
    while True:
        now = time.monotonic()
        if now - looked_at >= MEMORY_EVERY_S:
            memory_bytes, looked_at = max(memory_bytes, memory_of_tree(process.pid)), now
        counted = read_steps(run_dir)[seen:]
        enough = now - begin >= seconds and len(counted) >= FEWEST_STEPS
        if enough or now - begin >= LONGEST * seconds:
            return counted, memory_bytes
        _check_runs(process, log)
        time.sleep(POLL_S)


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of steps that are written by now."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    records = (record for record in iterate_records(path) if record is not None)
    return [record for record in records if record.get("kind") == StepMetrics.kind]


def _wait_for_steps(run_dir: Path, count: int, process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while len(read_steps(run_dir)) < count:
        _check_runs(process, log)
        if time.monotonic() >= deadline:
            raise UserError(f"no {count} steps within {START_TIMEOUT_S:.0f} s; the end of its output:\n{_tail(log)}")
        time.sleep(POLL_S)


def _check_runs(process: subprocess.Popen[bytes], log: Path) -> None:
    if (code := process.poll()) is not None:
        raise UserError(f"the run ended with exit code {code}; the end of its output:\n{_tail(log)}")


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """In good order first, then at once. The supervisor takes its daemons along."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
