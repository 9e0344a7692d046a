"""What a reward may not leave behind in its worker: processes, and a process that is full.

Python starts helpers of its own where a reward uses multiprocessing: a resource tracker (spawn, shared memory) and a
fork server, which both serve later rewards and end with the worker. They are no leftovers; children of theirs are.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import signal
import time

GRACE_S = 0.3  # for a child that is just ending
_PAUSE_S = 0.005
_HELPERS = (b"from multiprocessing.resource_tracker import main", b"from multiprocessing.forkserver import main")

# What a process that is out of memory, file descriptors, threads or shared memory gets to hear. Another may have room.
_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC})


def end_processes() -> bool:
    """Ends all processes below this one but Python's helpers; whether there were any after a moment's grace.

    If they multiply faster than they are killed, only the pool's deadline ends it. Raises OSError in a process that
    has no file descriptor left.
    """
    until = time.monotonic() + GRACE_S
    while _reap() and (left := _processes()):
        if time.monotonic() > until:
            while left:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(_PAUSE_S)
                _reap()
                left = _processes()
            return True
        time.sleep(_PAUSE_S)
    return False


def is_full(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that this process has no room left for what was asked of it."""
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        found = errors.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, MemoryError) or "can't start new thread" in str(found):
            return True
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        errors += [found.__cause__, found.__context__]
        if isinstance(found, BaseExceptionGroup):
            errors += found.exceptions
    return False


def _reap() -> bool:
    """Collects children that have ended. Whether there are any others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _processes() -> list[int]:
    """All running processes below this one but Python's helpers."""
    found: list[int] = []
    parents = [(os.getpid(), False)]
    while parents:
        parent, of_helper = parents.pop()
        for pid in _children(parent):
            # What a fork server has forked has its command line, too, and is no helper.
            is_helper = not of_helper and _is_helper(pid)
            parents.append((pid, is_helper))
            if not is_helper and _is_running(pid):
                found.append(pid)
    return found


def _children(pid: int) -> list[int]:
    children = []
    for listing in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(listing) as file:
            children += [int(child) for child in file.read().split()]
    return children


def _is_helper(pid: int) -> bool:
    command = _read(f"/proc/{pid}/cmdline")
    return any(helper in command for helper in _HELPERS)


def _is_running(pid: int) -> bool:
    """Not so when it has ended and only its parent does not know yet."""
    status = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return bool(status) and status[0] not in (b"Z", b"X")


def _read(path: str) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(path, "rb") as file:
        return file.read()
    return b""
