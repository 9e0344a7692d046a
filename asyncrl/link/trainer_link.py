"""The link from a trainer rank (or the publisher thread) to the desk: whole messages over a socket on the same host."""

from __future__ import annotations

import contextlib
import os

from asyncrl.link.codec import decode, encode
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ClientSocket, SocketPoller

MAX_FRAME_BYTES = 2**31 - 1  # a batch may be large, and this link never leaves the host
SEND_TIMEOUT_S = 30.0
STORE_FD = "ASYNCRL_STORE_FD"  # names the listening socket that rank 0 gets from its parent, at which all ranks meet
LAST_WORDS = "cannot train: "  # begins what a trainer prints when starting it again would change nothing


class TrainerLink:
    """Messages to and from the desk, for one thread. Another thread can end a wait early by the eventfd `wake_fd`."""

    def __init__(self, address: str, wake_fd: int | None = None) -> None:
        self._socket = ClientSocket(address, max_frame_bytes=MAX_FRAME_BYTES)
        self._wake_fd = wake_fd
        self._poller = SocketPoller()
        self._poller.add(self._socket)
        if wake_fd is not None:
            self._poller.add(wake_fd)

    def send(self, message: Message) -> bool:
        """False when the desk took nothing for SEND_TIMEOUT_S; whatever matters is asked for again."""
        return self._socket.send(encode(message, max_bytes=MAX_FRAME_BYTES), SEND_TIMEOUT_S)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None after `timeout_s`, or when the wake-up came first. Raises FrameError."""
        ready = self._poller.wait(timeout_s)
        if self._wake_fd is not None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        if self._socket not in ready:
            return None
        frame = self._socket.recv(0.0)
        return None if frame is None else decode(frame, max_bytes=MAX_FRAME_BYTES)

    def close(self, flush_s: float = 0.0) -> None:
        """Closes; messages not yet sent get `flush_s` to leave."""
        self._socket.close(flush_s)
