"""The sockets of both links: a ROUTER for the desk, DEALERs for generators and trainer ranks.

One frame is one message. Sockets know nothing of sessions. Nothing here waits without a deadline, sessions resend
what matters, and a queue that is full says so instead of growing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import uuid
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator

from asyncrl.errors import BindError, ConfigError
from asyncrl.host.addresses import parse_address
from asyncrl.link import limits
from asyncrl.link.allowed_keys import AllowList, PeerKeys
from asyncrl.link.codec import encode
from asyncrl.link.curve_keys import ClientAuth, ServerAuth, public_key
from asyncrl.link.schema.message_base import Message
from asyncrl.link.socket_options import CLIENT_EVENTS, HANDSHAKE_FAILURES, LinkMonitor, bind, set_options

log = logging.getLogger(__name__)

_ZAP_DOMAIN = "asyncrl"
_ZERO_COPY_BYTES = 65_536  # below this a copy is cheaper than tracking the buffer


class ServerSocket:
    """The desk's ROUTER. For one thread.

    address: tcp://HOST:PORT (port 0 or * = any free one) or ipc://PATH. Off loopback `auth` is required: an
    unauthenticated peer could fill the memory of this process whatever the limits.
    max_frame_bytes: largest frame that is received; max_sent_bytes: largest one that is sent, the same if not said.
    Raises BindError; ConfigError when the allow-list cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        max_frame_bytes: int,
        auth: ServerAuth | None = None,
        max_sent_bytes: int | None = None,
    ) -> None:
        where = parse_address(address)
        if auth is None and not where.is_loopback:
            raise BindError(
                f"{address} can be reached from other hosts and no keys are configured: set "
                "transport.server_key_file and transport.allowed_keys_file "
                "(bin/keys make DIR makes them), or listen on 127.0.0.1"
            )
        self.max_frame_bytes = max_frame_bytes
        self.max_sent_bytes = max_sent_bytes or max_frame_bytes
        self.malformed_messages = 0  # of other than one frame
        self.frames_without_key = 0  # over connections whose key was removed from the list
        self._context = zmq.Context()
        self.keys: PeerKeys | None = None  # without keys any peer may speak for any generator
        self._authenticator: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            set_options(self._socket, where, max_frame_bytes)
            self._socket.set(zmq.ROUTER_MANDATORY, 1)  # sending to somebody unknown fails instead of vanishing
            self._socket.set(zmq.ROUTER_HANDOVER, 0)
            if auth is not None:
                self._admit_by_key(auth)
            self._link = LinkMonitor(self._context, self._socket, HANDSHAKE_FAILURES | zmq.EVENT_DISCONNECTED)
            bind(self._socket, where)
        except BaseException:
            self.close()
            raise
        endpoint = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes), endpoint
        self.address = endpoint.decode().rstrip("\0")

    def poll(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """(peer, frame) of what arrived, after waiting up to `timeout_s` for the first."""
        self._socket.poll(_milliseconds(timeout_s))
        return self.receive()

    def receive(self) -> list[tuple[bytes, bytes]]:
        """(peer, frame) of what has arrived, without waiting.

        At most DESK_DRAIN_FRAMES, and no more once they are max_frame_bytes together.
        """
        self._link.read()
        received: list[tuple[bytes, bytes]] = []
        size = 0
        while len(received) < limits.DESK_DRAIN_FRAMES and size < self.max_frame_bytes:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if len(parts) != 2:
                self.malformed_messages += 1
                continue
            peer, frame = parts[0].bytes, parts[1].bytes
            if self.keys is not None and not self.keys.note(peer, _key_of(parts[1])):
                self.frames_without_key += 1
                continue
            received.append((peer, frame))
            size += len(frame)
        return received

    def send(self, peer: bytes, frame: bytes) -> bool:
        """False when the peer is gone or its queue is full; what matters is sent again on its next beat."""
        return self._send(peer, frame) == 0

    def send_message(self, peer: bytes, message: Message) -> bool:
        """Encodes and sends, see `send`. Raises FrameError for a message that cannot be sent."""
        return self.send(peer, encode(message, max_bytes=self.max_sent_bytes))

    def reaches(self, peer: bytes, message: Message) -> bool:
        """Sends, and says whether the peer still has a connection: True for one that merely reads nothing."""
        return self._send(peer, encode(message, max_bytes=self.max_sent_bytes)) != errno.EHOSTUNREACH

    def _send(self, peer: bytes, frame: bytes) -> int:
        """0, or why not: EHOSTUNREACH, EAGAIN."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK, copy=len(frame) < _ZERO_COPY_BYTES)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return error.errno
            raise
        return 0

    @property
    def handshakes_refused(self) -> int:
        """Connections turned away: no key, a key that is not in the allow-list, or not our protocol."""
        return self._link.count(HANDSHAKE_FAILURES)

    @property
    def disconnects(self) -> int:
        """Connections that ended, by either side or because no heartbeat came."""
        return self._link.count(zmq.EVENT_DISCONNECTED)

    def close(self) -> None:
        """Closes at once; unsent frames are dropped."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)

    def _admit_by_key(self, auth: ServerAuth) -> None:
        """Starts the handler that decides on keys. Before the bind: without a handler libzmq would accept every key."""
        allowed = AllowList(auth.allowed_keys_file)
        self.keys = PeerKeys(allowed)
        self._authenticator = ThreadAuthenticator(self._context, log=log)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, allowed)
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, auth.secret_key)
        self._socket.set(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
        self._socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


class SocketPoller:
    """Waits for several sockets and file descriptors (a wake-up of a signal or a thread) at once."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._sources: dict[Any, ServerSocket | ClientSocket | int] = {}

    def add(self, source: ServerSocket | ClientSocket | int) -> None:
        """Adds a socket or a readable file descriptor. A client socket that reconnects must be added anew."""
        handle = source if isinstance(source, int) else source._socket
        self._poller.register(handle, zmq.POLLIN)
        self._sources[handle] = source

    def wait(self, timeout_s: float) -> list[ServerSocket | ClientSocket | int]:
        """The sources that have something to read, after at most `timeout_s`."""
        return [self._sources[handle] for handle, _ in self._poller.poll(_milliseconds(timeout_s))]


class _Dealer:
    """A DEALER that can be replaced by a fresh one, whose routing id the ROUTER has no stale state for.

    Raises BindError for an address that cannot be, ConfigError when it needs keys and there are none.
    """

    _socket_class: type[zmq.Socket[Any]] = zmq.Socket
    _socket: Any  # of that class

    def __init__(self, address: str, *, max_frame_bytes: int, auth: ClientAuth | None = None) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._auth = auth
        self._point_to(address)
        self._context = zmq.Context()
        self._connect()

    def reconnect(self, address: str = "") -> None:
        """Drops the connection and makes a new one under a new routing id; the session must say hello again.

        With an `address` it goes there instead. Raises as the constructor does, and changes nothing then. Only the
        thread or task that receives may call this: a receive under way elsewhere would be cancelled.
        """
        if address:
            self._point_to(address)
        self._link.close()
        self._socket.close(linger=0)
        self._connect()

    def _point_to(self, address: str) -> None:
        where = parse_address(address)
        if self._auth is None and not where.is_loopback:
            raise ConfigError(
                f"{address} is not on this host and no keys are configured: set "
                "transport.client_key_file and transport.server_public_key_file"
            )
        self._where = where
        self.address = address

    @property
    def link(self) -> str:
        """The state of the connection, in words: "up", or why not."""
        return self._link.status

    @property
    def connects(self) -> int:
        """How often this socket has connected since it was made."""
        return self._link.count(zmq.EVENT_HANDSHAKE_SUCCEEDED)

    @property
    def disconnects(self) -> int:
        """How often this connection ended, by either side or because no heartbeat came."""
        return self._link.count(zmq.EVENT_DISCONNECTED)

    def _close_socket(self, flush_s: float) -> None:
        """Closes the socket; terminating its context then waits until all is sent, but no longer than `flush_s`."""
        self._link.close()
        self._socket.close(linger=_milliseconds(flush_s))

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.DEALER, socket_class=self._socket_class)
        set_options(self._socket, self._where, self.max_frame_bytes)
        # Ids that start with a zero byte are reserved by libzmq.
        self._socket.set(zmq.ROUTING_ID, b"a" + uuid.uuid4().bytes)
        if self._auth is not None:
            self._socket.set(zmq.CURVE_SERVERKEY, self._auth.server_public_key)
            self._socket.set(zmq.CURVE_SECRETKEY, self._auth.secret_key)
            self._socket.set(zmq.CURVE_PUBLICKEY, public_key(self._auth.secret_key))
        self._link = LinkMonitor(self._context, self._socket, CLIENT_EVENTS, self._socket_class)
        self._socket.connect(self._where.text)


class ClientSocket(_Dealer):
    """A DEALER for one thread: the trainer link."""

    def send(self, frame: bytes, timeout_s: float = 1.0) -> bool:
        """False when it could not be queued within `timeout_s`: no connection, or the peer reads nothing."""
        if not self._socket.poll(_milliseconds(timeout_s), zmq.POLLOUT):
            return False
        try:
            self._socket.send(frame, zmq.NOBLOCK, copy=len(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        return True

    def recv(self, timeout_s: float) -> bytes | None:
        """The next frame, None when none came within `timeout_s`."""
        self._link.read()
        if not self._socket.poll(_milliseconds(timeout_s)):
            return None
        try:
            frame: bytes = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return frame

    def close(self, flush_s: float = 0.0) -> None:
        """Closes; what is queued gets `flush_s` to leave."""
        self._close_socket(flush_s)
        self._context.term()


class AsyncClientSocket(_Dealer):
    """A DEALER for the generator's event loop. Make it inside the running loop."""

    _socket_class = zmq.asyncio.Socket

    def _connect(self) -> None:
        super()._connect()
        self._poller = zmq.asyncio.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._link.pair, zmq.POLLIN)

    def send(self, frame: bytes) -> bool:
        """False when the frame was not queued: no connection, or the queue is full."""
        # With NOBLOCK the future is done on return; a future that is not would send at some later time.
        future = self._socket.send(frame, zmq.NOBLOCK, copy=len(frame) < _ZERO_COPY_BYTES)
        if not future.done():
            future.cancel()
            return False
        error = future.exception()
        if error is not None and not isinstance(error, zmq.Again):
            raise error
        return error is None

    def send_message(self, message: Message) -> bool:
        """Encodes and sends, see `send`. Raises FrameError for a message that cannot be sent."""
        return self.send(encode(message, max_bytes=self.max_frame_bytes))

    async def receive(self, timeout_s: float, known_connects: int | None = None) -> list[bytes]:
        """Frames that arrived, after waiting up to `timeout_s` for the first. Cancelling it loses none.

        It ends early, without frames, when the connection changes, and where there are more `connects` by now than the
        caller knows of.
        """
        # Reading takes the event away that would end the wait: a connection since the caller looked ends it here.
        if self.connects > (math.inf if known_connects is None else known_connects):
            return []
        # Poll, then take: a receive that is cancelled could already hold a frame.
        await self._poller.poll(_milliseconds(timeout_s))
        frames: list[bytes] = []
        with contextlib.suppress(zmq.Again):
            while len(frames) < limits.DRAIN_FRAMES:
                frames.append(self._socket.recv(zmq.NOBLOCK).result())
        return frames

    async def close(self, flush_s: float = 0.0) -> None:
        """Closes; what is queued gets `flush_s` to leave."""
        self._close_socket(flush_s)
        await asyncio.to_thread(self._context.term)


def _key_of(frame: zmq.Frame) -> bytes:
    """The public key that the connection of this frame proved."""
    key = frame.get("User-Id")
    assert isinstance(key, str), key
    return key.encode()


def _milliseconds(timeout_s: float) -> int:
    """Rounded up, so that a short wait is not a busy loop. Never negative, which would mean for ever."""
    return max(0, math.ceil(timeout_s * 1000))
