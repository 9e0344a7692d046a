"""Holds rewards back while the server of one of their parts is down.

Without it a dead judge would fail every group that is generated, prompt after prompt, until the run gives up. With it
the groups that the server took along fail and are leased again, and the next ones wait, tokens and all: first come,
first served, one job at a time tries whether the server is back, after a pause that grows. The lease's deadline ends
the wait of each.
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
    """Open while servers answer. All of it in one event loop."""

    def __init__(self) -> None:
        self._down = False
        self._pause_s = FIRST_PAUSE_S
        self._resume_at = 0.0
        self._trial = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[Passage]:
        """A job goes through in here, at once or when it is its turn, and says afterwards how it went."""
        trying = await self._wait() if self._down else False
        try:
            yield Passage(self, trying)
        finally:
            if trying:
                self._trial.release()

    async def _wait(self) -> bool:
        """True for the one that tries, which then holds the lock; false when the gate has opened meanwhile."""
        await self._trial.acquire()
        try:
            while self._down and (wait_s := self._resume_at - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
        except BaseException:
            self._trial.release()
            raise
        if not self._down:
            self._trial.release()
        return self._down

    def _answered(self) -> None:
        if self._down:
            log.info("the servers of the reward answer again")
        self._down, self._pause_s = False, FIRST_PAUSE_S

    def _unanswered(self, trying: bool, detail: str) -> None:
        if self._down and not trying:
            return  # went out with the job that closed the gate, and says nothing new
        log.warning("rewards wait %g s for a server: %s", self._pause_s, detail)
        self._down, self._resume_at = True, time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)


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
