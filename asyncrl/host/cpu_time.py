"""The CPU time of a process and all its descendants."""

from __future__ import annotations

import os
import time
from pathlib import Path

from asyncrl.host.process_tree import tree_of

RESCAN_S = 10.0  # how often processes that are new are looked for


class TreeCpuTime:
    """CPU seconds of this process and its descendants, those of ended ones included as far as they were seen.

    It never falls. A process counts from when it was seen first, RESCAN_S after its start at the latest, with all its
    time; one that starts and ends in between is missed.
    """

    def __init__(self) -> None:
        self._spent: dict[int, float] = {}  # by process, those that ended at their last known time
        self._alive: set[int] = set()
        self._scanned_at = -RESCAN_S

    def seconds(self) -> float:
        """CPU seconds until now, of user and system."""
        now = time.monotonic()
        if now - self._scanned_at >= RESCAN_S:
            self._scanned_at = now
            self._alive = tree_of(os.getpid())
        for pid in list(self._alive):
            spent = _cpu_seconds(pid)
            if spent is None or spent < self._spent.get(pid, 0.0):  # it ended, and another may have its number
                self._alive.discard(pid)
            else:
                self._spent[pid] = spent
        return sum(self._spent.values())


def _cpu_seconds(pid: int) -> float | None:
    """User and system time of one process in seconds, without its children; None once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
