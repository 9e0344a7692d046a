"""Whether a daemon's event loop turns, and what the daemon is doing: what `/healthz` answers.

The loop itself says that it turned. Nobody else can say it: a loop that hangs falls silent, and its silence has an age.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

# A loop that has not turned for so long hangs. Both daemons' loops turn once a second at least; an fsync on a busy disk
# may take seconds.
STALL_S = 10.0


class DaemonState(StrEnum):
    """What a daemon does at this moment."""

    STARTING = "starting"  # it reads its files, or its engine comes up
    CONNECTING = "connecting"  # a generator that the learner has not welcomed
    WAITING = "waiting"  # for what `Look.waits_for` says
    TRAINING = "training"
    GENERATING = "generating"
    SWAPPING = "swapping"  # a generator takes new weights into its engine
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a daemon shows.

    waits_for   what is missing, in words; empty when nothing is
    ready       it can do its work: a learner trains or could, a generator's engine holds a policy version
    loop_age_s  seconds since its event loop turned last
    """

    state: DaemonState
    waits_for: str
    ready: bool
    loop_age_s: float

    @property
    def turns(self) -> bool:
        """Whether the event loop is known to turn."""
        return self.loop_age_s < STALL_S


class Pulse:
    """Written by a daemon's event loop at each turn, read by any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = (clock(), DaemonState.STARTING, "", False)

    def turn(self, state: DaemonState, waits_for: str = "", *, ready: bool) -> None:
        """The loop turned, and this is what the daemon does now."""
        self._last = (self._clock(), state, waits_for, ready)  # one assignment: a reader never sees half of it

    def look(self) -> Look:
        """How it is now."""
        turned_at, state, waits_for, ready = self._last
        return Look(state, waits_for, ready, max(0.0, self._clock() - turned_at))
