"""How records lie in a journal segment, and how whole ones are found again after damage.

A segment is ``MAGIC | salt`` and then frames ``magic | length | checksum | kind | payload`` (little-endian). The
checksum is a crc32 of length, kind and payload that starts from the segment's random salt: rollouts hold text from
elsewhere, and bytes in them that look like a frame must not be taken for one when the frame around them is damaged.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator

from asyncrl.errors import JournalError
from asyncrl.storage.records import Record, decode

MAGIC = b"asyncrl journal 1\n"
HEADER_BYTES = len(MAGIC) + 4
FRAME_BYTES = 13

_SALT = struct.Struct("<I")
_FRAME_MAGIC = b"\xa7RJ\x1e"
_FRAME = struct.Struct("<4sIIB")  # magic, payload length, checksum, kind
_CHECKED = struct.Struct("<IB")  # what the checksum covers besides the payload

assert _FRAME.size == FRAME_BYTES and _SALT.size == HEADER_BYTES - len(MAGIC)


def new_header() -> bytes:
    """The first bytes of a new segment."""
    return MAGIC + os.urandom(_SALT.size)


def read_salt(data: bytes) -> int:
    """The salt in a segment's header. Raises JournalError when the data does not begin with a header."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise JournalError(f"begins with {data[: len(MAGIC)]!r}, a journal segment begins with {MAGIC!r}")
    (salt,) = _SALT.unpack_from(data, len(MAGIC))
    return int(salt)


def encode(record: Record, salt: int) -> bytes:
    """The frame of a record in the segment with this salt."""
    payload = record.payload()
    checksum = _checksum(payload, record.kind, salt)
    return _FRAME.pack(_FRAME_MAGIC, len(payload), checksum, record.kind) + payload


def payload_bytes(frame: bytes) -> int:
    """The payload length that the first `FRAME_BYTES` of a frame state; 0 when there are fewer."""
    return int(_FRAME.unpack_from(frame)[1]) if len(frame) >= FRAME_BYTES else 0


def scan(data: bytes) -> Iterator[tuple[int, int, Record | None]]:
    """Spans [offset, end) of a segment, in order: a whole record each, or None for bytes that are none."""
    salt = read_salt(data)
    offset = HEADER_BYTES
    while offset < len(data):
        whole = whole_record(data, offset, salt)
        if whole is not None:
            end, record = whole
        else:
            end, record = _next_whole(data, offset + 1, salt), None
        yield offset, end, record
        offset = end


def whole_record(data: bytes, offset: int, salt: int) -> tuple[int, Record] | None:
    """(end, record) of the record that begins at offset, or None when there is no whole one."""
    if len(data) - offset < FRAME_BYTES:
        return None
    magic, length, checksum, kind = _FRAME.unpack_from(data, offset)
    start = offset + FRAME_BYTES
    if magic != _FRAME_MAGIC or start + length > len(data):
        return None
    payload = data[start : start + length]
    if _checksum(payload, kind, salt) != checksum:
        return None
    return start + length, decode(kind, payload)


def _next_whole(data: bytes, offset: int, salt: int) -> int:
    """Where the first whole record at or after offset begins, or the end of the data.

    Lengths in a damaged frame are not believed: one that happens to point at the end would hide what lies between.
    """
    while (offset := data.find(_FRAME_MAGIC, offset)) >= 0:
        if whole_record(data, offset, salt):
            return offset
        offset += 1
    return len(data)


def _checksum(payload: bytes, kind: int, salt: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(len(payload), kind), salt))
