"""Runs the learner and the generators of one host as one: starts, watches and ends them together.

    what happens                          what is done
    ------------------------------------  -----------------------------------------------------------------------------
    the learner ends                      the generators end, and its exit code is the run's
    a generator dies                      the end of its log is shown; it starts again after a back-off
    it dies MAX_DEATHS times in a row,    it stays away; without any generator left the learner is stopped, and the
    or of what a new start cannot mend    generator's exit code is the run's
    SIGINT, SIGTERM or SIGHUP             all stop in good order: the learner saves, the generators hand back
    a second signal                       everything is killed
    this process is killed                the kernel kills the daemons, and they take their children along

Every daemon leads a session of its own, so that Ctrl-C in the terminal reaches this process alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asyncrl.host.log_files import limit_log
from asyncrl.host.processes import StopSignal, adopt_orphans, die_with_parent

TURN_S = 0.2
LEARNER_STOP_S = 30.0  # after a signal; it gives its trainer 20 s for the last checkpoint
GENERATOR_STOP_S = 9.0  # after a signal, and at most LAST_WORDS_S after the learner is gone
LAST_WORDS_S = 1.0
LEAVE_BY_THEMSELVES_S = 3.0  # generators of a run that is finished: the learner has told them
END_TIMEOUT_S = 5.0  # a process in a system call that hangs does not end before the call does
BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
MAX_DEATHS = 5
LIVED_S = 300.0  # who ran for so long starts again with a clean record
TAIL_LINES = 20
TAIL_BYTES = 16 * 1024
LOG_CHECK_S = 10.0
UNMENDABLE = frozenset({2, 4})  # exit codes after which the same start ends the same way
KILLED = 137


@dataclass(slots=True)
class Daemon:
    """One daemon of the run. log: where its output goes; None: to this process's own."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    deaths: int = 0  # in a row
    restart_at: float | None = None
    exit_code: int | None = field(default=None)  # of the last end that was final

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def stays_away(self) -> bool:
        """Whether it neither runs nor will."""
        return not self.runs and self.restart_at is None

    def start(self, now: float) -> None:
        """Starts its process, in a session of its own that ends with this process."""
        self.started_at, self.restart_at = now, None
        with contextlib.ExitStack() as files:
            output = files.enter_context(self.log.open("ab")) if self.log is not None else None
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(self.environment),
                start_new_session=True,
                preexec_fn=_tied_to(os.getpid()),
            )

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the daemon alone, which tells its children what to do."""
        if self.process is not None and self.runs:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Ends the daemon and everything in its session's first process group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self) -> str:
        """The end of its log."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"({self.log}: {error})"
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


def _tied_to(parent: int) -> Callable[[], None]:
    """What a child does first: the kernel is to end it with `parent`, which may be gone by then."""
    ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for a lock

    def tie() -> None:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(KILLED)

    return tie


class Supervisor:
    """Runs `learner` and `generators` until the learner ends or a signal comes."""

    def __init__(
        self,
        learner: Daemon,
        generators: Sequence[Daemon],
        stop: StopSignal,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """say: prints a line for the user."""
        self._learner = learner
        self._generators = list(generators)
        self._stop = stop
        self._say = say
        self._clock = clock
        self._stopping_at: float | None = None
        self._learner_ended_at: float | None = None
        self._failed: int | None = None  # exit code of the last generator, when none is left
        self._log_checked_at = 0.0

    def run(self) -> int:
        """Returns the learner's exit code, or the last generator's when no generator could be kept alive."""
        adopt_orphans()  # what a daemon left behind comes to us, and is ended
        try:
            for daemon in (*self._generators, self._learner):
                daemon.start(self._clock())
            while not self._over():
                self._turn()
                self._wait()
        finally:
            self._end_all()
        code = self._learner.exit_code
        if self._failed is not None:
            return self._failed
        return 1 if code is None else 128 - code if code < 0 else code

    def _wait(self) -> None:
        with contextlib.suppress(InterruptedError):
            # After a signal the descriptor stays readable.
            select.select([self._stop.fd] if self._stopping_at is None else [], [], [], TURN_S)

    def _over(self) -> bool:
        return self._learner_ended_at is not None and not any(daemon.runs for daemon in self._generators)

    def _turn(self) -> None:
        now = self._clock()
        self._reap_orphans()
        if self._stop.received is not None and self._stopping_at is None:
            self._say(f"{self._stop.received.name}: stopping learner and generators; a second signal kills them")
            self._begin_stop(now)
        if self._learner_ended_at is None and not self._learner.runs:
            assert self._learner.process is not None
            self._learner_ended_at, self._learner.exit_code = now, self._learner.process.returncode
        for daemon in self._generators:
            self._watch(daemon, now)
        self._check_anybody_left(now)
        self._keep_deadlines(now)
        if now >= self._log_checked_at + LOG_CHECK_S:
            self._log_checked_at = now
            for daemon in self._generators:
                if daemon.log is not None:
                    limit_log(daemon.log)

    def _begin_stop(self, now: float) -> None:
        self._stopping_at = now
        for daemon in self._daemons():
            daemon.restart_at = None
            daemon.signal(signal.SIGTERM)

    # -- generators ------------------------------------------------------------------------------------------------

    def _watch(self, daemon: Daemon, now: float) -> None:
        """Takes note of a generator's end, and starts it again when its time has come."""
        ending = self._stopping_at is not None or self._learner_ended_at is not None
        if daemon.restart_at is not None:
            if ending:
                daemon.restart_at = None
            elif now >= daemon.restart_at:
                self._say(f"{daemon.name} starts again")
                daemon.start(now)
            return
        if daemon.process is None or daemon.runs:
            return
        daemon.kill()  # what is left of its group
        daemon.exit_code = code = daemon.process.returncode
        daemon.process = None
        self._kill_orphans()  # what it left behind may hold the memory that its next life needs
        if ending:
            return
        if code == 0:
            self._say(f"{daemon.name} has ended and is not started again")  # the learner or a user told it to
            return
        self._died(daemon, code, now)

    def _died(self, daemon: Daemon, code: int, now: float) -> None:
        daemon.deaths = 1 if now - daemon.started_at >= LIVED_S else daemon.deaths + 1
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._say(f"{daemon.name} {how}; the end of {daemon.log}:\n{daemon.tail()}")
        if code in UNMENDABLE:
            self._say(f"{daemon.name} would end the same way again and stays away")
        elif daemon.deaths >= MAX_DEATHS:
            self._say(f"{daemon.name} died {daemon.deaths} times in a row and stays away")
        else:
            delay_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (daemon.deaths - 1))
            self._say(f"{daemon.name} is started again in {delay_s:.0f} s")
            daemon.restart_at = now + delay_s

    def _check_anybody_left(self, now: float) -> None:
        """Stops the learner when all generators failed for good: it would wait for ever."""
        if self._stopping_at is not None or self._learner_ended_at is not None or self._failed is not None:
            return
        codes = [daemon.exit_code for daemon in self._generators if daemon.stays_away]
        if self._generators and len(codes) == len(self._generators) and all(codes):
            last = codes[-1] or 1
            self._failed = 128 - last if last < 0 else last
            self._say("no generator is left: the learner is stopped; start again to go on where it stands")
            self._begin_stop(now)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _keep_deadlines(self, now: float) -> None:
        """Kills who does not end in time."""
        if self._learner_ended_at is not None:
            self._end_generators(now, self._learner_ended_at)
        if self._stopping_at is None:
            return
        if now - self._stopping_at >= GENERATOR_STOP_S:
            for daemon in self._generators:
                self._kill(daemon)
        if self._learner_ended_at is None and now - self._stopping_at >= LEARNER_STOP_S:
            self._kill(self._learner)

    def _end_generators(self, now: float, learner_ended_at: float) -> None:
        """The learner is gone: nobody takes what generators still hold."""
        if self._stopping_at is None and now - learner_ended_at >= LEAVE_BY_THEMSELVES_S:
            self._begin_stop(now)
        if self._stopping_at is not None and now - max(self._stopping_at, learner_ended_at) >= LAST_WORDS_S:
            for daemon in self._generators:
                daemon.kill()

    def _kill(self, daemon: Daemon) -> None:
        if daemon.runs:
            self._say(f"{daemon.name} did not end in time and is killed")
            daemon.kill()

    def _end_all(self) -> None:
        """Kills whatever is left, orphans of the daemons included, and waits for the end of it."""
        for daemon in self._daemons():
            daemon.kill()
        deadline = time.monotonic() + END_TIMEOUT_S
        while (left := _children_of(os.getpid())) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap_orphans()
            for daemon in self._daemons():
                if daemon.process is not None:
                    daemon.process.poll()
            time.sleep(0.01)
        if left:
            self._say(f"processes {left} do not end after SIGKILL; leaving them")

    def _kill_orphans(self) -> None:
        """Kills processes that came to us because their parent is gone."""
        ours = self._pids()
        for pid in _children_of(os.getpid()):
            if pid not in ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _daemons(self) -> tuple[Daemon, ...]:
        return (self._learner, *self._generators)

    def _pids(self) -> set[int]:
        return {daemon.process.pid for daemon in self._daemons() if daemon.process is not None}

    def _reap_orphans(self) -> None:
        """Takes note of the end of processes that came to us, so that they do not stay as zombies."""
        running = {
            process.pid: process
            for daemon in self._daemons()
            if (process := daemon.process) is not None and process.returncode is None
        }
        while (ended := _ended_child()) is not None:
            if (process := running.pop(ended, None)) is not None:
                process.poll()  # its Popen keeps the exit code
            else:
                os.waitpid(ended, 0)


def _ended_child() -> int | None:
    """A child that ended and was not taken note of. One call to the kernel: this is asked several times a second."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def _children_of(parent: int) -> list[int]:
    """Ids of the children of a process that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it is gone
        if int(ppid) == parent and state not in "ZX":
            found.append(int(folder.name))
    return found


def daemon_command(role: str, config: str, settings: Sequence[str]) -> list[str]:
    """The command of the learner or a generator, by this interpreter."""
    return [sys.executable, "-m", f"asyncrl.cli.{role}", config, *settings]
