"""Python processes that begin with torch and transformers imported: forks of one that has imported them.

A fresh interpreter needs 4 s of CPU to import torch and 10 s for what a rank of the trainer imports, and the tests
start more than a hundred. Not for processes whose memory, start or end with their parent is what a test looks at.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read at the import: a peer that died is no news in a test
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["asyncrl.trainer.rank", "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama"]
)


class WarmProcess:
    """What subprocess.Popen is for `python -c CODE`, `python -m MODULE` or `python FILE`, as far as tests use it.

    stdin and stdout may be PIPE (as text); what is not given is that of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        assert command[0] == sys.executable
        self.stdin: TextIO | None = None
        self.stdout: TextIO | None = None
        theirs: list[int] = []
        if stdin == subprocess.PIPE:
            reader, writer = os.pipe()
            theirs.append(reader)
            self.stdin, stdin = os.fdopen(writer, "w"), reader
        if stdout == subprocess.PIPE:
            reader, writer = os.pipe()
            theirs.append(writer)
            self.stdout, stdout = os.fdopen(reader), writer
        streams = [_Inherited(own if given is None else given) for own, given in enumerate((stdin, stdout, stderr))]
        arguments = (
            [str(word) for word in command[1:]],
            dict(os.environ if env is None else env),
            str(cwd or Path.cwd()),
        )
        self._process = CONTEXT.Process(target=_become, args=(*arguments, *streams))
        self._process.start()
        _STARTED.add(self)
        for descriptor in theirs:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_STARTED: weakref.WeakSet[WarmProcess] = weakref.WeakSet()


def run_warm(
    command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run is that captures text: to its end, or killed at the deadline."""
    with TemporaryFile() as out, TemporaryFile() as err:
        process = WarmProcess(command, stdout=out, stderr=err, env=env, cwd=cwd)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        words = []
        for file in (out, err):
            file.seek(0)
            words.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(command, code, *words)


@atexit.register
def _kill_all() -> None:
    """What a failed test has left: multiprocessing waits for its end, to which one that was stopped never comes."""
    for process in _STARTED:
        process.kill()


class _Inherited:
    """A file descriptor on its way into the process."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        descriptor = self._file if isinstance(self._file, int) else self._file.fileno()
        return _arrived, (reduction.DupFd(descriptor),)


def _arrived(descriptor: Any) -> int:
    return int(descriptor.detach())


def _become(command: list[str], environment: dict[str, str], cwd: str, *streams: int) -> None:
    """Runs in the new process, in place of what an interpreter does when it starts."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
