"""Everything about this project that only a GPU can show, in a few minutes, on a bare machine with one card.

    python -m benchmarks.gpu.check --out gpu_check.json                   # on a GPU: 8 minutes at most
    python -m benchmarks.gpu.check --device cpu --tiny --out check.json   # a rehearsal without one

Nothing is downloaded: models have random weights in the shapes of Qwen3 0.6B and 4B. Each section is a process with a
deadline of its own, so that one that fails, hangs or kills its GPU context costs its own figures alone. A section whose
packages are missing is left out and says so: the learner's need torch, transformers and omegaconf, the others vLLM and
pyzmq too. The JSON file is written again after each section: it is complete whenever the machine is taken away. Exit
code 0: no section failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import ROOT, Request

KILL_AFTER_S = 20.0
MIN_SECONDS = 10.0  # less time left than this: a section is not begun
ERROR_CHARACTERS = 8000
TORCH = ("torch", "transformers", "omegaconf", "msgpack")
VLLM = (*TORCH, "vllm", "zmq")


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """One line of the plan: `what` of benchmarks.gpu.sections, and the packages without which it is left out."""

    name: str
    what: str
    seconds: float
    needs: tuple[str, ...] = TORCH
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def learner(shape: str, length: int, micro_batch_tokens: int, checkpointing: str, seconds: float) -> Section:
    """Training steps of 65,536 tokens."""
    settings = {
        "shape": shape,
        "length": length,
        "batch_tokens": 65536,
        "micro_batch_tokens": micro_batch_tokens,
        "checkpointing": checkpointing,
    }
    return Section(f"learner {shape} {length}", "learner", seconds, TORCH, settings)


# In the order of what is most wanted, should the time not do for all.
PLAN = (
    Section("environment", "environment", 40, ("torch",)),
    learner("0.6B", 2048, 16384, "none", 70),
    Section("numerics 0.6B", "numerics", 40, TORCH, {"shape": "0.6B", "length": 256}),
    Section("run 0.6B", "run", 110, VLLM, {"shape": "0.6B", "length": 128, "steps": 20}),
    learner("0.6B", 16384, 16384, "none", 50),
    learner("4B", 2048, 8192, "selective", 110),
    learner("4B", 16384, 16384, "full", 80),
    Section("run 4B", "run", 120, VLLM, {"shape": "4B", "length": 128, "steps": 4, "gpu_memory_fraction": 0.2}),
    Section("engine tests", "engine_tests", 150, (*VLLM, "pytest"), {"shape": "0.6B"}),
)


def tiny(section: Section) -> Section:
    """The same section at a size for one CPU core."""
    settings = {
        name: value for name, value in section.settings.items() if name in ("checkpointing", "gpu_memory_fraction")
    }
    settings |= {"shape": "tiny", "length": 64, "steps": 3}
    return dataclasses.replace(section, seconds=240, settings=settings)


def run_section(section: Section, folder: Path, device: str, seconds: float) -> dict[str, Any]:
    """Status, seconds, figures, and the end of what was printed if it failed."""
    missing = [package for package in section.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"status": "left out", "why": f"no {', '.join(missing)} here"}
    if seconds < MIN_SECONDS:
        return {"status": "left out", "why": f"{seconds:.0f} s left"}
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    request = Request(str(result), str(folder), device, seconds, **section.settings)
    command = command_of(section, request)
    # On CPUs one thread, which never spins: a rehearsal runs beside other work. On a GPU the host's cores are free.
    environment = os.environ | ({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} if device == "cpu" else {})
    started = time.monotonic()
    with (folder / "output").open("w+b") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        status = wait(process, seconds)
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1), "figures": {}}
    with contextlib.suppress(OSError, ValueError):
        found["figures"] = json.loads(result.read_text())
    if status != "ok":
        found["end_of_output"] = (folder / "output").read_text(errors="replace")[-ERROR_CHARACTERS:]
    return found


def command_of(section: Section, request: Request) -> list[str]:
    """What is started for a section."""
    return [sys.executable, "-m", "benchmarks.gpu.sections", section.what, json.dumps(dataclasses.asdict(request))]


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How the section ended; a section that knows its time ends by itself, and KILL_AFTER_S later it is killed."""
    try:
        code = process.wait(seconds + KILL_AFTER_S)
        status = "ok" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"not done after {seconds + KILL_AFTER_S:.0f} s"
    with contextlib.suppress(ProcessLookupError):  # also what a section left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def main() -> int:
    """Runs the plan; the number of sections that failed decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 100,000 parameters: does everything run?")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together (default %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections whose names begin with one of these")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default %(default)s")
    options = parser.parse_args()
    plan = [tiny(section) if options.tiny else section for section in PLAN]
    if options.only:
        plan = [section for section in plan if section.name.startswith(tuple(options.only))]
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"device": options.device, "tiny": options.tiny, "sections": {}}
    with tempfile.TemporaryDirectory(prefix="asyncrl-gpu-") as folder:
        for section in plan:
            seconds = min(section.seconds, deadline - time.monotonic() - KILL_AFTER_S)
            found = run_section(section, Path(folder), options.device, seconds)
            report["sections"][section.name] = found
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{section.name}: {found['status']} {found.get('why', '')} ({found.get('seconds', 0)} s)", flush=True)
    failed = [name for name, found in report["sections"].items() if found["status"] not in ("ok", "left out")]
    print(f"{len(failed)} of {len(plan)} sections failed; written to {options.out}")
    return min(1, len(failed))


if __name__ == "__main__":
    sys.exit(main())
