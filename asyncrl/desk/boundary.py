"""Where frames of peers become calls of the desk: what a frame does wrong costs its sender, never the run.

a frame that cannot be read, or asks for what the protocol does not allow   dropped, counted, said once a minute
anything else that goes wrong while a generator's message is handled        that generator is fenced: its session
ends, and this process of it is refused
our own disk, trainer, memory or configuration                              ends the run, as everywhere
anything else while a rank's message is handled                             a defect of ours: ends the run
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from asyncrl.desk.generators import Generators
from asyncrl.errors import CheckpointError, JournalError, ProtocolError, TooManyFailures, TrainerFailed, UserError
from asyncrl.host.repeats import Repeats
from asyncrl.link.codec import decode
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ServerSocket

log = logging.getLogger(__name__)

# Trouble of this process, which no peer is to blame for.
OURS = (JournalError, CheckpointError, TrainerFailed, TooManyFailures, UserError, OSError, MemoryError)

Allowed = frozenset[type[Message]]
Handle = Callable[[bytes, Message, bytes, float], None]


class Boundary:
    """Reads the frames of both sockets, and keeps what is wrong with one from the others."""

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._repeats = Repeats(log)
        self.defects: set[str] = set()  # places in the code whose traceback was logged

    def from_generators(self, socket: ServerSocket, allowed: Allowed, handle: Handle, now: float) -> None:
        """Hands on what generators sent.

        Raises what is our own trouble: JournalError, CheckpointError, OSError and the like.
        """
        for peer, frame in socket.receive():
            try:
                handle(peer, decode(frame, max_bytes=socket.max_frame_bytes, allowed=allowed), frame, now)
            except ProtocolError as error:
                who = self._generators.name_of(peer) or "an unknown peer"
                self._repeats.warn("a generator's frame dropped", f"{who}: {error}", now)
            except OURS:
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is, the other generators must not pay for it
                self._fence(peer, error, now)

    def from_ranks(self, socket: ServerSocket, allowed: Allowed, handle: Handle, now: float) -> None:
        """Hands on what ranks and publisher sent. They are processes of this learner: what they break is our defect."""
        for peer, frame in socket.receive():
            try:
                handle(peer, decode(frame, max_bytes=socket.max_frame_bytes, allowed=allowed), frame, now)
            except ProtocolError as error:
                self._repeats.warn("a trainer's frame dropped", str(error), now)

    def summarise(self, now: float) -> None:
        """Logs what was only counted, once a minute."""
        self._repeats.summarise(now)

    def _fence(self, peer: bytes, error: Exception, now: float) -> None:
        """Ends the session of a generator whose message broke the desk's code; the traceback is logged once."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {frame.filename.rpartition('/')[2]}:{frame.lineno}"
        name = self._generators.name_of(peer) or "an unknown peer"
        if what not in self.defects:
            self.defects.add(what)
            log.error(
                "a message of %s could not be handled (%s): it is fenced, and the run goes on. This is a defect of "
                "the program, or the peer is hostile; please report the traceback, which is logged once",
                name,
                what,
                exc_info=error,
            )
        else:
            self._repeats.warn("a generator is fenced", f"{name}: {what}", now)
        self._generators.fence(peer, f"the learner could not handle one of its messages ({what})", now)
