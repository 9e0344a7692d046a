"""Starts the trainer's ranks and watches them: the desk survives their death and starts them again.

One rank is a plain process; several run under torch.distributed's elastic launcher, which restarts them together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from asyncrl.errors import CheckpointError, ConfigError, TrainerFailed
from asyncrl.host.log_files import limit_log
from asyncrl.host.processes import child_environment, die_with_parent, nccl_environment
from asyncrl.link.trainer_link import LAST_WORDS

log = logging.getLogger(__name__)

RESTART_BACKOFF_S = 1.0
MAX_BACKOFF_S = 32.0
LOG_CHECK_S = 10.0
KILL_TIMEOUT_S = 10.0  # a process in a system call that hangs does not end before the call does


class TrainerProcess:
    """The trainer of one learner. `poll` restarts it after a crash, `max_restarts` times without a new version.

    kill_timeout_s is how long `kill` waits for the end; signal_group(process group, signal) is how it kills, which a
    test replaces to have a process that does not die.
    """

    def __init__(
        self,
        config_file: Path,
        desk_address: str,
        log_file: Path,
        *,
        num_ranks: int,
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
        self.num_ranks = num_ranks
        self.threads = threads
        self.max_restarts = max_restarts
        self.weights_timeout_s = weights_timeout_s
        self.weights_host = weights_host
        self.failures = 0  # crashes since the last new version
        self._kill_timeout_s = kill_timeout_s
        self._signal_group = signal_group
        self._process: subprocess.Popen[bytes] | None = None
        self._restart_at: float | None = None
        self._log_checked_at = -LOG_CHECK_S

    @property
    def running(self) -> bool:
        """Whether the trainer runs now; between a crash and the restart it does not."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Id of the trainer's process; None when there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the ranks. Their output goes to `log_file`."""
        environment = child_environment(
            self.threads,
            # Idle OpenMP threads that spin would starve the desk and a generator on the same host.
            OMP_WAIT_POLICY="passive",
            KMP_BLOCKTIME="0",
            **nccl_environment(self.weights_timeout_s, self.weights_host),
        )
        with self.log_file.open("ab") as output:
            # Its own session: Ctrl-C in the terminal reaches the desk alone, which tells the trainer what to do.
            # When the desk is killed the kernel kills the trainer: without a desk it can do nothing useful, and a
            # second learner on the run folder must find the device free.
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                # By preexec_fn, because torch's launcher would not ask for it by itself. It is one system call: nothing
                # in it waits for a lock that another thread held at the fork.
                preexec_fn=die_with_parent,
            )
        self._restart_at = None
        log.info("trainer started (pid %d, log %s)", self._process.pid, self.log_file)

    def command(self) -> list[str]:
        """What is started."""
        command = [sys.executable, "-m"]
        if self.num_ranks > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.num_ranks}", "-m"]
        return [*command, "asyncrl.trainer.rank", str(self.config_file), self.desk_address]

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
        if self._process is None or self._process.poll() is None:
            return False
        code, self._process = self._process.returncode, None
        self._raise_final(code)
        self.failures += 1
        if self.failures > self.max_restarts:
            raise TrainerFailed(
                f"the trainer died {self.failures} times without making a new version (last exit code {code}); "
                f"see {self.log_file}:\n{self.last_words()}"
            )
        delay_s = min(RESTART_BACKOFF_S * 2 ** (self.failures - 1), MAX_BACKOFF_S)
        log.error("trainer died (exit code %s), restart in %.0f s:\n%s", code, delay_s, self.last_words())
        self._restart_at = now + delay_s
        return True

    @property
    def exit_code(self) -> int | None:
        """How the trainer ended; None while it runs, and when it died and was not started again yet."""
        return self._process.poll() if self._process else None

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
        """Waits for the end; the exit code, or None if the trainer still runs after `timeout_s`."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """Ends the ranks now, with SIGKILL to their process group."""
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._signal_group(self._process.pid, signal.SIGKILL)
            if self.wait(self._kill_timeout_s) is None:
                log.error(
                    "trainer %d does not end %g s after SIGKILL; leaving it", self._process.pid, self._kill_timeout_s
                )

    def last_words(self, num_bytes: int = 1500) -> str:
        """The end of the trainer's log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - num_bytes))
                return file.read().decode(errors="replace").strip()
        except OSError as error:
            return f"(no trainer log: {error})"
