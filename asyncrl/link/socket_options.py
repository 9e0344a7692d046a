"""What all sockets of the two links share: their options, their bind, and a record of what the link did."""

from __future__ import annotations

import errno
import os
import socket as unix_sockets
from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from asyncrl.errors import BindError
from asyncrl.host.addresses import Address
from asyncrl.link import limits

HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

_CLIENT_EVENTS: dict[int, str] = {
    zmq.EVENT_CONNECTED: "connected, waiting for the handshake",
    zmq.EVENT_CONNECT_RETRIED: "nothing answers at this address",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "up",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the learner does not admit this key (transport.allowed_keys_file)",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake refused: one side uses keys and the other none",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake broken off: wrong server key, or one side has no keys",
    zmq.EVENT_DISCONNECTED: "disconnected",
}
_REASONS = tuple(text for event, text in _CLIENT_EVENTS.items() if event & HANDSHAKE_FAILURES)
_RETRIES = (zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_DISCONNECTED)
CLIENT_EVENTS: int = sum(_CLIENT_EVENTS)


def set_options(socket: zmq.Socket[bytes], address: Address, max_frame_bytes: int) -> None:
    """The options of one end. Must run before bind or connect.

    Only DEALERs ask for heartbeats. libzmq 4.3.5 aborts the process that sends one to a peer which hung up while the
    frames it had sent were still unread (`!_io_error`, stream_engine_base.cpp). A desk that stands still for seconds
    meets such peers; it never pings, and drops a silent one by the time to live that the peer's own pings carry. A
    DEALER has a queue so long that it is never full while its owner reads at all.
    """
    is_desk = socket.get(zmq.TYPE) == zmq.ROUTER
    for option, value in (
        (zmq.LINGER, 0),  # flushing is the session's work: a close that waits could wait for ever
        (zmq.IMMEDIATE, 1),  # queue nothing for a peer that is not there
        (zmq.SNDHWM, limits.SEND_QUEUE_FRAMES),
        (zmq.RCVHWM, limits.DESK_RECEIVE_QUEUE_FRAMES if is_desk else limits.PEER_RECEIVE_QUEUE_FRAMES),
        (zmq.MAXMSGSIZE, max_frame_bytes),
        (zmq.HEARTBEAT_IVL, 0 if is_desk else limits.HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, limits.HEARTBEAT_TIMEOUT_MS),
        (zmq.HEARTBEAT_TTL, limits.HEARTBEAT_TTL_MS),
        (zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS),
        (zmq.CONNECT_TIMEOUT, limits.CONNECT_TIMEOUT_MS),
        (zmq.TCP_MAXRT, limits.TCP_MAX_RETRANSMIT_MS),
        (zmq.RECONNECT_IVL, limits.RECONNECT_MS),
        (zmq.RECONNECT_IVL_MAX, limits.RECONNECT_MAX_MS),
        (zmq.BACKLOG, limits.BACKLOG),
        (zmq.IPV6, int(":" in address.host)),
    ):
        socket.set(option, value)


def bind(socket: zmq.Socket[bytes], address: Address) -> None:
    """Listens on `address`. Raises BindError naming the address and the remedy."""
    if address.path:
        _refuse_live_listener(address)
    try:
        socket.bind(address.text)
        if address.path:
            os.chmod(address.path, 0o600)
    except (zmq.ZMQError, OSError) as error:
        remedy = {
            errno.EADDRINUSE: "another process listens there: stop it, or choose another port",
            errno.EADDRNOTAVAIL: "no interface of this host has this address: see `ip addr`",
            errno.ENODEV: "no interface of this host has this address: see `ip addr`",
            errno.EACCES: "not permitted: use a port above 1023, or a folder you may write",
            errno.ENOENT: "the folder does not exist",
        }.get(error.errno or 0, "choose another address")
        raise BindError(f"cannot listen on {address.text}: {error.strerror or error}; {remedy}") from error


def _refuse_live_listener(address: Address) -> None:
    """Raises BindError while another process listens there.

    libzmq replaces an existing socket file, so a second learner would silently cut off the first.
    """
    with unix_sockets.socket(unix_sockets.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.path)
        except OSError:
            return
    raise BindError(f"cannot listen on {address.text}: another process does: stop it, or use another run.dir")


class LinkMonitor:
    """Counts what happened to the connections of one socket. Read from the thread that owns the socket.

    `pair` becomes readable when something has happened. pair_class: that of what waits for it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        events: int,
        pair_class: type[zmq.Socket[Any]] = zmq.Socket,
    ) -> None:
        endpoint = f"inproc://monitor-{id(self)}"
        self._socket = socket
        socket.monitor(endpoint, events)
        self.pair = context.socket(zmq.PAIR, socket_class=pair_class)
        self._pair: zmq.Socket[bytes] = zmq.Socket.shadow(self.pair)  # one that is read at once, whatever its class
        # Without a limit: the I/O thread of libzmq would otherwise block on a full queue of events.
        self.pair.set(zmq.RCVHWM, 0)
        self.pair.connect(endpoint)
        self._counts: Counter[int] = Counter()
        self._status = "connecting"

    def read(self) -> None:
        """Takes in what happened since the last call."""
        while True:
            try:
                parts = self._pair.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = int(parse_monitor_message(parts)["event"])
            self._counts[event] += 1
            # What comes after a refused handshake are retries: they must not hide its reason.
            hides_reason = event in _RETRIES and self._status in _REASONS
            if event in _CLIENT_EVENTS and not hides_reason:
                self._status = _CLIENT_EVENTS[event]

    def count(self, events: int) -> int:
        """How often any of `events` (a bit mask) happened."""
        self.read()
        return sum(number for event, number in self._counts.items() if event & events)

    @property
    def status(self) -> str:
        """The state of a client's link, in words."""
        self.read()
        return self._status

    def close(self) -> None:
        """To be called before the socket is closed. Idempotent."""
        # In this order: an event that finds nobody at the other end blocks the I/O thread of libzmq for ever, and with
        # it every later connection of this process.
        self._socket.disable_monitor()
        self.pair.close(linger=0)
