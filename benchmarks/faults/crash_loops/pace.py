"""Keeps kills and groups in step, so that how many kills a run has does not hang on the machine's speed.

A run of N wanted kills has as many shares of groups. Generators hold back the groups of a share until the kills before
it have happened, so that the run cannot come to its end without all of them. A kill waits until most of the shares
before it are acknowledged, so that a slow machine has time for them. Between the two it comes at a random instant.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from asyncrl.generator.lease_runner import LeaseFailure, LeaseRunner
from asyncrl.types import Group, Lease
from benchmarks.faults.crash_loops.settings import Settings

LOOK_EVERY_S = 0.05
LONGEST_WAIT_S = 60.0
SHARES_BEHIND = 0.01  # of all shares, one at least: so many may be missing when a kill comes


class NewLines:
    """The lines that are added to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_to = 0

    def take(self) -> list[str]:
        """Those since the last call, without one that is being written."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        return whole.decode().splitlines()


class Pace:
    """What may happen next in the run in `folder`, from the ledgers of its killer and its generators."""

    def __init__(self, folder: Path, settings: Settings, generators: tuple[str, ...] = ()) -> None:
        self._wanted = settings.kills
        self._num_groups = settings.steps * settings.groups_per_step
        self._killer = NewLines(folder / "ledgers" / "kills")
        self._generators = [NewLines(folder / "ledgers" / f"{name}.generator") for name in generators]
        self._kills = self._begun = 0

    def kills(self) -> int:
        """Kills that have happened."""
        self._kills += sum(line.startswith("kill ") for line in self._killer.take())
        return self._kills

    def begun(self) -> int:
        """The ordinals of all groups that were sent are below this."""
        for line in (line for lines in self._generators for line in lines.take()):
            if line.startswith("S "):  # see `ledger`
                self._begun = max(self._begun, 1 + int(line.split()[4]))
        return self._begun

    def may_kill(self, waited_s: float) -> bool:
        """Whether the next kill may come: one is left, and the groups of the shares before it are there.

        Or it has waited for long enough: a run that comes to no groups must not stand still for ever.
        """
        kills = self.kills()
        if kills >= self._wanted:
            return False
        behind = max(1, int(SHARES_BEHIND * self._wanted))
        return waited_s >= LONGEST_WAIT_S or self.begun() * self._wanted >= (kills - behind) * self._num_groups

    def first_held_back(self) -> float:
        """The ordinal from which on groups are held back; infinity once all kills have happened."""
        kills = self.kills()
        return float("inf") if kills >= self._wanted else (kills + 1) * self._num_groups / (self._wanted + 1)


def paced_runner(pace: Pace) -> type[LeaseRunner]:
    """A lease runner that holds leases back as long as `pace` says."""

    class PacedRunner(LeaseRunner):
        """All its leases look at the ledger together."""

        looked_at, held_back_from = float("-inf"), 0.0

        async def run(self, lease: Lease) -> Group | LeaseFailure:
            while lease.key.ordinal >= self._first_held_back():
                await asyncio.sleep(LOOK_EVERY_S)
            return await super().run(lease)

        def _first_held_back(self) -> float:
            now = time.monotonic()
            if now >= self.looked_at + LOOK_EVERY_S:
                self.looked_at, self.held_back_from = now, pace.first_held_back()
            return self.held_back_from

    return PacedRunner
