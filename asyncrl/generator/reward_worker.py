"""One reward worker: a process of its own that scores completions, so that whatever a reward does stays in here.

Frames both ways are a length (uint32, little-endian) and msgpack:

    pool -> worker   first   {"path", "args", "memory_bytes"}      the task to make
                     then    {"completions", "payload"}            one job at a time
    worker -> pool   first   {"ready": True} or {"error": text}
                     then    [parts, None] or [None, detail]       one per completion, in order, as each is done

The pool kills the whole process group when a result is late. Nothing here imports torch or vllm.
"""

from __future__ import annotations

import ctypes
import glob
import os
import resource
import signal
import struct
import sys
from typing import Any

import msgpack

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks.base import Task, checked_reward, load_task

LENGTH = struct.Struct("<I")
MAX_DETAIL = 500
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Serves jobs until the pool closes the pipe."""
    parent = os.getppid()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # the pool died before the line above took effect
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a reward's children come to this process, not to init
    jobs, results = _private_pipes()
    setup = _read(jobs)
    if setup is None:
        return
    _limit_memory(setup["memory_bytes"])
    try:
        task = load_task(setup["path"], setup["args"])
    except TaskError as error:
        _write(results, {"error": str(error)})
        return
    _write(results, {"ready": True})
    while (job := _read(jobs)) is not None:
        for completion in job["completions"]:
            _write(results, _score(task, completion, job["payload"]))


def _private_pipes() -> tuple[int, int]:
    """Moves the pool's pipes away from stdin and stdout: a reward that prints or reads must not disturb them."""
    jobs, results = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return jobs, results


def _limit_memory(memory_bytes: int) -> None:
    """A reward that fills memory gets a MemoryError; and if the host runs out all the same, this process goes first."""
    # Memory it can write to, not address space: large reservations are normal for runtimes a reward may start.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _score(task: Task, completion: str, payload: dict[str, Any]) -> list[Any]:
    owner = os.getpid()
    try:
        result = [checked_reward(task, completion, payload), None]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: whatever it raises is its result
        detail = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        result = [None, detail[:MAX_DETAIL]]
    if os.getpid() != owner:
        os._exit(1)  # a fork made in the reward came back here; only the original may answer
    if _has_children():
        _end_children()
        return [None, "the reward left processes running; end and wait for all of them before returning"]
    return result


def _has_children() -> bool:
    """Are there live child processes? Finished ones are collected on the way."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _end_children() -> None:
    """Kills all descendants. If they multiply faster, the pool's deadline ends this process and its group."""
    while _has_children():
        for listing in glob.glob("/proc/self/task/*/children"):
            with open(listing) as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
        os.waitpid(-1, 0)


def _read(fd: int) -> Any:
    """The next frame; None when the pool has closed the pipe."""
    header = _read_exactly(fd, LENGTH.size)
    body = header and _read_exactly(fd, LENGTH.unpack(header)[0])
    return msgpack.unpackb(body) if body else None


def _read_exactly(fd: int, size: int) -> bytes | None:
    chunks = []
    while size:
        chunk = os.read(fd, size)
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _write(fd: int, message: Any) -> None:
    body = msgpack.packb(message)
    frame = memoryview(LENGTH.pack(len(body)) + body)
    while frame:
        frame = frame[os.write(fd, frame) :]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)  # the pool is gone
