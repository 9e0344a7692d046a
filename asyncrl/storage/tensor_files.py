"""Safetensors files without torch: written from memory as it is, hashed on the way, read piece by piece.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place), then the
tensors one after the other. The library's own writer makes a second copy of all of them in memory first.

A file may hold pieces of tensors. Its header then says where each lies in its whole, as torch.distributed.checkpoint
(`HuggingFaceStorageWriter` of torch 2.13) does, so that its reader understands these files, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
SHARDING = "DCP_SHARDING_INFO"  # a header's metadata: {name: {SAVED_OFFSETS: [...]}} as JSON
SAVED_OFFSETS = "saved_offsets"
MAX_HEADER_BYTES = 10**8  # as in the library
_METADATA = "__metadata__"
_ALIGNMENT = 8
BLOCK_BYTES = 2**20

Buffer = bytes | bytearray | memoryview
FileProof = tuple[int, str]  # bytes, sha256


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor, or a piece of one, that is to be written. `read` returns its bytes, in row-major order."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    read: Callable[[], Buffer]
    offsets: tuple[int, ...] | None = None  # of a piece: where it begins in the whole tensor

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or a piece of one, in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]  # where it begins in the whole tensor
    start: int  # of its bytes in the file
    num_bytes: int


def write_tensors(path: Path, contents: Sequence[Content], metadata: Mapping[str, str] | None = None) -> FileProof:
    """Writes a file, asking each content for its bytes in turn. Returns its size and digest. Raises OSError."""
    # Wide elements first: each tensor then begins at a multiple of its element's size.
    contents = sorted(contents, key=lambda content: -ITEM_BYTES[content.dtype])
    header: dict[str, Any] = {}
    end = 0
    for content in contents:
        begin, end = end, end + content.num_bytes
        header[content.name] = {"dtype": content.dtype, "shape": list(content.shape), "data_offsets": [begin, end]}
    pieces = {
        content.name: {SAVED_OFFSETS: list(content.offsets)} for content in contents if content.offsets is not None
    }
    header[_METADATA] = {"format": "pt", **(metadata or {})} | ({SHARDING: json.dumps(pieces)} if pieces else {})
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with HashingFile(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for content in contents:
            data = memoryview(content.read()).cast("B")
            assert data.nbytes == content.num_bytes, (content.name, data.nbytes, content.num_bytes)
            file.write(data)
    return file.proof


class HashingFile:
    """A new file whose digest is computed while it is written: nothing needs to be read back."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, data: Buffer) -> None:
        """Appends all of `data`. Raises OSError."""
        rest = memoryview(data)
        while rest:
            count = os.write(self._descriptor, rest[:BLOCK_BYTES])
            self._digest.update(rest[:count])  # while it is in the cache
            rest = rest[count:]
            self._size += count

    @property
    def proof(self) -> FileProof:
        """Size and digest of what was written."""
        return self._size, self._digest.hexdigest()


def pieces_of(files: Iterable[Path]) -> dict[str, list[Piece]]:
    """What is in `files` by name. Raises OSError, and ValueError for a file that is damaged."""
    found: dict[str, list[Piece]] = {}
    for file in files:
        for name, piece in _read_header(file).items():
            found.setdefault(name, []).append(piece)
    return found


def whole_shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The shape of the tensor that these are pieces of, as far as they reach."""
    ends = [tuple(map(sum, zip(piece.offsets, piece.shape, strict=True))) for piece in pieces]
    return tuple(map(max, zip(*ends, strict=True)))


def read_piece(piece: Piece) -> bytearray:
    """The bytes of a piece. Raises OSError, and ValueError where the file ends too early."""
    data = bytearray(piece.num_bytes)
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.start)
        view = memoryview(data)
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{piece.file} ends too early")
            view = view[count:]
    return data


def _read_header(file: Path) -> dict[str, Piece]:
    with file.open("rb") as opened:
        length = opened.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else MAX_HEADER_BYTES + 1
        text = opened.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text)
        offsets = json.loads((header.pop(_METADATA, None) or {}).get(SHARDING, "{}"))
        return {
            name: Piece(
                file=file,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                offsets=tuple(offsets[name][SAVED_OFFSETS] if name in offsets else [0] * len(entry["shape"])),
                start=8 + size + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file: {type(error).__name__}: {error}") from error
