"""Durable files: what POSIX needs so that a file, a name or a lock survives a crash at any instant."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from asyncrl.errors import JournalError


def make_folder(path: Path) -> None:
    """Makes `path` and its missing parents, with mode 0700, and makes their names durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        fsync_folder(folder.parent)
    if not missing:
        # It may be there because a process was killed right after it made it, and its name not be durable yet.
        with contextlib.suppress(PermissionError):  # a parent that we may not read is not one that we made
            fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes names in a folder (created, renamed, deleted) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_durable(path: Path) -> None:
    """Makes what is in a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of data; raises OSError when the disk takes only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def lock_folder(folder: Path) -> int:
    """Takes the folder for this process; the kernel gives it back when the process dies, however it dies."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise JournalError(
            f"{folder} is in use by the learner with pid {holder}; stop that one, or choose another run.dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
