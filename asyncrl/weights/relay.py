"""How the publisher of rank 0 tells those of other senders what to do: a connection to each, for their threads alone.

The collectives of training are another plane: a sender that waits for a generator must never hold up a step, and a
step never a sender. Messages are those of `link.trainer_messages`, one after the other, each behind its length. A rank
that ends closes its connection, which is noticed at once; what is asked for has a deadline.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from asyncrl.errors import BindError, ChannelError, FrameError, RankLost
from asyncrl.link.codec import decode, encode
from asyncrl.link.schema.message_base import Message
from asyncrl.link.trainer_messages import SenderHello

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 2**30
SEND_TIMEOUT_S = 30.0
GREETING_S = 10.0
_LENGTH = struct.Struct("<Q")


class RelayConnection:
    """One end of a connection: whole messages. `send` may be called by another thread than `receive`."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # The kernel's deadlines, one for each direction: Python's own is one for both, and two threads share a socket.
        limit = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises ChannelError when the other end is gone or takes nothing for SEND_TIMEOUT_S."""
        frame = encode(message, max_bytes=MAX_FRAME_BYTES)
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise ChannelError(f"{type(message).__name__} could not be sent: {error}") from None

    def receive(self, timeout_s: float | None) -> Message | None:
        """The next message; None when the other end has closed.

        Without a timeout it waits until a message comes or the connection ends: for a thread that does nothing else.

        Raises ChannelError when nothing came within `timeout_s`, and for a wrong frame.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            if not poll.poll(None if timeout_s is None else int(timeout_s * 1e3)):
                raise ChannelError(f"nothing came within {timeout_s:g} s")
            head = self._exactly(_LENGTH.size)
            if not head:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > MAX_FRAME_BYTES:
                raise ChannelError(f"a message of {length} bytes, must be at most {MAX_FRAME_BYTES}")
            return decode(self._exactly(length), max_bytes=MAX_FRAME_BYTES)
        except (OSError, FrameError) as error:
            raise ChannelError(str(error) or type(error).__name__) from None

    def close(self) -> None:
        """Ends a `receive` in another thread, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        """`count` bytes; fewer only where the other end has closed before the first of them."""
        received = bytearray()
        while len(received) < count:
            piece = self._socket.recv(min(count - len(received), 1 << 20))
            if not piece:
                if received:
                    raise ConnectionError("the connection ended within a message")
                break
            received += piece
        return bytes(received)


class Relay:
    """Rank 0's end: a listening socket, then a connection to each other sender.

    Args:
        host: the address of this machine that the other ranks reach.
        senders: how many there are, rank 0 among them.

    Raises:
        BindError: `host` is no address of this machine.
    """

    def __init__(self, host: str, senders: int) -> None:
        self.senders = senders
        self._token = secrets.token_hex(16)
        try:
            self._listener = socket.create_server((host, 0))
        except OSError as error:
            raise BindError(f"weights.host={host}: the publisher cannot listen there: {error}") from error
        self.invitation = json.dumps([host, self._listener.getsockname()[1], self._token])
        self._connections: dict[int, RelayConnection] = {}  # by rank
        self._received: queue.SimpleQueue[tuple[int, Message | ChannelError]] = queue.SimpleQueue()
        self._closing = False

    def accept(self, timeout_s: float, wake: Callable[[], None]) -> None:
        """Waits for all senders. `wake` is called, in another thread, whenever `take` has something.

        Raises RankLost, which names who did not come.
        """
        deadline = time.monotonic() + timeout_s
        while missing := sorted(set(range(1, self.senders)) - self._connections.keys()):
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connected, _ = self._listener.accept()
            except OSError:
                names = ", ".join(map(str, missing))
                raise RankLost(f"publisher of rank {names} did not come within {timeout_s:g} s") from None
            self._greet(RelayConnection(connected))
        self._listener.close()
        for rank, connection in self._connections.items():
            threading.Thread(
                target=self._read, args=(rank, connection, wake), name=f"publisher: rank {rank}", daemon=True
            ).start()

    def tell(self, message_for: Callable[[int], Message | None]) -> None:
        """Sends what `message_for` makes of each other sender's rank, if anything.

        Raises RankLost, which names the rank that is gone.
        """
        for rank, connection in self._connections.items():
            message = message_for(rank)
            try:
                if message is not None:
                    connection.send(message)
            except ChannelError as error:
                raise RankLost(f"publisher of rank {rank}: {error}") from None

    def take(self, timeout_s: float = 0.0) -> tuple[int, Message] | None:
        """(rank, message) that has come, within `timeout_s`. Raises RankLost when a rank is gone."""
        try:
            rank, message = self._received.get(timeout=timeout_s) if timeout_s > 0 else self._received.get_nowait()
        except queue.Empty:
            return None
        if isinstance(message, ChannelError):
            raise RankLost(f"publisher of rank {rank}: {message}")
        return rank, message

    def close(self) -> None:
        """Lets the other senders go: it is their order to end."""
        self._closing = True
        self._listener.close()
        for connection in self._connections.values():
            connection.close()

    def _greet(self, connection: RelayConnection) -> None:
        try:
            hello = connection.receive(GREETING_S)
        except ChannelError as error:
            log.warning("a connection to the publisher was no sender's: %s", error)
            hello = None
        if isinstance(hello, SenderHello) and hmac.compare_digest(hello.token, self._token.encode()):
            self._connections[hello.rank] = connection
        else:
            connection.close()

    def _read(self, rank: int, connection: RelayConnection, wake: Callable[[], None]) -> None:
        while True:
            try:
                message: Message | ChannelError | None = connection.receive(None)
            except ChannelError as error:
                message = error
            if self._closing:
                return
            self._received.put((rank, message or ChannelError("its connection ended")))
            wake()
            if message is None or isinstance(message, ChannelError):
                return


def join_relay(invitation: str, rank: int, timeout_s: float) -> RelayConnection:
    """Another sender's end. Raises ChannelError when rank 0 is not there."""
    host, port, token = json.loads(invitation)
    try:
        connected = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ChannelError(f"rank {rank} does not reach the publisher of rank 0 at {host}:{port}: {error}") from None
    connection = RelayConnection(connected)
    connection.send(SenderHello(rank, str(token).encode()))
    return connection
