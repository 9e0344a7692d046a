"""`asyncrl bench CONFIG`: how fast a configuration is on this machine, what bounds it, which max_age it should have.

For each bound on the policy age a run of its own is started as `asyncrl run` starts it, in a temporary folder, measured
once its rates are steady, and killed: nothing of it is kept. All runs begin with the weights of model.path, so that the
policy of each is as old as that of the others. Evaluations and periodic checkpoints are off meanwhile. The time that is
given is divided among the bounds, their starts included.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from asyncrl.cli.common import Parser, is_configuration, shipped_or_given
from asyncrl.cli.measuring.bench_figures import BenchResult, Circumstances, measure, needed_warm_steps
from asyncrl.cli.measuring.bench_pages import fresh_figures, window_between
from asyncrl.cli.measuring.bench_words import advice, changes, measured_lines, table, taken
from asyncrl.errors import ConfigError, UserError
from asyncrl.host.process_tree import memory_by_branch
from asyncrl.metrics import METRICS_FILE
from asyncrl.report.run_records import RunRecords, StepRecord
from asyncrl.simulator.advice import advise

EXAMPLE = "asyncrl bench configs/quickstart.yaml --ages 0 1 2 4"
WITHIN_S = 220.0
ADVICE_S = 15.0  # of that, to simulate what other settings would bring
LONGEST_WINDOW_S = 45.0  # more says little that is new
SHORTEST_WINDOW_S = 5.0
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0
POLL_S = 0.25
MEMORY_EVERY_S = 1.0
FEWEST_STEPS = 2  # of a measurement; it goes on for them beyond its time
LONGEST = 4.0  # times its time
LEARNER = "asyncrl.cli.learner"  # in its command line
OWN_SETTINGS = (
    "run.steps=1000000",
    "eval.prompts=0",
    "checkpoint.every=0",
    "log.wandb=off",
    "transport.address=auto",
    "learner.http=auto",
    "generator.http=auto",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: the configuration, and how long each measurement takes; None: what is left of the time."""

    config: str
    settings: tuple[str, ...]
    generators: int | None
    seconds: float | None


@dataclass(slots=True)
class Budget:
    """Divides the time until ends_at among the runs that are left, for each of which starting takes time too."""

    ends_at: float
    runs_left: int
    starts_s: list[float] = field(default_factory=list)

    def started(self, took_s: float) -> None:
        """A run has made its first step after so long."""
        self.starts_s.append(took_s)

    def window_s(self, now: float) -> float:
        """How long the run that has just started may be measured, its warm-up included."""
        others_s = (self.runs_left - 1) * max(self.starts_s)
        return min(LONGEST_WINDOW_S, max(SHORTEST_WINDOW_S, (self.ends_at - now - others_s) / self.runs_left))


def bench(argv: Sequence[str]) -> int:
    """Runs the command; returns 0. Raises UserError when a run does not start or makes no steps."""
    arguments = _parser().parse_intermixed_args(argv)
    if not is_configuration(arguments.config):
        raise ConfigError(f"give a configuration file, for example: {EXAMPLE}")
    for name in ("seconds", "within"):
        if (given := getattr(arguments, name)) is not None and not given > 0:
            raise ConfigError(f"--{name} {given:g}: give more than 0")
    path = shipped_or_given(arguments.config)
    ages = _checked_ages(path, arguments.overrides, arguments.ages)
    plan = Plan(path, tuple(arguments.overrides), arguments.generators, arguments.seconds)
    budget = Budget(time.monotonic() + arguments.within - ADVICE_S, len(ages))
    root = Path(tempfile.mkdtemp(prefix="asyncrl-bench-"))
    results: list[BenchResult] = []
    try:
        for number, age in enumerate(ages, 1):
            _say(f"max_age={age}: a run starts ({number} of {len(ages)})")
            results.append(measure_age(plan, budget, age, root / f"age-{age}"))
            budget.runs_left -= 1
            lines = "\n".join(measured_lines(results[-1]))
            _say(lines) if arguments.json else print(lines, flush=True)
        chosen = results.index(taken(results))
        advised = advise(root / f"age-{results[chosen].max_age}" / "run", within_s=ADVICE_S)
        results[chosen] = replace(results[chosen], advised=advised)
    finally:
        if arguments.keep:
            _say(f"the runs are kept in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=1), flush=True)
    elif len(results) > 1:
        print("\n".join(["", *table(results), "", *advice(results), *changes(results[chosen])]), flush=True)
    else:
        print("\n".join(changes(results[chosen])), flush=True)
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
    parser.add_argument(
        "--within", type=float, default=WITHIN_S, metavar="S", help="seconds for everything (default %(default)g)"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="of each measurement, whatever --within says")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser


def _checked_ages(path: str, overrides: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """The bounds to measure. Raises ConfigError for a mistake in the configuration before anything starts."""
    from asyncrl.config.loading import load_config

    ages = list(dict.fromkeys(given or [load_config(path, overrides).staleness.max_age]))
    for age in ages:
        load_config(path, [*overrides, *OWN_SETTINGS, f"staleness.max_age={age}"])
    return ages


class _MeasuredRun:
    """One run in a folder of its own, and the most memory its processes were seen to hold."""

    def __init__(self, plan: Plan, age: int, folder: Path) -> None:
        folder.mkdir()
        self.run_dir = folder / "run"
        self.learner_bytes = self.generator_bytes = 0
        self._log = folder / "output"
        self._looked_at = -MEMORY_EVERY_S
        self._records: RunRecords | None = None
        command = [sys.executable, "-m", "asyncrl.cli.main", "run", plan.config, *plan.settings, *OWN_SETTINGS]
        command += [f"run.dir={self.run_dir}", f"staleness.max_age={age}"]
        command += [] if plan.generators is None else ["--generators", str(plan.generators)]
        # Compiled modules of the task would be left in the user's folder.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
            )

    def steps(self) -> list[StepRecord]:
        """The steps that are written by now."""
        if self._records is not None:
            self._records.read_on()
        elif (self.run_dir / METRICS_FILE).exists():
            self._records = RunRecords(self.run_dir, follow=True)
        return [] if self._records is None else self._records.steps

    def wait_for_steps(self, count: int, deadline: float) -> bool:
        """Whether so many steps were made before the deadline."""
        while len(self.steps()) < count:
            if time.monotonic() >= deadline:
                return False
            self.turn()
        return True

    def turn(self) -> None:
        """Waits a little, and looks at memory. Raises UserError when the run has ended."""
        self.check()
        if time.monotonic() - self._looked_at >= MEMORY_EVERY_S:
            self._looked_at = time.monotonic()
            held = memory_by_branch(self._process.pid)
            learner = sum(amount for command, amount in held.items() if LEARNER in command)
            others = sum(amount for command, amount in held.items() if command and LEARNER not in command)
            self.learner_bytes = max(self.learner_bytes, learner)
            self.generator_bytes = max(self.generator_bytes, others)
        time.sleep(POLL_S)

    def check(self) -> None:
        """Raises UserError with the end of its output when the run has ended."""
        if (code := self._process.poll()) is not None:
            raise UserError(f"the run ended with exit code {code}; the end of its output:\n{self.last_words()}")

    def last_words(self, lines: int = 25) -> str:
        """The end of its output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ends it without saving. The supervisor takes its daemons along."""
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S if number == signal.SIGKILL else POLL_S)


def measure_age(plan: Plan, budget: Budget, age: int, folder: Path) -> BenchResult:
    """Starts one run, measures it, and ends it.

    Raises UserError with the end of its output when it does not start, ends by itself, or makes too few steps.
    """
    began = time.monotonic()
    run = _MeasuredRun(plan, age, folder)
    try:
        if not run.wait_for_steps(1, began + START_TIMEOUT_S):
            raise UserError(f"no step within {START_TIMEOUT_S:.0f} s; the end of its output:\n{run.last_words()}")
        ready_s = time.monotonic() - began
        budget.started(ready_s)
        warm_s = plan.seconds or budget.window_s(time.monotonic()) / 2
        run.wait_for_steps(needed_warm_steps(age), time.monotonic() + warm_s)
        before = fresh_figures(run.run_dir, run.check)
        warm_steps = len(run.steps())
        window_s = plan.seconds or budget.window_s(time.monotonic())
        counted = _watch(run, warm_steps, window_s)
        generators = window_between(before, fresh_figures(run.run_dir, run.check))
    finally:
        run.stop()
    if len(counted) < FEWEST_STEPS:
        raise UserError(
            f"max_age={age}: {len(counted)} steps in {LONGEST * window_s:.0f} s; give a larger --within or --seconds, "
            "or a smaller batch"
        )
    if generators is None:
        raise UserError(f"max_age={age}: a generator began anew while it was measured:\n{run.last_words()}")
    memory = {"learner_bytes": run.learner_bytes, "generator_bytes": run.generator_bytes}
    return measure(counted, generators, Circumstances(max_age=age, ready_s=ready_s, warm_steps=warm_steps, **memory))


def _watch(run: _MeasuredRun, seen: int, seconds: float) -> list[StepRecord]:
    """The steps that a run makes from now on."""
    begin = time.monotonic()
    while True:
        counted = run.steps()[seen:]
        passed_s = time.monotonic() - begin
        if (passed_s >= seconds and len(counted) >= FEWEST_STEPS) or passed_s >= LONGEST * seconds:
            return counted
        run.turn()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
