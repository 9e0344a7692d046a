"""Starts the processes of a crash loop, kills them at random instants, and starts them again at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.crash_loops.audit import archive_segments
from benchmarks.faults.crash_loops.ledger import Ledger
from benchmarks.faults.crash_loops.pace import Pace
from benchmarks.faults.crash_loops.settings import settings_of

ROOT = Path(__file__).parents[3]
LEARNER, TRAINER = "learner", "trainer"
END_TIMEOUT_S = 10.0
POLL_S = 0.02


class LoopError(RuntimeError):
    """A process ended by itself, or what was waited for did not come."""


@dataclass(slots=True)
class Process:
    """One process of the loop, in its present life."""

    name: str
    popen: subprocess.Popen[bytes]


class Killer:
    """The learner, with its trainer, and generators. Kills and starts are noted in FOLDER/ledgers/kills."""

    def __init__(self, folder: Path, commands: dict[str, list[str]], seed: int) -> None:
        """`commands`: what is started under each name; LEARNER is one of them."""
        self.folder = folder
        self._commands = commands
        self._pace = Pace(folder, settings_of(folder), tuple(name for name in commands if name != LEARNER))
        self._chance = random.Random(seed)
        self._processes: dict[str, Process] = {}
        (folder / "logs").mkdir(exist_ok=True)
        self._ledger = Ledger(folder / "ledgers" / "kills")

    def start_all(self) -> None:
        """Starts what does not run."""
        for name in self._commands:
            if name not in self._processes:
                self._start(name)

    def _start(self, name: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start compiles all modules: half of its time
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._ledger.write("start", name, f"{time.monotonic():.6f}")
            popen = subprocess.Popen(
                self._commands[name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self._processes[name] = Process(name, popen)

    def kill(self, name: str) -> None:
        """SIGKILL; the kernel takes the trainer along with the learner."""
        if name == TRAINER:
            self._kill_trainer()
            return
        process = self._processes.pop(name)
        process.popen.kill()
        self._ledger.write("kill", name, f"{time.monotonic():.6f}")
        process.popen.wait(END_TIMEOUT_S)

    def _kill_trainer(self) -> None:
        for pid in _children(self._processes[LEARNER].popen.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just gone by itself
                if b"trainer" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    continue  # the task's helper
                os.kill(pid, signal.SIGKILL)
                self._ledger.write("kill", TRAINER, f"{time.monotonic():.6f}")

    def run(self, seconds: float, mean_pause_s: float, weights: dict[str, float]) -> bool:
        """Kills and starts for so many seconds, or until the learner has ended by itself: then it returns True.

        The run's pace says when a kill may come; it comes at a random instant after that.
        """
        until = time.monotonic() + seconds
        archived_at, waits_since = 0.0, time.monotonic()
        kill_at: float | None = None
        while (now := time.monotonic()) < until:
            if self.finished():
                return True
            self._raise_if_ended()
            if now >= archived_at + 1.0:
                archive_segments(self.folder / "run" / "journal", self.folder / "archive")
                archived_at = now
            if kill_at is None and self._pace.may_kill(now - waits_since):
                kill_at = now + min(self._chance.expovariate(1 / mean_pause_s), 5 * mean_pause_s)
            if kill_at is not None and now >= kill_at:
                self.kill(self._chance.choices(list(weights), list(weights.values()))[0])
                self.start_all()
                kill_at, waits_since = None, now
            time.sleep(POLL_S)
        return self.finished()

    def finished(self) -> bool:
        """Whether the learner ended by itself, with success: then the run is over."""
        process = self._processes.get(LEARNER)
        return process is not None and process.popen.poll() == 0

    def _raise_if_ended(self) -> None:
        for name, process in list(self._processes.items()):
            code = process.popen.poll()
            if code is None:
                continue
            if name != LEARNER and code in (0, 3, 4):
                del self._processes[name]
                self.start_all()  # it left by itself: a fenced name, or a learner that was away for long
                continue
            raise LoopError(f"{name} ended with exit code {code}:\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """The end of a process's log."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")[-3000:]

    def stop_all(self) -> None:
        """Kills whatever runs; it can be started again on the same folder."""
        archive = self.folder / "run" / "journal"
        if archive.is_dir():
            archive_segments(archive, self.folder / "archive")
        for name in list(self._processes):
            process = self._processes.pop(name)
            self._ledger.write("stop", name, f"{time.monotonic():.6f}")
            process.popen.kill()
            process.popen.wait(END_TIMEOUT_S)


def kills_of(folder: Path) -> dict[str, int]:
    """How often each process was killed, from the killer's ledger."""
    lines = (folder / "ledgers" / "kills").read_text().splitlines()
    return dict(sorted(Counter(line.split()[1] for line in lines if line.startswith("kill ")).items()))


def python(module: str, *arguments: object) -> list[str]:
    """The command that runs a module of this repository."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def _children(pid: int) -> list[int]:
    """Direct children of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
