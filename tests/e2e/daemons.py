"""The two commands as processes: started, watched, signalled and ended by tests.

Every process carries a mark in its environment, which children inherit, so that a test can tell what was left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from asyncrl.metrics import METRICS_FILE, read_records
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import GroupFiltered, PromptGivenUp, Record, StepTaken, StoredGroup

HERE = Path(__file__).parent
COMMANDS = Path(sys.executable).parent
MARK = "ASYNCRL_TEST_MARK"
POLL_S = 0.05
START_S = 240.0  # an engine's start, on a busy machine
STEP_S = 120.0  # progress that takes a second or two on a quiet machine
EXIT_S = 60.0

T = TypeVar("T")


class Daemon:
    """One daemon process. stdout and stderr go to files."""

    def __init__(self, command: list[str], folder: Path, name: str, environment: dict[str, str]):
        self.name = name
        self.out_path, self.err_path = folder / f"{name}.out", folder / f"{name}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            # Its own session, so that a test can signal the whole process group and not itself.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=HERE,  # where the task module lies: modules of the current directory can be imported
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def stdout(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.err_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def signal_group(self, number: signal.Signals) -> None:
        """As a terminal does on Ctrl-C, or an init system on stop: every process of the group gets it."""
        os.killpg(self.pid, number)

    def exit_code(self, timeout_s: float = EXIT_S) -> int:
        """Waits for the end."""
        wait_until(lambda: not self.running, timeout_s, f"the end of {self.name}", [self])
        return self.process.wait()

    def wait_for_log(self, text: str, timeout_s: float = STEP_S) -> None:
        wait_until(lambda: text in self.stderr, timeout_s, f"{text!r} in the log of {self.name}", [self])

    def last_words(self) -> str:
        return f"--- {self.name} (exit code {self.process.poll()})\n{self.stdout[-1500:]}\n{self.stderr[-4000:]}"


def wait_until(condition: Callable[[], T], timeout_s: float, what: str, daemons: list[Daemon] | None = None) -> T:
    """Polls until `condition` is true and returns its value.

    Fails with the daemons' logs at the deadline, or at once when one of them has ended without making it true.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        # In this order: what a daemon did last still counts.
        dead = [daemon.name for daemon in daemons or [] if not daemon.running]
        if value := condition():
            return value
        if dead or time.monotonic() >= deadline:
            words = "\n".join(daemon.last_words() for daemon in daemons or [])
            why = f"{', '.join(dead)} ended before" if dead else f"not within {timeout_s:.0f} s:"
            raise AssertionError(f"{why} {what}\n{words}")
        time.sleep(POLL_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def base_config(model_dir: Path, run_dir: Path) -> dict[str, Any]:
    """A run of seconds: a model of 100,000 parameters, groups of 4, steps of 4 groups."""
    return {
        "run": {"name": "e2e", "dir": str(run_dir), "steps": 8, "seed": 7},
        "model": {"path": str(model_dir), "max_length": 64},
        "task": {"path": "letters_task:Letters"},
        "sampling": {"group_size": 4, "max_new_tokens": 12},
        "learner": {"groups_per_step": 4, "lr": 1e-3, "micro_batch_tokens": 1024, "device": "cpu"},
        "staleness": {"max_age": 2},
        "generator": {
            "max_sequences": 16,
            "kv_cache_gib": 0.0625,
            "compile": "never",
            "device": "cpu",
            "reward_timeout_s": 5.0,
            "lease_timeout_s": 60.0,
        },
        "transport": {"address": f"tcp://127.0.0.1:{free_port()}"},
        "eval": {"prompts": 4},
        "checkpoint": {"every": 3},
    }


class Run:
    """One run folder, its configuration file, and the daemons that work on it."""

    def __init__(self, folder: Path, model_dir: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        self.config = base_config(model_dir, self.run_dir)
        self.config_file = folder / "run.yaml"
        self.daemons: list[Daemon] = []
        self.pages: dict[str, str] = {}  # answers of the daemons over HTTP that a test keeps
        self.moments: dict[str, float] = {}  # by the clock of the calendar, that a test keeps
        self.mark = uuid.uuid4().hex
        self._started = 0

    def configure(self, **sections: dict[str, Any]) -> Run:
        for name, values in sections.items():
            self.config.setdefault(name, {}).update(values)
        return self

    def start(self, role: str, *overrides: str, inside: tuple[str, ...] = ()) -> Daemon:
        """Starts one daemon by its console command; `inside` is a command that executes another, such as `ip netns`."""
        return self.start_command(role, [*inside, str(COMMANDS / f"asyncrl-{role}")], *overrides)

    def one_host(self, *overrides: str) -> Daemon:
        """Starts learner and generators as one, by `asyncrl run`."""
        return self.start_command("run", [sys.executable, "-m", "asyncrl.cli.main", "run"], *overrides)

    def start_command(self, name: str, command: list[str], *overrides: str) -> Daemon:
        self.config_file.write_text(yaml.safe_dump(self.config))
        self._started += 1
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        daemon = Daemon(
            [*command, str(self.config_file), *overrides], self.folder, f"{name}-{self._started}", environment
        )
        self.daemons.append(daemon)
        return daemon

    def learner(self, *overrides: str) -> Daemon:
        return self.start("learner", *overrides)

    def generator(self, *overrides: str) -> Daemon:
        return self.start("generator", *overrides)

    # -- what it wrote

    def records(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / METRICS_FILE
        if not path.exists():
            return []
        return [record for record in read_records(path)[0] if record["kind"] == kind]

    def version(self) -> int:
        """The newest policy version with a metrics line."""
        return max((record["version"] for record in self.records("step")), default=0)

    def wait_for_version(self, version: int, *daemons: Daemon, timeout_s: float = STEP_S) -> None:
        wait_until(lambda: self.version() >= version, timeout_s, f"version {version}", list(daemons))

    def journal(self) -> Iterator[Record]:
        """All records, after the learner has ended."""
        folder = self.run_dir / "journal"
        numbers = sorted(int(path.stem) for path in folder.glob("*.segment"))
        return (entry.record for entry in JournalReader(folder, numbers))

    # -- what it left

    def processes(self) -> dict[int, str]:
        """Living processes with this run's mark, by pid."""
        return dict(marked_processes(self.mark))

    def close(self) -> None:
        """Kills what still runs: for the end of a test, whatever happened in it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for daemon in self.daemons:
            daemon.process.wait()


def marked_processes(mark: str) -> Iterator[tuple[int, str]]:
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX":
                    yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
        except OSError:
            continue  # gone, or not ours


def steps_in(journal: Iterator[Record]) -> tuple[dict[int, tuple[tuple[int, int], ...]], set[int]]:
    """Groups of each step by version, and the ordinals given up or filtered. Fails when a step was decided twice."""
    steps: dict[int, tuple[tuple[int, int], ...]] = {}
    left_out: set[int] = set()
    for record in journal:
        if isinstance(record, StepTaken):
            assert record.version not in steps, f"the batch of version {record.version} was decided twice"
            steps[record.version] = record.groups
        elif isinstance(record, PromptGivenUp | GroupFiltered):
            assert record.ordinal not in left_out, f"ordinal {record.ordinal} was left out twice"
            left_out.add(record.ordinal)
    return steps, left_out


def check_every_ordinal_once(run: Run, num_steps: int) -> None:
    """No prompt trained twice, none skipped, and no batch with a group that the journal does not hold."""
    steps, left_out = steps_in(run.journal())
    groups = {(record.ordinal, record.attempt) for record in run.journal() if isinstance(record, StoredGroup)}
    assert sorted(steps) == list(range(num_steps))
    trained = [group for version in sorted(steps) for group in steps[version]]
    ordinals = sorted(ordinal for ordinal, _ in trained)
    assert ordinals == sorted(set(range(len(trained) + len(left_out))) - left_out)
    assert set(trained) <= groups


def check_results_have_no_gap(run: Run) -> None:
    """Results of one generator are numbered: each up to the last that was taken is in the journal."""
    seqs: dict[tuple[str, int], set[int]] = {}
    for record in run.journal():
        if hasattr(record, "seq"):
            seqs.setdefault((record.generator_id, record.incarnation), set()).add(record.seq)
    assert seqs
    for sender, seen in seqs.items():
        assert seen == set(range(1, max(seen) + 1)), sender
