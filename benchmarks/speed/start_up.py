"""How long the quickstart takes from its two commands to a ready engine and to its first step, warm and cold.

    python -m benchmarks.speed.start_up [--quick] [--model runs/models/arithmetic]

Learner and generator start at once, as `asyncrl run` starts them, each pinned as configs/quickstart.yaml says. Times
count from the start of the generator's process. The reference is the same pair with an engine that is spawned instead
of forked, and so imports vLLM a second time; all else that start-up has gained is in both. *Cold* runs follow a drop of
the page cache: of all of it where this process may ask for that, and else of the files of the installed packages.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from asyncrl.generator.engines.vllm.engine import VLLMEngine
from asyncrl.generator.engines.vllm.options import EngineOptions
from benchmarks import common

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
SPAWNED = "--generator-with-a-spawned-engine"
TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
# What is awaited, in this order: the name of the part, the file of the run folder, the text that shows it.
MARKS = (
    ("learner listens", "learner.log", r"listening on"),
    ("generator is welcome", "generator.log", r"welcome from"),
    ("engine ready", "generator.log", r"engine ready after"),
    ("first policy proven", "metrics.jsonl", r'"kind": ?"sync"'),
    ("first step", "metrics.jsonl", r'"kind": ?"step"'),
)
CPU = "CPU time of the generator until then"  # what remains of a comparison where others load the machine
ENDS = ("engine ready", CPU, "first step")
BARS = {("warm", "engine ready"): 14, ("warm", "first step"): 20, ("cold", "engine ready"): 40}


def spawned_engine(options: EngineOptions) -> VLLMEngine:
    """An engine that is never forked."""
    return VLLMEngine(dataclasses.replace(options, fork=False))


def run_generator(arguments: Sequence[str]) -> int:
    """`asyncrl-generator` with a spawned engine: the reference."""
    from asyncrl.cli.common import command
    from asyncrl.config import Config

    def start(config: Config) -> int:
        from asyncrl.generator.assembly import serve_generator, take_identity
        from asyncrl.generator.daemon import GeneratorParts

        return serve_generator(config, take_identity(config), GeneratorParts(engine=spawned_engine))

    return command("generator", list(arguments), start)


def drop_page_cache() -> str:
    """Makes the next start read from the disk again; returns what was dropped."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "all of the page cache"
    for path in Path(sys.prefix).rglob("*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "the files of the installed packages"


def start_once(model: Path, spawned: bool) -> dict[str, float]:
    """Starts both daemons, returns when each mark of MARKS was seen, in seconds, and stops them."""
    with tempfile.TemporaryDirectory(prefix="asyncrl-start-up-") as folder:
        run = Path(folder) / "run"
        run.mkdir()
        arguments = [str(CONFIG), f"run.dir={run}", "run.steps=100000", f"model.path={model}"]
        generator = [sys.executable, "-m", "asyncrl.cli.generator"]
        if spawned:
            generator = [sys.executable, "-m", "benchmarks.speed.start_up", SPAWNED]
        learner = [sys.executable, "-m", "asyncrl.cli.learner"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        processes = []
        started = time.perf_counter()
        try:
            for command, log in ((generator, "generator.log"), (learner, "learner.log")):
                with (run / log).open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            [*command, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
                        )
                    )
            return wait_for_marks(run, started, processes)
        finally:
            stop(processes)


def wait_for_marks(run: Path, started: float, processes: Sequence[subprocess.Popen[bytes]]) -> dict[str, float]:
    """Seconds from `started` to each mark."""
    seen: dict[str, float] = {}
    while len(seen) <= len(MARKS):
        now = time.perf_counter() - started
        for name, file, text in MARKS:
            if name not in seen and re.search(text, _text(run / file)):
                seen[name] = now
                if name == "engine ready":
                    seen[CPU] = common.cpu_seconds_of(processes[0].pid)
        if now > TIMEOUT_S or any(process.poll() is not None for process in processes):
            raise RuntimeError(f"after {now:.0f} s there was only {seen}; {_text(run / 'generator.log')[-1000:]}")
        time.sleep(POLL_S)
    return seen


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the generator first, so that it does not wait for a learner."""
    for process in processes:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def measure(report: common.Report, model: Path, kind: str, pairs: int) -> None:
    """Forked and spawned in turn, `pairs` times."""
    report.begin()
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for pair in range(pairs):
        for spawned in (False, True) if pair % 2 == 0 else (True, False):
            if kind == "cold":
                drop_page_cache()
            with common.watch() as watched:
                found[spawned].append(start_once(model, spawned))
            report.watched(watched)
            print(f"{kind}, {'spawned' if spawned else 'forked'}: {found[spawned][-1]}", flush=True)
    for name in dict.fromkeys([name for name, _, _ in MARKS] + [*ENDS]):
        ours, reference = ([run[name] for run in found[spawned]] for spawned in (False, True))
        bar = f"<= {BARS[kind, name]} s" if (kind, name) in BARS else ""
        if name in ENDS:
            report.pairs(f"{kind}: {name}", "s", ours, reference, "spawned engine", bar)
        else:
            report.figure(f"{kind}: {name}", "s", ours)


def main() -> None:
    """Measures warm starts, then cold ones."""
    if sys.argv[1:2] == [SPAWNED]:
        sys.exit(run_generator(sys.argv[2:]))
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, default=Path("runs/models/arithmetic"), help="default: %(default)s")
    parser.add_argument("--warm-only", action="store_true", help="leave the page cache alone")
    options: argparse.Namespace = common.parse(parser)
    model = options.model.resolve()
    report = common.Report("start_up", options)
    start_once(model, spawned=False)  # what is compiled or cached once is no part of a warm start
    measure(report, model, "warm", options.pairs)
    if not options.warm_only:
        report.note(f"cold: dropped {drop_page_cache()}")
        measure(report, model, "cold", max(1, options.pairs // 2))
    report.finish()


if __name__ == "__main__":
    main()
