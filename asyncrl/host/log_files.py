"""Log files that other processes append to, kept within a size."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

LOG_BYTES = 64 * 2**20  # of one log file; the one before is kept beside it, so twice that is on disk


def limit_log(path: Path, max_bytes: int = LOG_BYTES) -> bool:
    """Moves what a log file holds to PATH.1 once it is over max_bytes, in place of what is there; says whether it did.

    The writers have it open and go on in the emptied file: they must append. What one writes between the copy and the
    emptying is lost. A disk that refuses leaves the file as it is.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size <= max_bytes:
            return False
        older = path.with_name(f"{path.name}.1")
        fresh = path.with_name(f"{path.name}.1.new")
        try:
            shutil.copyfile(path, fresh)
            fresh.replace(older)
        except OSError:
            fresh.unlink(missing_ok=True)  # no room to keep it: the newest lines matter more than the oldest
        with path.open("r+b") as file:
            file.truncate(0)
        return True
    return False


def limit_logs(folder: Path, prefix: str, max_bytes: int = LOG_BYTES) -> None:
    """`limit_log` for every file PREFIX*.log of a folder."""
    for path in sorted(folder.glob("*.log")):
        if path.name.startswith(prefix):
            limit_log(path, max_bytes)
