"""Results whose acknowledgement waits for the journal: they become durable together, and count from then on.

    add(...)               what the journal was given is owed an acknowledgement
    make_durable()         one write and one fdatasync for all of them; then each is settled in its session
    take_sessions()        the sessions that have something new to be told since the last call
    take_evaluated()       the results of evaluations that became durable since the last call

Nothing is acknowledged before `make_durable` returned. Nothing is called back either: the desk takes the sessions and
tells them, and the evaluator takes its results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from asyncrl.desk.counters import Counters
from asyncrl.link.desk_session import DeskSession, DeskSessions
from asyncrl.storage.journal import Journal
from asyncrl.types import Group


class Evaluated(NamedTuple):
    """The result of an evaluation, and the generator that it came from."""

    group: Group
    generator_id: str


@dataclass(frozen=True, slots=True)
class _Owed:
    """One result that was taken and is not durable yet."""

    session: DeskSession
    seq: int
    num_rollouts: int  # for training
    evaluated: Group | None


class Acknowledgements:
    """Acknowledgements that are owed until the journal is durable, and due from then on."""

    def __init__(self, journal: Journal, sessions: DeskSessions, counters: Counters) -> None:
        self._journal = journal
        self._sessions = sessions
        self._counters = counters
        self._owed: list[_Owed] = []
        self._due: dict[str, DeskSession] = {}  # generator id -> session with something new
        self._evaluated: list[Evaluated] = []

    def add(self, session: DeskSession, seq: int, *, num_rollouts: int = 0, evaluated: Group | None = None) -> None:
        """Result `seq` of this session is in the journal, and acknowledged once that is durable.

        num_rollouts counts those taken for training; evaluated is the result of an evaluation.
        """
        self._owed.append(_Owed(session, seq, num_rollouts, evaluated))

    def make_durable_if_due(self, now: float) -> None:
        """Results that come shortly after each other share one fdatasync. Raises JournalError."""
        if self._journal.durable_due <= now:
            self.make_durable()

    def make_durable(self) -> None:
        """Makes everything in the journal durable, then settles what is owed.

        Raises JournalError when the disk fails; nothing is settled then.
        """
        self._journal.make_durable()
        owed, self._owed = self._owed, []
        for result in owed:
            self._sessions.mark_durable(result.session, result.seq)
            self._counters.totals.rollouts_acked += result.num_rollouts
            self._due[result.session.generator_id] = result.session
            if result.evaluated is not None:
                self._evaluated.append(Evaluated(result.evaluated, result.session.generator_id))

    def take_sessions(self) -> list[DeskSession]:
        """Sessions with results that became durable since the last call: send each of them an Ack."""
        due, self._due = list(self._due.values()), {}
        return due

    def take_evaluated(self) -> list[Evaluated]:
        """Results of evaluations that became durable since the last call."""
        evaluated, self._evaluated = self._evaluated, []
        return evaluated
