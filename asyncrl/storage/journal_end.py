"""Where the acknowledged part of the journal ends: a small file beside the segments, written after each group commit.

A segment that was cut short ends like one that a crash cut in mid-write, and a last segment that is gone leaves no gap.
This file tells them apart. It is not made durable by itself: after a power loss it may name an earlier place, never a
later one, because it is written after the segment was.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from asyncrl.storage.journal_reader import Location

END_FILE = "end"

_END = struct.Struct("<QQI")  # segment, bytes of it, checksum of both


class JournalEnd:
    """The file of one journal. `place` is what it said when it was opened; None when it said nothing that is whole."""

    def __init__(self, folder: Path) -> None:
        """Makes the file if there is none. Raises OSError."""
        self._fd = os.open(folder / END_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        self.place = _decoded(os.pread(self._fd, _END.size, 0))

    def move(self, segment: int, num_bytes: int) -> None:
        """The first num_bytes of `segment`, and all before it, are durable. Raises OSError."""
        os.pwrite(self._fd, _encoded(segment, num_bytes), 0)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


def _encoded(segment: int, num_bytes: int) -> bytes:
    checksum = zlib.crc32(_END.pack(segment, num_bytes, 0))
    return _END.pack(segment, num_bytes, checksum)


def _decoded(data: bytes) -> Location | None:
    if len(data) != _END.size:
        return None
    segment, num_bytes, _ = _END.unpack(data)
    return Location(segment, num_bytes) if _encoded(segment, num_bytes) == data else None
