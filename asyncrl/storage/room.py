"""Whether the disk has room for more rollouts: journal within its limit, free space above its floor.

Below either no leases are granted and no credit is given, long before a write fails and ends the run. Nothing is lost
by that: generators keep their results, the trainer works on what is buffered, and its checkpoints let old segments go.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from asyncrl.storage.journal import Journal

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SAY_EVERY_S = 60.0
GIB = 2**30


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the disk of `folder`. Raises OSError."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


class DiskRoom:
    """Looks once a second, and raises one alarm a minute while there is no room.

    max_bytes       of the journal
    min_free_bytes  on its disk; 0 = any
    measure         gives the free bytes of a folder; a test puts its own there
    """

    def __init__(
        self,
        journal: Journal,
        *,
        max_bytes: int,
        min_free_bytes: int,
        measure: Callable[[Path], int] = free_bytes,
    ) -> None:
        self._journal = journal
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._measure = measure
        self._looked_at = -LOOK_EVERY_S
        self._said_at = -SAY_EVERY_S
        self._problem = ""

    def has_room(self, now: float) -> bool:
        """Whether rollouts may be asked for; `now` is monotonic seconds."""
        if now >= self._looked_at + LOOK_EVERY_S:
            self._looked_at = now
            before, self._problem = self._problem, self._look()
            if self._problem and now >= self._said_at + SAY_EVERY_S:
                self._said_at = now
                log.error(
                    "%s: no leases and no credit until there is room; training and evaluation go on with what is there",
                    self._problem,
                )
            elif before and not self._problem:
                self._said_at = -SAY_EVERY_S
                log.info("the disk of the journal has room again: leases are granted")
        return not self._problem

    def _look(self) -> str:
        """What is short, in words; empty when nothing is."""
        size = self._journal.num_bytes
        if size >= self._max_bytes:
            return (
                f"the journal has {size / GIB:.2f} GiB, run.journal_max_gib={self._max_bytes / GIB:g} (raise it, or "
                "save checkpoints more often with checkpoint.every)"
            )
        try:
            free = self._measure(self._journal.folder)
        except OSError as error:
            return f"the disk of {self._journal.folder} cannot be looked at ({error})"
        if free < self._min_free_bytes:
            return (
                f"the disk of {self._journal.folder} has {free / GIB:.2f} GiB free, below "
                f"run.min_free_gib={self._min_free_bytes / GIB:g} (free some space)"
            )
        return ""
