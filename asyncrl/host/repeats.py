"""Warnings that somebody else can cause as often as he likes: some of each kind are logged, the others are counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from asyncrl.host.printing import printable

SUMMARY_EVERY_S = 60.0


@dataclass(slots=True)
class _Kind:
    """One kind of warning since `since`: how many were logged, how many were only counted, and the newest of those."""

    since: float
    logged: int = 0
    counted: int = 0
    newest: str = ""


class Repeats:
    """Logs the first `at_once` warnings of each kind in SUMMARY_EVERY_S, and then one line for all the others.

    Times are monotonic seconds. `summarise` is to be called from time to time; it logs what is due.
    """

    def __init__(self, log: logging.Logger, at_once: int = 1) -> None:
        self._log = log
        self._at_once = at_once
        self._kinds: dict[str, _Kind] = {}

    def warn(self, kind: str, text: str, now: float) -> None:
        """One warning. `kind` is one of a few fixed texts, for people; `text` may hold what a peer wrote."""
        seen = self._kinds.setdefault(kind, _Kind(now))
        if seen.logged < self._at_once:
            seen.logged += 1
            self._log.warning("%s: %s", kind, printable(text))
        else:
            seen.counted += 1
            seen.newest = text

    def summarise(self, now: float) -> None:
        """Logs one line for each kind of which warnings were only counted, once SUMMARY_EVERY_S have passed."""
        if not self._kinds:
            return
        for kind, seen in list(self._kinds.items()):
            if now - seen.since < SUMMARY_EVERY_S:
                continue
            del self._kinds[kind]
            if seen.counted:
                # They go on: until the next summary nothing of this kind is logged by itself.
                self._kinds[kind] = _Kind(now, logged=self._at_once)
                newest, waited_s = printable(seen.newest), now - seen.since
                self._log.warning("%s: %d more in %.0f s, the newest: %s", kind, seen.counted, waited_s, newest)
