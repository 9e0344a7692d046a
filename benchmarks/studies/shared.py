"""What the studies share: runs that can be resumed, workers on pinned CPUs, mean and std over seeds, a table, a file.

A study asks what a method learns, not how fast: the unit is a training run (a job), the spread is that over seeds, and
a busy machine makes it late, not wrong. Every finished job is a line of `jobs.jsonl` in the study's folder; the same
study started again takes up what is missing. A job that fails is written down with its error and tried again then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "runs" / "models" / "arithmetic"
WORKER = "benchmarks.studies.delayed_sampling"
JOB_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 30.0
MIN_SEEDS = 3

Job = dict[str, Any]
Record = dict[str, Any]  # {"job": ..., "result": ...} or {"job": ..., "error": ...}
Runner = Callable[[Sequence[Job], "JobLog"], None]


# -- arguments and figures ---------------------------------------------------------------------------------------------


def arguments(description: str, name: str, *, steps: int) -> argparse.ArgumentParser:
    """A parser with what every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short runs: does it run, not what comes out")
    parser.add_argument("--seeds", type=int, default=None, help=f"runs of each kind (default {MIN_SEEDS}; --quick 1)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each run (default %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="base model, made if missing (default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help=f"folder of finished runs (default runs/studies/{name})")
    parser.add_argument(
        "--results", type=Path, default=common.RESULTS, help="folder of JSON and picture (default %(default)s)"
    )
    parser.set_defaults(study=name)
    return parser


def settle(options: argparse.Namespace) -> None:
    """Fills in what depends on other options, and makes the base model if it is not there."""
    if options.seeds is None:
        options.seeds = 1 if options.quick else MIN_SEEDS
    if options.seeds < 1 or options.steps < 1:
        raise SystemExit(f"--seeds {options.seeds} and --steps {options.steps} must be 1 or more")
    if options.out is None:
        options.out = ROOT / "runs" / "studies" / (options.study + (".quick" if options.quick else ""))
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = options.model.resolve()
    if not (options.model / "config.json").exists():
        subprocess.run([ROOT / "bin" / "warmup", "arithmetic", options.model], check=True)


def carry_out(
    options: argparse.Namespace, jobs: Sequence[Job], run: Runner, report: Callable[[Sequence[Job], JobLog], None]
) -> int:
    """Runs what is missing and reports on all of it. Returns the exit code: 1 when a run is missing after all."""
    log = JobLog(options.out)
    run(jobs, log)
    report(jobs, log)
    return 0 if all(log.result_of(job) for job in jobs) else 1


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_std(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {std(values):.3f}" if values else "-"


def means_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each name over the records that have it."""
    names = sorted({name for record in records for name in record})
    return {name: round(mean([record[name] for record in records if name in record]), 6) for name in names}


def thinned(values: Sequence[float], every: int) -> list[float]:
    """The mean of each `every` values; of what is left, the last one."""
    return [round(mean(values[start : start + every]), 5) for start in range(0, len(values), every)]


# -- jobs --------------------------------------------------------------------------------------------------------------


class JobLog:
    """The finished jobs of a study, in a file that survives the study."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "jobs.jsonl"
        self._lock = threading.Lock()
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records: list[Record] = [record for line in lines if (record := _parsed(line)) is not None]
        if lines and not self.path.read_text().endswith("\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a line cut short by a crash stays alone

    def append(self, record: Record) -> None:
        with self._lock, self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            self.records.append(record)

    def result_of(self, job: Job) -> dict[str, Any] | None:
        """What this very job gave, settings and all; None if it has not ended well yet."""
        found = [record["result"] for record in self.records if record["job"] == job and "result" in record]
        return found[-1] if found else None

    def error_of(self, job: Job) -> str | None:
        found = [record["error"] for record in self.records if record["job"] == job and "error" in record]
        return found[-1] if found and self.result_of(job) is None else None


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "job" in record else None


class Progress:
    """Says what has ended, and when all of it will have."""

    def __init__(self, total: int, at_once: int) -> None:
        self._total, self._at_once = total, at_once
        self._ended, self._busy_s = 0, 0.0
        self._lock = threading.Lock()

    def ended(self, job: Job, outcome: str, seconds: float) -> None:
        with self._lock:
            self._ended += 1
            self._busy_s += seconds
            left_s = (self._total - self._ended) * self._busy_s / self._ended / self._at_once
            print(
                f"{self._ended}/{self._total} {shown(job)}: {outcome}, {seconds:.0f} s; "
                f"about {left_s / 60:.0f} min to go",
                flush=True,
            )


def shown(job: Job) -> str:
    return " ".join(f"{name} {job[name]}" for name in ("method", "age", "seed") if name in job)


def run_in_turn(jobs: Sequence[Job], log: JobLog, run: Callable[[Job], dict[str, Any]]) -> None:
    """Runs what the log lacks, one job at a time, in this process."""
    missing = [job for job in jobs if log.result_of(job) is None]
    _announce(jobs, missing)
    progress = Progress(len(missing), 1)
    for job in missing:
        _run_one(job, log, progress, run)


def run_in_workers(jobs: Sequence[Job], log: JobLog, module: str = WORKER) -> None:
    """Runs what the log lacks, one worker process per CPU, on the first two CPUs."""
    missing = [job for job in jobs if log.result_of(job) is None]
    _announce(jobs, missing)
    cpus = sorted(set(common.cpus()))
    progress = Progress(len(missing), len(cpus))
    queue, lock = iter(missing), threading.Lock()
    workers = [Worker(cpu, log.path.parent, module) for cpu in cpus]
    threads = [threading.Thread(target=_feed, args=(worker, queue, lock, log, progress)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _announce(jobs: Sequence[Job], missing: Sequence[Job]) -> None:
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done before", flush=True)


def _feed(worker: Worker, queue: Iterator[Job], lock: threading.Lock, log: JobLog, progress: Progress) -> None:
    """Gives one worker job after job."""
    with contextlib.closing(worker):
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            _run_one(job, log, progress, worker.run)


def _run_one(job: Job, log: JobLog, progress: Progress, run: Callable[[Job], dict[str, Any]]) -> None:
    started = time.perf_counter()
    try:
        result = run(job)
    except Exception as error:  # noqa: BLE001  one failed run must not end the study
        log.append({"job": job, "error": f"{type(error).__name__}: {error}"})
        progress.ended(job, f"FAILED, {type(error).__name__}: {str(error)[-300:]}", time.perf_counter() - started)
        return
    log.append({"job": job, "result": result})
    progress.ended(job, f"accuracy {result['accuracy']:.3f}", time.perf_counter() - started)


class Worker:
    """A process that runs jobs on one CPU; started at the first, and anew when it has died.

    It ends when its stdin does, so that none outlives the study.
    """

    def __init__(self, cpu: int, folder: Path, module: str = WORKER) -> None:
        self._command = [sys.executable, "-m", module, str(cpu)]
        self._log_path = folder / f"worker-{cpu}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: Job) -> dict[str, Any]:
        """Raises RuntimeError when the job failed, the worker died, or the deadline has passed."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._kill()
            raise RuntimeError(f"the worker ended before the job; see {self._log_path}") from None
        if not select.select([process.stdout], [], [], JOB_TIMEOUT_S)[0]:
            self._kill()
            raise RuntimeError(f"no result within {JOB_TIMEOUT_S:.0f} s; the worker was killed")
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            self._kill()
            raise RuntimeError(f"the worker ended in the middle of the job; see {self._log_path}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with self._log_path.open("ab") as log:
            pipe = subprocess.PIPE
            return subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=log, cwd=ROOT, env=environment)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(run: Callable[[Job], dict[str, Any]]) -> None:
    """The worker's side: a job per line in, {"result": ...} or {"error": ...} per line out."""
    # Whatever libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            answer = {"result": run(json.loads(line))}
        except Exception as error:  # noqa: BLE001  the study writes it down and goes on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# -- results -----------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(options: argparse.Namespace, record: dict[str, Any], jobs: Sequence[Job], log: JobLog) -> Path:
    """Writes everything measured to the study's JSON file; returns its path."""
    runs = [
        {**job, "result": log.result_of(job)} if log.result_of(job) else {**job, "error": log.error_of(job)}
        for job in jobs
    ]
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content = {
        "benchmark": options.study,
        "date": time.strftime("%Y-%m-%d"),
        "machine": common.machine(),
        "options": plain,
        **record,
    }
    # A run per line: readable, and a rerun of one of them is a change of one line.
    body = ",\n".join("  " + json.dumps(run) for run in runs)
    text = json.dumps(content, indent=1).removesuffix("\n}") + f',\n "runs": [\n{body}\n ]\n}}\n'
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{file_stem(options)}.json"
    path.write_text(without_folders(text, options))
    print(f"written to {path}")
    return path


def without_folders(text: str, options: argparse.Namespace) -> str:
    """Paths as they are from the root of the repository: where that lies on this machine is no part of a result."""
    return text.replace(f"{ROOT}/", "").replace(f"{options.model.parent}/", "")


def file_stem(options: argparse.Namespace) -> str:
    return options.study + (".quick" if options.quick else "")


def notes(options: argparse.Namespace, jobs: Sequence[Job], log: JobLog) -> list[str]:
    """What keeps the figures from being a result."""
    failed = [shown(job) for job in jobs if log.result_of(job) is None]
    found = []
    if options.quick:
        found.append("--quick: runs too few and too short for a result")
    elif options.seeds < MIN_SEEDS:
        found.append(f"{options.seeds} seeds: fewer than {MIN_SEEDS}, not a result")
    if failed:
        found.append(f"{len(failed)} of {len(jobs)} runs failed and are missing: {'; '.join(failed[:6])}")
    return found
