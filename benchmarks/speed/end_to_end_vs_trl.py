"""Completion tokens per second, sampled and trained on: `asyncrl run` against TRL's GRPOTrainer with its best engine.

    python -m benchmarks.speed.end_to_end_vs_trl [--quick] [--peers FOLDER]

Both sides have the same two cores, model, prompts, reward, law of lengths and number of completions per step. TRL
trains by GRPOTrainer.train() in an environment of its own, and stands still while asyncrl runs; before the pairs each
of its engines that runs here is tried, and the fastest is kept. asyncrl is the command `asyncrl run` with nothing
pinned and nothing set but the task: what it picks for itself is measured. Start-up counts on neither side, and of a run
of asyncrl the first steps are left out, until the rollouts in flight are those of a run under way.

Lengths: all alike (the model never ends by itself), or lognormal with sigma 1, cut at seven times their mean (the
model's first token names the length). The learning rate is so small that neither law changes in the run.

Tokens per second of wall time are the result. Tokens per CPU second stand beside it: they tell what the sides cost
where other processes take part of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.metrics import METRICS_FILE, read_records
from benchmarks import common
from benchmarks.speed.learner_vs_trl import CAP_IN_MEANS, GROUP_SIZE, LR, PROMPT_TOKENS, WORKER, closing
from benchmarks.speed.models import SIZES, make_counting_model, make_model
from benchmarks.speed.peer_environment import DEFAULT_FOLDER, Side, peer_python, side_environment
from benchmarks.speed.peer_lengths import LAWS, lognormal_shares
from benchmarks.speed.peer_task import prompt

BARS = {"equal": ">= 1.6", "lognormal": ">= 3"}
ENGINES = ("transformers", "continuous", "vllm")
FIRST_STEPS = 3  # of a run of asyncrl, left out
RUN_TIMEOUT_S, STOP_TIMEOUT_S = 1200.0, 30.0
COMMAND = (sys.executable, "-m", "asyncrl.cli.main")
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides do."""

    folder: Path
    model: Path
    law: str
    mean_tokens: int
    longest: int
    completions: int
    threads: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Completion tokens of some steps, and what they took."""

    tokens: float
    seconds: float
    cpu_seconds: float
    generate_seconds: float = 0.0  # TRL's, which samples and trains one after the other
    idle: tuple[float, float] = (0.0, 0.0)  # asyncrl's learner's and generator's idle shares


def start_trl(case: Case, peers: Path, engine: str, rows: int) -> Side:
    """TRL's side, ready for its first step."""
    spec = {
        "model": str(case.model),
        "threads": case.threads,
        "dtype": "float32",
        "attention": "sdpa",
        "rows": rows,
        "completions": case.completions,
        "group_size": GROUP_SIZE,
        "max_new_tokens": case.longest,
        "max_length": PROMPT_TOKENS + case.longest,
        "lr": LR,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "engine": engine,
        "prompts": [prompt(index, PROMPT_TOKENS, case.vocab) for index in range(4096)],
        "output": str(case.folder / "trl"),
    }
    path = case.folder / "trl.json"
    path.write_text(json.dumps(spec))
    side = Side([peer_python(peers), WORKER, path], case.folder / f"trl-{engine}.log", case.threads)
    try:
        side.answer()
    except RuntimeError:
        side.close()
        raise
    return side


def trl_steps(side: Side, steps: int) -> Rate:
    """So many steps of TRL."""
    answers = [side.ask() for _ in range(steps)]
    total = {key: sum(answer[key] for answer in answers) for key in answers[0]}
    return Rate(total["tokens"], total["seconds"], total["cpu_seconds"], total["generate_seconds"])


def asyncrl_run(case: Case, steps: int, settings: list[str]) -> Rate:
    """One run of `asyncrl run`, from the step after FIRST_STEPS to its end."""
    with tempfile.TemporaryDirectory(dir=case.folder) as name:
        run_dir = Path(name) / "run"
        overrides = [
            "run.name=benchmark",
            f"run.dir={run_dir}",
            "run.steps=100000",  # it is ended from here: the last steps of a run have fewer rollouts in flight
            f"model.path={case.model}",
            f"model.max_length={PROMPT_TOKENS + case.longest}",
            "task.path=benchmarks.speed.peer_task:Parity",
            f"task.args={{tokens: {PROMPT_TOKENS}, vocab: {case.vocab}}}",
            f"sampling.group_size={GROUP_SIZE}",
            f"sampling.max_new_tokens={case.longest}",
            f"learner.groups_per_step={case.completions // GROUP_SIZE}",
            f"learner.lr={LR}",
            "learner.device=cpu",
            "generator.device=cpu",
            "eval.every=0",
            "checkpoint.every=0",
            *settings,
        ]
        config = Path(name) / "config.yaml"
        config.write_text("{}\n")
        log = case.folder / "asyncrl.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, "run", config, *overrides],
                stdout=output,
                stderr=output,
                env=side_environment(1) | {"PYTHONPATH": os.getcwd()},
            )
        try:
            return _watched(process, run_dir, log, steps)
        finally:
            _end(process)


def _watched(process: subprocess.Popen[bytes], run_dir: Path, log: Path, steps: int) -> Rate:
    """The rate between two steps of the run, by the clock of its metrics and the CPU time of all its processes."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    cpu_at: dict[int, float] = {}
    path, seen = run_dir / METRICS_FILE, 0
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        # A look at the records costs CPU that is the run's: only when there are new ones.
        size = path.stat().st_size if path.exists() else 0
        if size == seen:
            time.sleep(POLL_S)
            continue
        seen = size
        taken = [record for record in read_records(path)[0] if record["kind"] == "step"]
        for wanted in (FIRST_STEPS, FIRST_STEPS + steps):
            if len(taken) >= wanted and wanted not in cpu_at:
                cpu_at[wanted] = common.cpu_seconds_of(process.pid)
        if len(cpu_at) == 2:
            counted = taken[FIRST_STEPS : FIRST_STEPS + steps]
            seconds = _total(counted, "interval_s")
            idle, busy = _total(counted, "generator_idle_s"), _total(counted, "generator_busy_s")
            return Rate(
                _total(counted, "tokens_trained"),
                seconds,
                cpu_at[FIRST_STEPS + steps] - cpu_at[FIRST_STEPS],
                idle=(_total(counted, "learner_idle_s") / seconds, idle / max(idle + busy, 1e-9)),
            )
    raise RuntimeError(f"asyncrl run did not come to step {FIRST_STEPS + steps}:\n{log.read_text()[-3000:]}")


def _total(records: list[dict[str, Any]], name: str) -> float:
    """The sum of a figure, which a step that saw no beat of a generator may lack."""
    return float(sum(record[name] or 0.0 for record in records))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Twice: the second signal ends it at once."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S / 2)
    if process.poll() is None:
        process.kill()
        process.wait()


def best_engine(case: Case, options: argparse.Namespace) -> tuple[str, int, dict[str, str]]:
    """(engine, rows of a pass) with TRL's fastest step; and what became of each that was tried."""
    if len(options.engines) == len(options.rows) == 1:
        return options.engines[0], options.rows[0], {}
    found: dict[str, str] = {}
    rates: dict[tuple[str, int], float] = {}
    for engine in options.engines:
        for rows in options.rows:
            try:
                with closing(start_trl(case, options.peers, engine, rows)) as side:
                    trl_steps(side, 1)  # the first step allocates and compiles
                    rate = trl_steps(side, options.trial_steps)
                rates[engine, rows] = rate.tokens / rate.seconds
                found[f"{engine}, {rows} rows"] = f"{rates[engine, rows]:.0f} tokens/s"
            except (RuntimeError, subprocess.CalledProcessError) as error:
                found[f"{engine}, {rows} rows"] = f"does not run here: {str(error).strip().splitlines()[-1][:200]}"
            print(f"TRL, {engine}, {rows} rows a pass: {found[f'{engine}, {rows} rows']}", flush=True)
    engine, rows = max(rates, key=lambda key: rates[key])
    return engine, rows, found


def measure(law: str, options: argparse.Namespace, report: common.Report) -> None:
    """All pairs of one law of lengths."""
    longest = options.mean_tokens * (1 if law == "equal" else CAP_IN_MEANS)
    vocab = SIZES[options.size].vocab
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if law == "equal":
            model = make_model(folder / "model", options.size)
        else:
            shares = lognormal_shares(mean=options.mean_tokens, cap=longest)
            model = make_counting_model(folder / "model", options.size, shares)
        case = Case(folder, model, law, options.mean_tokens, longest, options.completions, options.threads, vocab)
        engine, rows, tried = best_engine(case, options)
        ours: list[Rate] = []
        theirs: list[Rate] = []
        report.begin()
        with closing(start_trl(case, options.peers, engine, rows)) as side:
            trl_steps(side, 1)
            for pair in range(options.pairs):
                with common.watch() as watch:
                    ours.append(asyncrl_run(case, options.steps, options.settings))
                    theirs.append(trl_steps(side, options.trl_steps))
                report.watched(watch)
                say(pair, ours[-1], theirs[-1])
    what = f"{options.size}, {options.completions} completions a step, {law} lengths"
    tokens = [[rate.tokens / rate.seconds for rate in rates] for rates in (ours, theirs)]
    report.pairs(what, "tokens/s", *tokens, f"TRL, {engine}", BARS[law])
    tokens = [[rate.tokens / rate.cpu_seconds for rate in rates] for rates in (ours, theirs)]
    report.pairs(what, "tokens per CPU second", *tokens, f"TRL, {engine}")
    report.figure(f"{law}: TRL's share of sampling", "", [rate.generate_seconds / rate.seconds for rate in theirs])
    for index, side_name in enumerate(("learner", "generator")):
        report.figure(f"{law}: idle share of asyncrl's {side_name}", "", [rate.idle[index] for rate in ours])
    if tried:
        report.note(f"TRL's engines, as tried with {law} lengths: {tried}")


def say(pair: int, ours: Rate, theirs: Rate) -> None:
    """One line per pair, for whoever waits."""
    wall = [rate.tokens / rate.seconds for rate in (ours, theirs)]
    cpu = [rate.tokens / rate.cpu_seconds for rate in (ours, theirs)]
    print(
        f"pair {pair + 1}: asyncrl {wall[0]:,.0f} and TRL {wall[1]:,.0f} tokens/s, ratio {wall[0] / wall[1]:.2f}; "
        f"by CPU time {cpu[0]:,.0f} and {cpu[1]:,.0f}, ratio {cpu[0] / cpu[1]:.2f}; "
        f"idle: learner {ours.idle[0]:.0%}, generator {ours.idle[1]:.0%}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> int:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="where TRL is installed (%(default)s)")
    parser.add_argument("--size", choices=SIZES, default="10M", help="model (default %(default)s)")
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS), help="laws of completion lengths")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="TRL's, tried")
    parser.add_argument("--rows", nargs="+", type=int, default=[8], help="TRL's rows of a training pass, tried")
    parser.add_argument("--completions", type=int, default=64, help="of one step (default %(default)s)")
    parser.add_argument("--mean-tokens", type=int, default=64, help="mean length; lognormal ones are cut at 7 of it")
    parser.add_argument("--threads", type=int, default=2, help="of TRL (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of asyncrl in one pair, after the first few")
    parser.add_argument("--trl-steps", type=int, default=3, help="of TRL in one pair")
    parser.add_argument("--trial-steps", type=int, default=2, help="of each engine of TRL, to find the best")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="configuration of asyncrl's side, on top")
    options = common.parse(parser)
    if options.quick:
        options.size, options.completions, options.mean_tokens, options.engines = "0.8M", 16, 16, ["transformers"]
        options.pairs, options.steps, options.trl_steps, options.trial_steps = 1, 4, 1, 1
    report = common.Report("end_to_end_vs_trl", options)
    for law in options.laws:
        measure(law, options, report)
    report.note(f"load average at the end: {os.getloadavg()}")
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
