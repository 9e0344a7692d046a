"""One learner and any number of generators as processes, for benchmarks that disturb them while they work.

    with Fleet(folder, CONFIG, ["run.steps=100000"]) as fleet:
        fleet.start_learner()
        fleet.start_generator("g0")
        fleet.wait_until(lambda: fleet.version() >= 3, 120, "version 3")
        fleet.kill9("g0")
        fleet.start_generator("g0")         # its next incarnation

vLLM puts its processes into sessions of their own, so that a signal to the daemon's process group would not reach them.
Every process of a member therefore carries the member's mark in its environment, and signals go to all that carry it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from asyncrl.metrics import METRICS_FILE
from benchmarks.studies.async_vs_sync import COMMANDS, ROOT, free_port

MARK = "ASYNCRL_FLEET_MEMBER"  # environment variable: <fleet>/<member>/<its how manieth start>
LEARNER = "learner"
POLL_S = 0.05
SIGNAL_TIMEOUT_S = 10.0
END_TIMEOUT_S = 30.0
TAIL_CHARS = 2500

T = TypeVar("T")


class FleetError(RuntimeError):
    """A member ended, or what was waited for did not come. The text ends with the tails of the logs."""


class Tail:
    """The whole lines of a file that another process writes; each call of `more` reads only what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self._offset = 0

    def more(self) -> list[str]:
        """The lines that came since the last call; they are in `lines` too."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = whole.decode(errors="replace").splitlines()
        self.lines += new
        return new


@dataclass(slots=True)
class Member:
    """One daemon's process, with the processes that it started."""

    name: str
    mark: str
    process: subprocess.Popen[bytes]
    log: Tail  # stdout and stderr; of all starts of this name
    started_at: float = field(default_factory=time.monotonic)

    @property
    def running(self) -> bool:
        """False once the daemon itself has ended, however that was."""
        return self.process.poll() is None


class Fleet:
    """The members of one run. Use it as a context manager: at its end nothing of it runs any more."""

    def __init__(
        self,
        folder: Path,
        config: Path | Mapping[str, Any],
        overrides: Sequence[str] = (),
        *,
        generator_command: Sequence[str] = (str(COMMANDS / "asyncrl-generator"),),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`config`: a YAML file, or sections to write into one. `overrides` and `environment` hold for all members.

        Everything that the members write goes to `folder`; the run itself is in `run_dir`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        self.members: dict[str, Member] = {}  # the newest start of each name
        self._generator_command = list(generator_command)
        self._environment = dict(environment or {})
        self._id = uuid.uuid4().hex
        self._num_started = 0
        if isinstance(config, Mapping):
            (folder / "fleet.yaml").write_text(yaml.safe_dump(dict(config)))
            config = folder / "fleet.yaml"
        address = f"transport.address=tcp://127.0.0.1:{free_port()}"
        self._arguments = [str(Path(config).resolve()), f"run.dir={self.run_dir}", address, *overrides]
        self._metrics = Tail(self.run_dir / METRICS_FILE)
        self._records: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)  # by kind
        atexit.register(self.close)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- members -------------------------------------------------------------------------------------------------------

    def start_learner(self, *overrides: str, cpus: Sequence[int] = ()) -> Member:
        """`cpus` pins desk and trainer."""
        pinned = [f"learner.cpus={list(cpus)}"] if cpus else []
        return self._start(LEARNER, [str(COMMANDS / "asyncrl-learner")], [*pinned, *overrides])

    def start_generator(self, name: str, *overrides: str, cpus: Sequence[int] = ()) -> Member:
        """`name` becomes its generator.id; a name that has ended may be started again, as its next incarnation."""
        if name in self.members and self.members[name].running:
            raise FleetError(f"{name} runs already (pid {self.members[name].process.pid})")
        pinned = [f"generator.cpus={list(cpus)}"] if cpus else []
        return self._start(name, self._generator_command, [f"generator.id={name}", *pinned, *overrides])

    def running(self, name: str) -> bool:
        """Whether the daemon of this name is there; a stopped one is."""
        return name in self.members and self.members[name].running

    def _start(self, name: str, command: list[str], arguments: list[str]) -> Member:
        self._num_started += 1
        mark = f"{self._id}/{name}/{self._num_started}"
        # SPT_NOENV: vLLM names its processes with setproctitle, which would write the name over the environment and
        # with it over the mark.
        fixed = {MARK: mark, "SPT_NOENV": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        path = self.folder / f"{name}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                [*command, *self._arguments, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment, **fixed},
                start_new_session=True,
            )
        tail = self.members[name].log if name in self.members else Tail(path)
        self.members[name] = Member(name, mark, process, tail)
        return self.members[name]

    # -- signals -------------------------------------------------------------------------------------------------------

    def kill9(self, name: str) -> None:
        """SIGKILL to all processes of a member; returns when all are gone."""
        self._signal_until(name, signal.SIGKILL, lambda states: not states)
        self.members[name].process.wait(SIGNAL_TIMEOUT_S)

    def stop(self, name: str) -> None:
        """SIGSTOP to all processes of a member; returns when all stand."""
        self._signal_until(name, signal.SIGSTOP, lambda states: set(states.values()) <= {"T"})

    def cont(self, name: str) -> None:
        """SIGCONT to all processes of a member."""
        signal_marked(self.members[name].mark, signal.SIGCONT)

    def stopped(self, name: str) -> bool:
        """Whether every process of a member stands."""
        states = marked_processes(self.members[name].mark)
        return bool(states) and set(states.values()) <= {"T"}

    def terminate(self, name: str, timeout_s: float = END_TIMEOUT_S) -> int:
        """SIGTERM to the daemon, as an operator would; returns its exit code. One that does not end is killed."""
        member = self.members[name]
        if member.running:
            member.process.send_signal(signal.SIGTERM)
        try:
            return member.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill9(name)
            raise FleetError(f"{name} did not end within {timeout_s:.0f} s of SIGTERM\n{self.tails()}") from None

    def _signal_until(self, name: str, number: signal.Signals, done: Callable[[dict[int, str]], bool]) -> None:
        """Again and again: what a process started while it was signalled must not escape."""
        mark, deadline = self.members[name].mark, time.monotonic() + SIGNAL_TIMEOUT_S
        while not done(signal_marked(mark, number)):
            if time.monotonic() > deadline:
                raise FleetError(f"{name}: {marked_processes(mark)} after {SIGNAL_TIMEOUT_S:.0f} s of {number.name}")
            time.sleep(POLL_S / 5)

    def close(self) -> None:
        """Kills whatever is left. Idempotent."""
        deadline = time.monotonic() + SIGNAL_TIMEOUT_S
        while signal_marked(f"{self._id}/", signal.SIGKILL) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for member in self.members.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel has not let go of it: nothing to be done
                member.process.wait(SIGNAL_TIMEOUT_S)
        atexit.unregister(self.close)

    # -- what they wrote -----------------------------------------------------------------------------------------------

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of metrics.jsonl of one kind ("step", "sync", "eval"), oldest first."""
        for record in map(json.loads, self._metrics.more()):
            self._records[record["kind"]].append(record)
        return self._records[kind]

    def version(self) -> int:
        """The newest policy version: optimizer steps that have a metrics line."""
        return max((record["version"] for record in self.records("step")), default=0)

    def log(self, name: str = LEARNER) -> list[str]:
        """The lines that a member has logged so far, in all its starts."""
        tail = self.members[name].log
        tail.more()
        return tail.lines

    def tails(self) -> str:
        """The ends of all logs, for an error's text."""
        parts = [
            f"--- {name} ({'running' if member.running else f'exit code {member.process.returncode}'})\n"
            + "\n".join(self.log(name))[-TAIL_CHARS:]
            for name, member in self.members.items()
        ]
        return "\n".join(parts)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait_until(
        self, condition: Callable[[], T], timeout_s: float, what: str, needs: Sequence[str] = (LEARNER,)
    ) -> T:
        """Polls until `condition` is true; returns its value.

        Raises FleetError at the deadline, or at once when a member in `needs` has ended without making it true.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = [name for name in needs if not self.running(name)]  # before: what it did last still counts
            if value := condition():
                return value
            if ended:
                raise FleetError(f"{', '.join(ended)} ended before {what}\n{self.tails()}")
            if time.monotonic() >= deadline:
                raise FleetError(f"not within {timeout_s:.0f} s: {what}\n{self.tails()}")
            time.sleep(POLL_S)


def marked_processes(mark: str) -> dict[int, str]:
    """State letter of each living process whose mark begins with `mark`, by pid."""
    return dict(_marked(f"{MARK}={mark}".encode()))


def _marked(wanted: bytes) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if not any(entry.startswith(wanted) for entry in (folder / "environ").read_bytes().split(b"\0")):
                continue
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # gone, or not ours
        if state not in "ZX":
            yield int(folder.name), state


def signal_marked(mark: str, number: signal.Signals) -> dict[int, str]:
    """Sends `number` to each process whose mark begins with `mark`, the caller last; returns their states before."""
    states = marked_processes(mark)
    for pid in sorted(states, key=lambda pid: pid == os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return states


def own_mark() -> str:
    """The mark of the member that the calling process belongs to."""
    return os.environ[MARK]
