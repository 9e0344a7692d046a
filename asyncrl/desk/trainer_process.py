"""Starts the trainer's ranks and watches them: the desk survives their death and starts them again.

Each rank is a process, a child of the desk. Where there are several, all of them end when one does, and are started
again together: they share every step. Ranks on other hosts are watched by `asyncrl-trainer-node` in the same way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config import Config
from asyncrl.errors import BindError, CheckpointError, ConfigError, RankLost, TrainerFailed
from asyncrl.host.addresses import listening_socket
from asyncrl.host.log_files import limit_log
from asyncrl.host.processes import child_environment, die_with_parent, heap_environment, nccl_environment
from asyncrl.link.trainer_link import LAST_WORDS, STORE_FD

log = logging.getLogger(__name__)

RESTART_BACKOFF_S = 1.0
MAX_BACKOFF_S = 32.0
LOG_CHECK_S = 10.0
KILL_TIMEOUT_S = 10.0  # a process in a system call that hangs does not end before the call does
BLAME_S = 2.0  # how long the end of the rank that is at fault may come after the ends of those that lost it


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Which ranks of how many run on this host, and where all of them meet."""

    first: int = 0
    count: int = 1
    world_size: int = 1
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one, which only ranks on the same host can learn of

    def environment(self, index: int, port: int) -> dict[str, str]:
        """What torch's rendezvous by environment wants in the `index`-th process of this host."""
        return {
            "RANK": str(self.first + index),
            "LOCAL_RANK": str(index),
            "LOCAL_WORLD_SIZE": str(self.count),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(port),
        }


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How a rank ended; a negative code is the number of the signal that killed it."""

    rank: int
    code: int

    def __str__(self) -> str:
        killed_by = f" ({signal.Signals(-self.code).name})" if -self.code in set(signal.Signals) else ""
        return f"rank {self.rank}: exit code {self.code}{killed_by}"


def rank_layout(config: Config, node: int = 0) -> RankLayout:
    """The ranks of one of the run's hosts; node 0 is that of the learner."""
    count = config.learner.ranks
    return RankLayout(
        first=node * count,
        count=count,
        world_size=count * config.learner.nodes,
        host=config.weights.host,
        port=config.learner.port,
    )


class RankProcesses:
    """The ranks of one host as processes: started together, ended together.

    signal_group(process group, signal) is how they are killed; a test replaces it to have one that does not die.
    """

    def __init__(
        self, layout: RankLayout, command: Sequence[str], signal_group: Callable[[int, int], None] = os.killpg
    ) -> None:
        self.layout = layout
        self.command = list(command)
        self._signal_group = signal_group
        self._children: list[subprocess.Popen[bytes]] = []
        self._lost_since: float | None = None  # a rank ended because it had lost another one

    def start(self, environment: dict[str, str], log_file: Path | None) -> None:
        """Starts all ranks; their output goes to `log_file`, or where that of this process goes.

        Raises BindError when the ranks cannot meet at the layout's host and port.
        """
        self._children, self._lost_since = [], None
        with contextlib.ExitStack() as open_things:
            output = None if log_file is None else open_things.enter_context(log_file.open("ab"))
            port, inherited = self.layout.port, -1
            if self.layout.world_size > 1 and self.layout.first == 0:
                listener = open_things.enter_context(_listener(self.layout.host, self.layout.port))
                port, inherited = listener.getsockname()[1], listener.fileno()
            for index in range(self.layout.count):
                own = dict(environment)
                if self.layout.world_size > 1:
                    own |= self.layout.environment(index, port)
                keeps = inherited if index == 0 and inherited >= 0 else None
                if keeps is not None:
                    own[STORE_FD] = str(keeps)
                # A session of its own: Ctrl-C in the terminal reaches the desk alone, which tells the trainer what to
                # do. When the desk is killed the kernel kills the trainer: without a desk it can do nothing useful, and
                # a second learner on the run folder must find the device free.
                child = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=own,
                    start_new_session=True,
                    pass_fds=() if keeps is None else (keeps,),
                    # By preexec_fn, because it must hold from the first moment. It is one system call: nothing in it
                    # waits for a lock that another thread held at the fork.
                    preexec_fn=die_with_parent,
                )
                self._children.append(child)

    @property
    def pid(self) -> int | None:
        """Id of the first rank's process; None before the start."""
        return self._children[0].pid if self._children else None

    @property
    def running(self) -> list[int]:
        """The ranks that run."""
        return [self.layout.first + index for index, child in enumerate(self._children) if child.poll() is None]

    def ended(self) -> list[RankEnd]:
        """The ranks that have ended."""
        codes = [(self.layout.first + index, child.poll()) for index, child in enumerate(self._children)]
        return [RankEnd(rank, code) for rank, code in codes if code is not None]

    def failure(self) -> RankEnd | None:
        """The end that is to blame for all others, as soon as it is known; None while no rank has failed."""
        failed = [end for end in self.ended() if end.code]
        at_fault = [end for end in failed if end.code != RankLost.exit_code]
        if at_fault or not failed:
            return at_fault[0] if at_fault else None
        self._lost_since = self._lost_since or time.monotonic()
        waits = len(failed) < len(self._children) and time.monotonic() < self._lost_since + BLAME_S
        return None if waits else failed[0]

    def wait(self, timeout_s: float) -> bool:
        """Waits for the end of all; False if one still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        return not self.running

    def kill(self) -> None:
        """Sends SIGKILL to the process groups of those that run; does not wait."""
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    self._signal_group(child.pid, signal.SIGKILL)


def rank_environment(threads: int, weights_timeout_s: float, weights_host: str) -> dict[str, str]:
    """The environment of a rank's process, but for which rank it is."""
    return child_environment(
        threads,
        # Idle OpenMP threads that spin would starve the desk and a generator on the same host.
        OMP_WAIT_POLICY="passive",
        KMP_BLOCKTIME="0",
        **heap_environment(),
        **nccl_environment(weights_timeout_s, weights_host),
    )


def _listener(host: str, port: int) -> socket.socket:
    """A listening socket at which ranks meet. Raises BindError."""
    try:
        return listening_socket(host, port)
    except OSError as error:
        raise BindError(
            f"trainer ranks cannot meet at {host}:{port} ({error}); set weights.host to an address of this machine and "
            "learner.port to a free port"
        ) from error


class TrainerProcess:
    """The trainer of one learner. `poll` restarts it after a crash, `max_restarts` times without a new version.

    layout None is one rank. kill_timeout_s is how long `kill` waits for the end; signal_group(process group, signal) is
    how it kills, which a test replaces to have a process that does not die.
    """

    def __init__(
        self,
        config_file: Path,
        desk_address: str,
        log_file: Path,
        *,
        layout: RankLayout | None = None,
        threads: int,
        max_restarts: int,
        weights_timeout_s: float,
        weights_host: str = "",
        kill_timeout_s: float = KILL_TIMEOUT_S,
        signal_group: Callable[[int, int], None] = os.killpg,
    ) -> None:
        self.config_file = config_file
        self.desk_address = desk_address
        self.log_file = log_file
        self.threads = threads
        self.max_restarts = max_restarts
        self.weights_timeout_s = weights_timeout_s
        self.weights_host = weights_host
        self.failures = 0  # crashes since the last new version
        self._kill_timeout_s = kill_timeout_s
        self.ranks = RankProcesses(layout or RankLayout(), self.command(), signal_group)
        self._watched = False  # started, and its end not told yet
        self._dying: tuple[RankEnd, float] | None = None  # whose end ends all, and until when the others may take
        self._restart_at: float | None = None
        self._log_checked_at = -LOG_CHECK_S

    @property
    def running(self) -> bool:
        """Whether a rank runs now; between a crash and the restart none does."""
        return bool(self.ranks.running)

    @property
    def pid(self) -> int | None:
        """Id of the first rank's process; None when there is none."""
        return self.ranks.pid

    def start(self) -> None:
        """Starts the ranks. Their output goes to `log_file`. Raises BindError when several of them cannot meet."""
        self.ranks.start(rank_environment(self.threads, self.weights_timeout_s, self.weights_host), self.log_file)
        self._watched, self._restart_at = True, None
        several = f", ranks {self.ranks.running}" if self.ranks.layout.world_size > 1 else ""
        log.info("trainer started (pid %d%s, log %s)", self.pid, several, self.log_file)

    def command(self) -> list[str]:
        """What is started for each rank."""
        return [sys.executable, "-m", "asyncrl.trainer.rank", str(self.config_file), self.desk_address]

    def stepped(self) -> None:
        """A version was made that was not made before: earlier crashes count no more."""
        self.failures = 0

    def start_over(self, now: float) -> None:
        """What killed the trainer is out of its way: it is started again, and earlier crashes count no more."""
        self.failures = 0
        self._restart_at = now

    def poll(self, now: float) -> bool:
        """True once per death of the trainer. Restarts it when its back-off is over.

        Raises TrainerFailed when it died more than `max_restarts` times without a new version, ConfigError or
        CheckpointError at once when it ended because of what the user set up.
        """
        if now >= self._log_checked_at + LOG_CHECK_S:
            self._log_checked_at = now
            limit_log(self.log_file)
        if self._restart_at is not None:
            if now >= self._restart_at:
                self.start()
            return False
        end = self._dead(now)
        if end is None:
            return False
        self._watched, self._dying = False, None
        self._raise_final(end.code)
        self.failures += 1
        if self.failures > self.max_restarts:
            raise TrainerFailed(
                f"the trainer died {self.failures} times without making a new version (last {self._cause(end)}); "
                f"see {self.log_file}:\n{self.last_words()}"
            )
        delay_s = min(RESTART_BACKOFF_S * 2 ** (self.failures - 1), MAX_BACKOFF_S)
        log.error("trainer died (%s), restart in %.0f s:\n%s", self._cause(end), delay_s, self.last_words())
        self._restart_at = now + delay_s
        return True

    def _dead(self, now: float) -> RankEnd | None:
        """The end that the trainer died of, once no rank is left; the first rank to fail takes the others along."""
        if not self._watched:
            return None
        if self._dying is None:
            ended = self.ranks.ended()
            end = self.ranks.failure()
            if end is None and len(ended) == self.ranks.layout.count:
                end = ended[0]  # all said that they are done, and nobody had told them to stop
            if end is None:
                return None
            if (others := self.ranks.running) and end.code == RankLost.exit_code:
                log.error("%s; killing ranks that did not notice and may hang: %s", end, others)
            self.ranks.kill()
            self._dying = (end, now + self._kill_timeout_s)
        end, until = self._dying
        return end if now >= until or not self.ranks.running else None

    def _cause(self, end: RankEnd) -> str:
        return str(end) if self.ranks.layout.world_size > 1 else f"exit code {end.code}"

    @property
    def exit_code(self) -> int | None:
        """How the trainer ended; None while it runs, and when it died and was not started again yet."""
        if not self._watched:
            return None
        failure = self.ranks.failure()
        if failure is not None:
            return failure.code
        return None if self.running or not self.ranks.ended() else 0

    def check_end(self) -> None:
        """Raises, as `poll` does, unless the trainer has ended and did what it was told; for after `Ranks.stop`."""
        code = self.exit_code
        if code or self.running:
            self._raise_final(code)
            raise TrainerFailed(
                f"the trainer did not end well (exit code {code}): its last checkpoint or the export may be missing; "
                f"start the learner again, it goes on from the checkpoints and the journal; see {self.log_file}:\n"
                f"{self.last_words()}"
            )

    def _raise_final(self, code: int | None) -> None:
        """Raises what the trainer itself said, if starting it again would end the same way."""
        for error in (ConfigError, CheckpointError):
            if code == error.exit_code:
                raise error(self.last_words().rpartition(LAST_WORDS)[2])

    def wait(self, timeout_s: float) -> int | None:
        """Waits for the end; the exit code, or None if a rank still runs after `timeout_s`."""
        return self.exit_code if self.ranks.wait(timeout_s) else None

    def kill(self) -> None:
        """Ends the ranks now, with SIGKILL to their process groups."""
        if self.running:
            self.ranks.kill()
            if not self.ranks.wait(self._kill_timeout_s):
                log.error("trainer %d does not end %g s after SIGKILL; leaving it", self.pid, self._kill_timeout_s)

    def last_words(self, num_bytes: int = 1500) -> str:
        """The end of the trainer's log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - num_bytes))
                return file.read().decode(errors="replace").strip()
        except OSError as error:
            return f"(no trainer log: {error})"
