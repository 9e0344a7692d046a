r"""Frames: a fixed header and a msgpack body.

    offset  0  magic      4 bytes  b"aRL\x01"
            4  format     u16      of this header; the message schema has its own version, in Hello
            6  wire_code  u16      names the message class
            8  flags      u32      0
           12  body_len   u64
           20  crc32      u32      of the header before this field and of the body
           24  reserved   8 bytes  zeros

The body is the array of the message's fields in the order of declaration. Trailing fields that have defaults may be
missing, so an older peer and an old journal stay readable. A frame can express nothing that could be executed.
"""

from __future__ import annotations

import functools
import struct
import zlib
from typing import Any, TypeVar

import msgpack

from asyncrl.errors import FrameError
from asyncrl.link import messages, trainer_messages
from asyncrl.link.field_checks import Convert, Mismatch, PlannedField, RecordPlan, plan_of, shown
from asyncrl.link.schema.body_limits import check_body
from asyncrl.link.schema.message_base import Message, message_types

HEADER_BYTES = 32

_MAGIC = b"aRL\x01"
_FORMAT = 1
_CHECKED = struct.Struct("<4sHHIQ")  # the part of the header that the crc covers
_CRC = struct.Struct("<I8s")
_RESERVED = bytes(8)
_SCHEMA = (messages, trainer_messages)  # imported here, so that every class is registered wherever frames are read
_UPGRADE = "run the same asyncrl version on both ends"

M = TypeVar("M", bound=Message)


def encode(message: Message, *, max_bytes: int) -> bytes:
    """The frame of `message`.

    Raises FrameError when a field has the wrong type or the frame is over `max_bytes`.
    """
    return frame_with_body(type(message), encode_body(message), max_bytes=max_bytes)


def decode(frame: bytes | memoryview, *, max_bytes: int, allowed: frozenset[type[Message]] | None = None) -> Message:
    """The message in `frame`, fully checked. `allowed` limits the classes this peer may send (None = all).

    Raises FrameError; nothing of a bad frame is used.
    """
    cls, body = _open(frame, max_bytes, allowed)
    return decode_body(cls, body)


def body_of(frame: bytes | memoryview) -> memoryview:
    """The body of a frame that `decode` accepted, without a copy.

    This is what the journal keeps and what Batch.groups carries.
    """
    return memoryview(frame)[HEADER_BYTES:]


def frame_with_body(cls: type[Message], body: bytes | memoryview, *, max_bytes: int) -> bytes:
    """A frame of class `cls` around an encoded body. Raises FrameError when it is over `max_bytes`."""
    assert _classes().get(cls.wire_code) is cls, f"{cls.__name__} is not a registered message"
    size = HEADER_BYTES + len(body)
    if size > max_bytes:
        raise FrameError(
            f"{cls.__name__} of {size} bytes is over the limit of {max_bytes}: raise "
            "transport.max_frame_bytes on both ends, or make groups smaller"
        )
    head = _CHECKED.pack(_MAGIC, _FORMAT, cls.wire_code, 0, len(body))
    return b"".join((head, _CRC.pack(zlib.crc32(body, zlib.crc32(head)), _RESERVED), body))


def encode_body(message: Message) -> bytes:
    """The body of `message`. Raises FrameError when a field's type is not the declared one."""
    plan = plan_of(type(message))
    values = [_converted(plan, field, field.form.to_wire, getattr(message, field.name)) for field in plan.fields]
    try:
        body: bytes = msgpack.packb(values, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"{plan.name}: cannot be encoded: {error}") from error
    return body


def decode_body(cls: type[M], body: bytes | memoryview) -> M:
    """The message of class `cls` whose encoded body is `body`. Raises FrameError."""
    plan = plan_of(cls)
    values = _unpack(plan.name, body)
    if type(values) is not list:
        raise FrameError(f"{plan.name}: the body is {shown(values)}, not an array of fields")
    if not plan.required <= len(values) <= len(plan.fields):
        raise FrameError(
            f"{plan.name}: {len(values)} fields, must be {plan.required} to {len(plan.fields)}; {_UPGRADE}"
        )
    # strict=False: trailing fields with defaults may be missing.
    pairs = zip(plan.fields, values, strict=False)
    return cls(*[_converted(plan, field, field.form.from_wire, value) for field, value in pairs])


def _open(
    frame: bytes | memoryview, max_bytes: int, allowed: frozenset[type[Message]] | None
) -> tuple[type[Message], memoryview]:
    """Class and body of a frame, after every check that does not need the body decoded."""
    size = len(frame)
    if not HEADER_BYTES <= size <= max_bytes:
        raise FrameError(f"frame of {size} bytes, must be {HEADER_BYTES} to {max_bytes}")
    magic, frame_format, code, flags, body_len = _CHECKED.unpack_from(frame)
    crc, reserved = _CRC.unpack_from(frame, _CHECKED.size)
    if magic != _MAGIC:
        raise FrameError(f"frame starts with {magic!r}, not {_MAGIC!r}: the peer is not asyncrl")
    if frame_format != _FORMAT or flags or reserved != _RESERVED:
        raise FrameError(f"frame format {frame_format}, flags {flags:#x}, must be {_FORMAT} and 0; {_UPGRADE}")
    if body_len != size - HEADER_BYTES:
        raise FrameError(f"header says {body_len} body bytes, the frame holds {size - HEADER_BYTES}")
    cls = _classes().get(code)
    if cls is None:
        raise FrameError(f"unknown message code {code}; {_UPGRADE}")
    if allowed is not None and cls not in allowed:
        raise FrameError(f"{cls.__name__} is not a message this peer may send")
    view = memoryview(frame)
    body = view[HEADER_BYTES:]
    actual = zlib.crc32(body, zlib.crc32(view[: _CHECKED.size]))
    if actual != crc:
        raise FrameError(f"{cls.__name__}: crc32 is {actual:#010x}, the header says {crc:#010x}")
    return cls, body


def _unpack(name: str, body: bytes | memoryview) -> Any:
    size = len(body)
    try:
        check_body(body)
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_ext,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=size,
            max_map_len=size,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise FrameError(f"{name}: body of {size} bytes is not valid: {str(error)[:200]}") from error


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _converted(plan: RecordPlan, field: PlannedField, convert: Convert, value: Any) -> Any:
    try:
        return convert(value)
    except Mismatch as bad:
        raise FrameError(f"{plan.name}.{field.name}{bad.where} {bad.says}") from None


@functools.cache
def _classes() -> dict[int, type[Message]]:
    return message_types()
