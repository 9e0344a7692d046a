"""A child process that runs foreign code, held by a daemon that must not wait for it.

Foreign code may raise, hang, exit, fork or print. It costs its own process alone: that is a session of its own, ends
with the daemon, and is killed as a whole group. The daemon writes and reads without blocking, and waits on one file
descriptor that stays the same when the child is replaced.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from asyncrl.host.pipes import FrameBuffer, framed
from asyncrl.host.processes import END_TIMEOUT_S, child_environment

_T = TypeVar("_T")

READ_BYTES = 1024 * 1024


def foreign_environment() -> dict[str, str]:
    """The environment for a child that runs foreign code: one thread, and it finds the modules that this process finds.

    Those beside the configuration are among them. Texts have the same hashes in all of them, so that an example that is
    made by walking through a set is the same on every host and after every restart.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return child_environment(1, PYTHONPATH=path, PYTHONHASHSEED="0")


def how_it_ended(code: int, whose: str) -> str:
    """How a process ended, in words; `whose` says of whom, such as "the reward"."""
    if code < 0:
        return f"{whose}'s process was ended by {signal.Signals(-code).name}"
    return f"{whose} ended its process with exit code {code}"


class GuardedProcess:
    """`python -m module`, which reads jobs from stdin and writes results to stdout (`host.pipes`)."""

    def __init__(self, module: str, whose: str, max_frame_bytes: int) -> None:
        """whose: what messages call the foreign code, such as "the task"."""
        self._module = module
        self._whose = whose
        self._process: subprocess.Popen[bytes] | None = None
        self._received = FrameBuffer(max_frame_bytes)
        self._to_send = bytearray()
        self._epoll = select.epoll()
        self.ended = False  # the child has closed its end: it has ended, or is about to

    @property
    def fd(self) -> int:
        """Readable when there is something to do: call `receive`."""
        return self._epoll.fileno()

    @property
    def running(self) -> bool:
        """Whether a child was started and not killed; it may have `ended` by itself."""
        return self._process is not None

    def start(self) -> None:
        """Starts the child; the one before must be gone."""
        assert self._process is None, "one child at a time"
        self.ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=foreign_environment(),
            bufsize=0,
            start_new_session=True,
        )
        for pipe in self._pipes():
            os.set_blocking(pipe, False)
        self._epoll.register(self._pipes()[1], select.EPOLLIN)

    def send(self, body: bytes) -> None:
        """Sends a frame; what the pipe does not take now goes out with later calls of `receive`."""
        self._to_send += framed(body)
        self._flush()

    def receive(self, decode: Callable[[bytes], _T]) -> list[_T]:
        """The messages that have come in, none when there is nothing. What a child said before its end counts.

        Raises ProtocolError for what is no message.
        """
        self._flush()
        while self._process is not None and not self.ended:
            try:
                chunk = os.read(self._pipes()[1], READ_BYTES)
            except BlockingIOError:
                break
            if not chunk:
                self.ended = True
                self._epoll.unregister(self._pipes()[1])
            self._received.feed(chunk)
        return self._received.take(decode)

    def ending(self) -> str:
        """How a child that has `ended` did so, in words."""
        assert self._process is not None and self.ended
        try:
            code = self._process.wait(END_TIMEOUT_S / 10)  # its pipes close a moment before it can be waited for
        except subprocess.TimeoutExpired:
            return f"{self._whose} closed its process's pipes"
        return how_it_ended(code, self._whose)

    def kill(self) -> None:
        """Ends the child and everything in its process group, and waits until it is gone."""
        process, self._process = self._process, None
        self.ended = False
        self._received.clear()
        self._to_send.clear()
        if process is None:
            return
        # The group outlives its leader while a child of it runs, hence also after the leader's end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)

    def close(self) -> None:
        """Ends the child, and gives the file descriptor back."""
        self.kill()
        self._epoll.close()

    def _pipes(self) -> tuple[int, int]:
        assert self._process is not None
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "it is started with both pipes"
        return stdin.fileno(), stdout.fileno()

    def _flush(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # a child that ended is seen when it is read
            while self._to_send:
                del self._to_send[: os.write(self._pipes()[0], self._to_send)]
