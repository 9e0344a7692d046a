"""Sessions: what makes the rollout link reliable over sockets that lose, repeat and disconnect.

    generator                                   desk
    Hello(id, incarnation, oldest unacked) ──▶  admits, or fences old incarnations and other configurations
           ◀── Welcome(run_epoch, settled, credit)
    GroupResult(seq) ───────────────────────▶   offer(seq): NEW → journal, sync → mark_durable(seq)
           ◀── Ack(settled, credit)             repeated in answer to every Beat: a lost one does not matter
    silence or a new learner: Hello again, then everything unacked once more; `offer` drops what is known

Both ends are state machines without sockets or clocks: daemons, simulation and tests run the same code.
"""

from __future__ import annotations

from asyncrl.link.desk_session import Admission, DeskSession, DeskSessions, Expected, Liveness, Offer, SavedSession
from asyncrl.link.generator_session import GeneratorSession, GeneratorState

__all__ = [
    "Admission",
    "DeskSession",
    "DeskSessions",
    "Expected",
    "GeneratorSession",
    "GeneratorState",
    "Liveness",
    "Offer",
    "SavedSession",
]
