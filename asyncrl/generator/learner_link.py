"""The generator's end of the rollout link: the session, the socket under it, and how long the learner may be silent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from asyncrl.config import Config
from asyncrl.errors import BindError, ConfigError, PeerUnreachable, Refused
from asyncrl.host.addresses import rollout_addresses
from asyncrl.link import messages
from asyncrl.link.codec import decode
from asyncrl.link.generator_session import GeneratorSession, GeneratorState
from asyncrl.link.limits import BEAT_S
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import AsyncClientSocket

log = logging.getLogger(__name__)

FROM_DESK = frozenset(
    {
        messages.Welcome,
        messages.Refusal,
        messages.LeaseGrant,
        messages.Ack,
        messages.Nack,
        messages.SyncOffer,
        messages.SyncSwap,
        messages.SyncCommit,
        messages.SyncAbort,
        messages.Stop,
        messages.Abandon,
    }
)
RECEIVE_WAIT_S = 0.5
CLOSE_FLUSH_S = 0.5
SAY_UNREACHABLE_EVERY_S = 10.0

ResultMaker = Callable[[int, int], messages.GroupResult | messages.LeaseFailed]


class LearnerLink:
    """Connects the session, which has neither socket nor clock, with both.

    The owner calls `keep_up` and then `receive`, for ever, and passes every frame through `accept`.
    """

    def __init__(self, config: Config, session: GeneratorSession, socket: AsyncClientSocket) -> None:
        self.session = session
        self._socket = socket
        self._addresses = config.transport.address  # as configured: one, several, or a file that is read each time
        self._run_dir = config.run.dir
        self._max_frame_bytes = config.transport.max_frame_bytes
        self._unreachable_timeout_s = config.generator.unreachable_timeout_s
        self._said_at = time.monotonic()  # when it was last logged that the learner does not answer
        self._connects = 0  # of the present socket, as the session was told

    def keep_up(self, held_version: int | None) -> None:
        """Does what is due by now: a new connection, a hello, results that were not acknowledged.

        Raises PeerUnreachable when the learner has been silent for longer than the configuration allows.
        """
        now = time.monotonic()
        self._check_reachable(now)
        if self.session.reconnect_due(now):
            self._reconnect()
            self.session.reconnected(now)
            self._connects = self._socket.connects
        if (connects := self._socket.connects) != self._connects:
            # libzmq connects again by itself when a connection ended.
            self._connects = connects
            self.session.connected(now)
        self.pump(held_version)

    def _reconnect(self) -> None:
        """Tries the address after the present one, from the list as it is now: the learner may have moved."""
        before = self._socket.address
        try:
            addresses = [address.text for address in rollout_addresses(self._addresses, self._run_dir)]
            after = addresses.index(before) + 1 if before in addresses else 0
            self._socket.reconnect(addresses[after % len(addresses)])
        except (ConfigError, BindError) as error:
            log.warning("stays with %s: %s", before, error)
            self._socket.reconnect()
        if self._socket.address != before:
            log.info("no answer from the learner at %s: trying %s", before, self._socket.address)

    def pump(self, held_version: int | None) -> None:
        """Sends what the session has due. A hello among it tells the learner which version is held here."""
        self.session.held_version = held_version
        for frame in self.session.due(time.monotonic()):
            self._socket.send(frame)

    async def receive(self) -> list[bytes]:
        """Frames that came in, after waiting for the first until the session has something due, or a connection."""
        now = time.monotonic()
        wait_s = max(0.0, min(self.session.next_due(now) - now, RECEIVE_WAIT_S))
        return await self._socket.receive(wait_s, self._connects)

    def accept(self, frame: bytes) -> Message | None:
        """The message in a frame, for the daemon to act on; None where it is of an earlier run epoch, or out of turn.

        Raises ProtocolError for a frame that cannot be used, and Refused when learner and generator do not fit.
        """
        message = decode(frame, max_bytes=self._max_frame_bytes, allowed=FROM_DESK)
        if not self.session.receive(message, time.monotonic()):
            return None
        if self.session.state is GeneratorState.REFUSED:
            # Also for a welcome: the session refuses what does not fit this end.
            raise _refused(self.session.refusal)
        return message

    def send(self, message: Message) -> None:
        """Best effort: a full queue drops it, and whatever matters is repeated (session) or times out (sync)."""
        if not self._socket.send_message(message):
            log.debug("send queue full, %s dropped", type(message).__name__)

    def deliver(self, make: ResultMaker, held_version: int | None) -> None:
        """Puts a result into the outbox, where it stays until the learner has it on disk, and sends what is due."""
        self.session.put(make, time.monotonic())
        self.pump(held_version)

    async def close(self) -> None:
        """Closes the socket; what is queued gets CLOSE_FLUSH_S to leave."""
        await self._socket.close(flush_s=CLOSE_FLUSH_S)

    def _check_reachable(self, now: float) -> None:
        """Says every 10 s that the learner does not answer, and gives up after the configured time."""
        silence_s, address = self.session.silence_s(now), self._socket.address
        refusal = self.session.refusal  # one that is not final: the next learner may take this generator
        # In a large fleet beats and their answers are rare.
        if silence_s >= self._unreachable_timeout_s + self.session.beat_s - BEAT_S:
            why = f"it refuses this generator: {refusal.reason}" if refusal else "is asyncrl-learner running there?"
            raise PeerUnreachable(
                f"no answer from the learner at {address} for {silence_s:.0f} s "
                f"(generator.unreachable_timeout_s={self._unreachable_timeout_s:g}); {why}"
            )
        if silence_s >= SAY_UNREACHABLE_EVERY_S and now - self._said_at >= SAY_UNREACHABLE_EVERY_S:
            self._said_at = now
            why = f"it refuses this generator: {refusal.reason}" if refusal else self._socket.link
            log.warning(
                "no answer from the learner at %s for %.0f s (limit %g s): %s; the connection ended %d times",
                address, silence_s, self._unreachable_timeout_s, why, self._socket.disconnects,
            )  # fmt: skip


def _refused(refusal: messages.Refusal | None) -> Refused:
    assert refusal is not None, "the session is refused and does not say why"
    return Refused(
        f"learner and generator do not fit ({refusal.code}): {refusal.reason}; "
        f"the learner has {refusal.expected!r}, here is {refusal.got!r}"
    )
