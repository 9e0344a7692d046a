"""How records lie in a journal segment, and how whole ones are found again after damage.

A segment is a header and then frames ``magic | length | checksum | kind | payload`` (little-endian). The checksum is a
crc32 of length, kind and payload that starts from the segment's random salt: rollouts hold text from elsewhere, and
bytes in them that look like a frame must not be taken for one when the frame around them is damaged.

Without the salt no record of a segment can be checked, so the header is there twice, each copy with its own checksum:
``MAGIC | copy | copy``, a copy being ``number | bytes of the segment before | salt | checksum``. Segments of the first
format are ``MAGIC_1 | salt`` and are read as well.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from asyncrl.errors import JournalError
from asyncrl.storage.records import Record, RecordKind, decode, without_body

MAGIC_1 = b"asyncrl journal 1\n"
MAGIC = b"asyncrl journal 2\n"
FRAME_BYTES = 13

_SALT = struct.Struct("<I")
_COPY = struct.Struct("<QQII")  # number, bytes of the segment before, salt, checksum of MAGIC and these
_FRAME_MAGIC = b"\xa7RJ\x1e"
_FRAME = struct.Struct("<4sIIB")  # magic, payload length, checksum, kind
_CHECKED = struct.Struct("<IB")  # what the checksum covers besides the payload

HEADER_BYTES_1 = len(MAGIC_1) + _SALT.size
HEADER_BYTES = len(MAGIC) + 2 * _COPY.size

assert _FRAME.size == FRAME_BYTES and len(MAGIC) == len(MAGIC_1)


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says about itself.

    number and previous_bytes (the size that the segment before had when this one was begun) are None in a segment of
    the first format. damaged: one of the copies, or the magic, is not what was written.
    """

    salt: int
    num_bytes: int
    number: int | None = None
    previous_bytes: int | None = None
    damaged: bool = False


def new_header(number: int, previous_bytes: int) -> bytes:
    """The first bytes of a new segment; previous_bytes is the size of the one before, 0 where there is none."""
    (salt,) = _SALT.unpack(os.urandom(_SALT.size))
    return MAGIC + 2 * _copy(number, previous_bytes, salt)


def _copy(number: int, previous_bytes: int, salt: int) -> bytes:
    checksum = zlib.crc32(_COPY.pack(number, previous_bytes, salt, 0), zlib.crc32(MAGIC))
    return _COPY.pack(number, previous_bytes, salt, checksum)


def read_header(data: bytes) -> Header:
    """The header that a segment begins with. Raises JournalError when there is none, or nothing of it is whole."""
    copies = [data[start : start + _COPY.size] for start in (len(MAGIC), len(MAGIC) + _COPY.size)]
    for copy in copies:
        if len(copy) == _COPY.size:
            number, previous_bytes, salt, _ = _COPY.unpack(copy)
            if _copy(number, previous_bytes, salt) == copy:
                damaged = copies[0] != copies[1] or not data.startswith(MAGIC)
                return Header(salt, HEADER_BYTES, number, previous_bytes, damaged)
    if data.startswith(MAGIC_1) and len(data) >= HEADER_BYTES_1:
        (salt,) = _SALT.unpack_from(data, len(MAGIC_1))
        return Header(salt, HEADER_BYTES_1)
    if data.startswith(MAGIC):
        raise JournalError("has a damaged header")
    raise JournalError(f"begins with {data[: len(MAGIC)]!r}, a journal segment begins with {MAGIC!r}")


def is_begun_header(data: bytes) -> bool:
    """Whether all of `data` is the beginning of a header: what a crash leaves while a segment is made."""
    begun = data[: len(MAGIC)]
    return len(data) < HEADER_BYTES and (MAGIC.startswith(begun) or (MAGIC_1.startswith(begun) and data == begun))


def read_salt(data: bytes) -> int:
    """The salt in a segment's header. Raises JournalError when the data does not begin with a header."""
    return read_header(data).salt


def encode(record: Record, salt: int) -> bytes:
    """The frame of a record in the segment with this salt."""
    payload = record.payload()
    checksum = _checksum(payload, record.kind, salt)
    return _FRAME.pack(_FRAME_MAGIC, len(payload), checksum, record.kind) + payload


def payload_bytes(frame: bytes) -> int:
    """The payload length that the first `FRAME_BYTES` of a frame state; 0 when there are fewer."""
    return int(_FRAME.unpack_from(frame)[1]) if len(frame) >= FRAME_BYTES else 0


def is_cut_frame(data: bytes, offset: int) -> bool:
    """Whether what begins at offset is a frame that the end of the data cuts off, as an unfinished write leaves it."""
    head = data[offset : offset + FRAME_BYTES]
    if len(head) < FRAME_BYTES:
        return _FRAME_MAGIC.startswith(head[: len(_FRAME_MAGIC)])
    return head.startswith(_FRAME_MAGIC) and offset + FRAME_BYTES + payload_bytes(head) > len(data)


def scan(data: bytes, *, bodies: bool = True) -> Iterator[tuple[int, int, Record | None]]:
    """Spans [offset, end) of a segment, in order: a whole record each, or None for bytes that are none.

    Without `bodies` those of groups are checked, too, and left out: their records have an empty one.
    """
    header = read_header(data)
    offset = header.num_bytes
    while offset < len(data):
        whole = whole_record(data, offset, header.salt, bodies=bodies)
        if whole is not None:
            end, record = whole
        else:
            end, record = _next_whole(data, offset + 1, header.salt), None
        yield offset, end, record
        offset = end


def whole_record(data: bytes, offset: int, salt: int, *, bodies: bool = True) -> tuple[int, Record] | None:
    """(end, record) of the record that begins at offset, or None when there is no whole one; `bodies` as in `scan`."""
    if len(data) - offset < FRAME_BYTES:
        return None
    magic, length, checksum, kind = _FRAME.unpack_from(data, offset)
    start = offset + FRAME_BYTES
    if magic != _FRAME_MAGIC or start + length > len(data):
        return None
    payload = memoryview(data)[start : start + length]
    if _checksum(payload, kind, salt) != checksum:
        return None
    needed = bytes(payload) if bodies or kind != RecordKind.GROUP else without_body(payload)
    return start + length, decode(kind, needed)


def _next_whole(data: bytes, offset: int, salt: int) -> int:
    """Where the first whole record at or after offset begins, or the end of the data.

    Lengths in a damaged frame are not believed: one that happens to point at the end would hide what lies between.
    """
    while (offset := data.find(_FRAME_MAGIC, offset)) >= 0:
        if whole_record(data, offset, salt):
            return offset
        offset += 1
    return len(data)


def _checksum(payload: bytes | memoryview, kind: int, salt: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(len(payload), kind), salt))
