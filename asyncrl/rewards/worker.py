"""One reward worker: a process of its own that scores completions, so that whatever a reward does stays in here.

Frames both ways are a length (uint32, little-endian) and msgpack:

    pool -> worker   first   {"path", "args", "parts", "weights", "memory_bytes"}      what to make
                     then    {"completions", "num_tokens", "prompt", "payload"}        one job at a time
    worker -> pool   first   {"ready": True} or {"error": text}
                     then    [parts, "", "", False] or [None, reason, detail, server_down]
                             one per completion, in order, as each is done

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
from collections.abc import Callable
from typing import Any

import msgpack

from asyncrl.errors import ConfigError, DeadlineExceeded, RewardError, UserError
from asyncrl.rewards.base import Sample, ServerUnavailable
from asyncrl.rewards.parts import RewardParts, make_parts, prepare_parts
from asyncrl.tasks.base import load_task

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
        rewards = _make_rewards(setup)
    except UserError as error:
        _write(results, {"error": str(error)})
        return
    _write(results, {"ready": True})
    while (job := _read(jobs)) is not None:
        for compute in rewards.begin(_samples(job)):
            _write(results, _score(compute))


def _make_rewards(setup: dict[str, Any]) -> RewardParts:
    """Raises TaskError or ConfigError for what cannot be made."""
    parts = make_parts(setup["parts"])
    if problems := prepare_parts(parts):
        raise ConfigError("\n".join(problems))
    return RewardParts(load_task(setup["path"], setup["args"]), parts, setup["weights"])


def _samples(job: dict[str, Any]) -> list[Sample]:
    return [
        Sample(completion, job["payload"], job["prompt"], num_tokens)
        for completion, num_tokens in zip(job["completions"], job["num_tokens"], strict=True)
    ]


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


def _score(compute: Callable[[], dict[str, float]]) -> list[Any]:
    owner = os.getpid()
    try:
        result = [compute(), "", "", False]
    except DeadlineExceeded as error:
        result = [None, "reward_timeout", str(error)[:MAX_DETAIL], True]
    except ServerUnavailable as error:
        result = [None, "reward_error", str(error)[:MAX_DETAIL], True]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: whatever it raises is its result
        detail = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        result = [None, "reward_error", detail[:MAX_DETAIL], False]
    if os.getpid() != owner:
        os._exit(1)  # a fork made in the reward came back here; only the original may answer
    if _has_children():
        _end_children()
        return [None, "reward_error", "the reward left processes running; end all of them before returning", False]
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
