"""Frames through the pipes between a daemon and a child that runs foreign code: both ends of both pipes.

A frame is a length (uint32, little-endian) and a body. What comes from the child is not trusted: foreign code runs in
there, and may write to the pipe.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import TypeVar

from asyncrl.errors import ProtocolError

_T = TypeVar("_T")

LENGTH = struct.Struct("<I")


def framed(body: bytes) -> bytes:
    """The frame around a body."""
    return LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Bytes of a child's pipe, cut into frames of at most `max_frame_bytes`."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Adds what was read."""
        self._bytes += chunk

    def clear(self) -> None:
        """Forgets what was read: it came from a child that is gone."""
        self._bytes.clear()

    def take(self, decode: Callable[[bytes], _T]) -> list[_T]:
        """The messages that are there in whole. Raises ProtocolError where the first of them is none."""
        messages: list[_T] = []
        start = 0
        try:
            while (body := self._body_at(start)) is not None:
                messages.append(decode(body))
                start += LENGTH.size + len(body)
        except ProtocolError:
            if not messages:
                raise
        del self._bytes[:start]
        return messages

    def _body_at(self, start: int) -> bytes | None:
        if len(self._bytes) - start < LENGTH.size:
            return None
        (size,) = LENGTH.unpack_from(self._bytes, start)
        if size > self._max_frame_bytes:
            raise ProtocolError(f"a result in the pipe has {size} bytes, over the limit of {self._max_frame_bytes}")
        begin = start + LENGTH.size
        return bytes(self._bytes[begin : begin + size]) if len(self._bytes) - begin >= size else None


# -- the child's ends ------------------------------------------------------------------------------------------------


def private_pipes() -> tuple[int, int]:
    """Moves the daemon's pipes away from stdin and stdout: foreign code that prints or reads must not disturb them.

    Returns the descriptors to read jobs from and to write results to. What is printed goes to stderr from now on.
    """
    jobs, results = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return jobs, results


def read_frame(fd: int) -> bytes | None:
    """The body of the next frame; None when the daemon has closed the pipe. Waits for it."""
    header = _read_exactly(fd, LENGTH.size)
    return None if header is None else _read_exactly(fd, LENGTH.unpack(header)[0])


def write_frame(fd: int, body: bytes) -> None:
    """Writes one frame. Raises BrokenPipeError when the daemon is gone."""
    frame = memoryview(framed(body))
    while frame:
        frame = frame[os.write(fd, frame) :]


def _read_exactly(fd: int, size: int) -> bytes | None:
    chunks = []
    while size:
        chunk = os.read(fd, size)
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
