"""A walk over the type bytes of a msgpack body, before any object of it is built.

msgpack bounds each container but not their sum: it turns 10 MB of empty arrays into 700 MiB of objects, and
a few kilobytes of nested array headers into as much. Here the number of objects and the depth are bounded.
"""

from __future__ import annotations

MAX_DEPTH = 16
BASE_OBJECTS = 65_536  # objects any body may hold; large bodies get one more for each 16 bytes

_LONG_STRING = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bin and str: bytes of the length
_LONG_CONTAINER = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}  # array and map: bytes of the length


def _scalar_sizes() -> tuple[int, ...]:
    """Bytes of the object that starts with each type byte; 0 = a container, a long string, or forbidden."""
    sizes = [0] * 256
    for code in (*range(0x80), 0xC0, 0xC2, 0xC3, *range(0xE0, 0x100)):  # small integers, nil, booleans
        sizes[code] = 1
    for code in range(0xA0, 0xC0):  # short strings
        sizes[code] = 1 + (code & 0x1F)
    for first in (0xCC, 0xD0):  # unsigned and signed integers of 1, 2, 4 and 8 bytes
        for power in range(4):
            sizes[first + power] = 1 + (1 << power)
    sizes[0xCA], sizes[0xCB] = 5, 9  # floats
    return tuple(sizes)


_SCALAR_SIZE = _scalar_sizes()


def check_body(body: bytes | memoryview) -> None:
    """Raises ValueError unless `body` is one complete object within the limits.

    About 0.1 us per object, whatever the size of its strings.
    """
    end = len(body)
    budget = BASE_OBJECTS + end // 16
    pos, remaining = 0, 1  # objects still to read in the innermost container
    outer: list[int] = []  # the same for the containers around it
    while remaining or outer:
        if not remaining:
            remaining = outer.pop()
            continue
        remaining -= 1
        if pos >= end:
            raise ValueError("truncated")
        code = body[pos]
        size = _SCALAR_SIZE[code]
        if size:
            pos += size
        elif code in _LONG_STRING:
            width = _LONG_STRING[code]
            pos += 1 + width + int.from_bytes(body[pos + 1 : pos + 1 + width], "big")
        else:
            children, pos = _children(body, pos, code)
            budget -= children
            if children > end - pos or budget < 0 or len(outer) >= MAX_DEPTH:
                raise ValueError(
                    f"container of {children} objects at depth {len(outer)}, {max(0, end - pos)} bytes left: "
                    f"at most {MAX_DEPTH} levels and {BASE_OBJECTS} objects plus one for each 16 bytes"
                )
            outer.append(remaining)
            remaining = children
    if pos != end:
        raise ValueError("truncated" if pos > end else f"{end - pos} bytes follow the last object")


def _children(body: bytes | memoryview, pos: int, code: int) -> tuple[int, int]:
    """Number of objects in the container at `pos`, and the position of the first."""
    if 0x80 <= code <= 0x8F:
        return 2 * (code & 0x0F), pos + 1
    if 0x90 <= code <= 0x9F:
        return code & 0x0F, pos + 1
    width = _LONG_CONTAINER.get(code)
    if width is None:
        raise ValueError(f"type byte {code:#04x} is not allowed")
    length = int.from_bytes(body[pos + 1 : pos + 1 + width], "big")
    return (length if code <= 0xDD else 2 * length), pos + 1 + width
