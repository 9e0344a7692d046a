"""Holds rewards back while the server of one of their parts is down.

Without it a dead judge would fail every group that is generated, prompt after prompt, until the run gives up. With it,
only the groups whose requests the server took along fail and are leased again. The next ones wait, with their tokens
sampled: one job at a time, the longest waiting first, tries whether the server is back, after a pause that grows. Each
waits no longer than the deadline of its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

log = logging.getLogger(__name__)

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0


class ServerGate:
    """Open while servers answer. It belongs to one event loop.

    first_pause_s is the pause before the first trial; each that fails doubles it, up to max_pause_s.
    """

    def __init__(self, first_pause_s: float = FIRST_PAUSE_S, max_pause_s: float = MAX_PAUSE_S) -> None:
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._down = False
        self._pause_s = first_pause_s
        self._resume_at = 0.0
        self._trial = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[Passage]:
        """Where a job is done: entered at once, or in its turn. The job tells the passage how it went."""
        trying = await self._wait() if self._down else False
        try:
            yield Passage(self, trying)
        finally:
            if trying:
                self._trial.release()

    async def _wait(self) -> bool:
        """True for the job that tries, which then holds the lock; false when the gate has opened meanwhile."""
        await self._trial.acquire()
        try:
            while self._down and (wait_s := self._resume_at - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
        except BaseException:  # cancelled: the turn goes to the next
            self._trial.release()
            raise
        if not self._down:
            self._trial.release()
        return self._down

    def _answered(self) -> None:
        if self._down:
            log.info("the servers of the reward answer again")
        self._down = False
        self._pause_s = self._first_pause_s

    def _unanswered(self, trying: bool, detail: str) -> None:
        if self._down and not trying:
            return  # this job began before the gate was closed, and says nothing new
        log.warning("rewards wait %g s for a server: %s", self._pause_s, detail)
        self._down = True
        self._resume_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._max_pause_s)


class Passage:
    """One job's way through the gate."""

    def __init__(self, gate: ServerGate, trying: bool):
        self._gate, self._trying = gate, trying

    def answered(self) -> None:
        """A server gave a value."""
        self._gate._answered()

    def unanswered(self, detail: str) -> None:
        """Nothing of the job has a value, because a server did not answer."""
        self._gate._unanswered(self._trying, detail)
