"""The daemon's end of the writing of rollouts: a short queue, and a thread that feeds the process that writes.

Whoever has rollouts to write never waits. When the process is behind, what does not fit into the queue is left out;
when it is lost, it is started again, a few times. Either is said in the log, and neither can end the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time

from asyncrl.host.guarded_process import foreign_environment, how_it_ended
from asyncrl.host.pipes import write_frame
from asyncrl.host.processes import END_TIMEOUT_S
from asyncrl.report.rollouts.jobs import RolloutJob, WriterSetup

log = logging.getLogger(__name__)

QUEUED_JOBS = 8
MAX_DEATHS = 3
CLOSE_TIMEOUT_S = 60.0  # on a busy machine the tokenizer of a short run may still be loading
PROCESS = "asyncrl.report.rollouts.writer_process"


class RolloutWriter:
    """Writes jobs of rollouts in a process of its own, which is started by the first one."""

    def __init__(self, setup: WriterSetup, *, module: str = PROCESS) -> None:
        """module: what the process runs; a test puts its own there."""
        self.failed = False  # the process was lost too often: nothing more is written
        self._setup = setup
        self._module = module
        self._jobs: queue.Queue[RolloutJob | None] = queue.Queue(maxsize=QUEUED_JOBS)  # None is the end
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._close_at = float("inf")  # monotonic seconds
        self._deaths = 0
        self._left_out = 0  # jobs

    def write(self, job: RolloutJob) -> None:
        """Takes a job; never blocks, and raises nothing."""
        if self.failed or not job.rollouts:
            return
        if self._thread is None:
            # The process ends with the thread that has started it, so the thread lives until `close`.
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            if not self._left_out:
                log.warning("the writing of rollouts is behind: those of %s %d are left out", job.kind, job.version)
            self._left_out += 1

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ends thread and process, once what was taken is written, or after `timeout_s`."""
        if self._thread is None:
            return
        self._close_at = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, self._close_at - time.monotonic()))
        if self._thread.is_alive():
            log.warning("not all rollouts are written after %.0f s; the rest is left out", timeout_s)
            self.failed = True
            if (process := self._process) is not None:
                _end_group(process)  # whatever the thread waits for ends with it
            self._thread.join(END_TIMEOUT_S)
        if self._left_out:
            log.warning("%d files of rollouts were left out, for the writing was behind", self._left_out)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:  # no deadline: `close` ends the jobs
                self._send(job.encode())
                if self.failed:
                    return
            self._finish()
        finally:
            self._kill()

    def _send(self, body: bytes) -> None:
        """Hands a job to the process, and starts that where there is none."""
        while not self.failed:
            try:
                if self._process is None:
                    self._start()
                self._write(body)
                return
            except OSError as error:
                self._lost(error)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=foreign_environment(),
            bufsize=0,
            start_new_session=True,
        )
        with contextlib.suppress(OSError):  # it has ended already: seen at the next write
            self._write(self._setup.encode())

    def _write(self, body: bytes) -> None:
        process = self._process
        assert process is not None and process.stdin is not None, "it is started with a pipe"
        write_frame(process.stdin.fileno(), body)

    def _lost(self, error: OSError) -> None:
        """The process has ended, or cannot be started."""
        process, how = self._process, "the writing of rollouts cannot be started"
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S / 10)  # its pipe closes a moment before it can be waited for
            self._kill()
            how = how_it_ended(process.returncode or 0, "the writing of rollouts")
        if self.failed:  # by `close`, which has said so
            return
        self._deaths += 1
        self.failed = self._deaths >= MAX_DEATHS
        what = "no more rollouts are written" if self.failed else "it is started again"
        log.warning("%s (%s), %d of %d times: %s; training goes on", how, error, self._deaths, MAX_DEATHS, what)

    def _finish(self) -> None:
        """Lets the process write what it has, until the deadline of `close`."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, self._close_at - time.monotonic()))

    def _kill(self) -> None:
        """Ends the process and everything in its group, and waits until it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        _end_group(process)
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that leads its own group, and everything in it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
