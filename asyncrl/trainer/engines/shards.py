"""What a rank holds of each tensor, as files: written by every rank for itself, read by any other number of ranks.

The format is that of torch.distributed.checkpoint's `HuggingFaceStorageWriter(save_distributed=True)`: one safetensors
file a rank, with the places of its pieces in the header, so that torch's own reader can load a folder of them. Its
planner is not used: it gathers pickled plans over the process group and keeps a pickled `.metadata`, and there is
nothing to plan. Who writes a piece follows from the tensor's placement alone, and the headers are the index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from asyncrl.errors import CheckpointError
from asyncrl.storage.tensor_files import (
    Buffer,
    Content,
    FileProof,
    Piece,
    pieces_of,
    read_piece,
    whole_shape,
    write_tensors,
)
from asyncrl.trainer.engines.part import local
from asyncrl.weights.bytes.shards import part_of_rows

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES_OF_FILES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """What a rank holds of a tensor: a block of it, in elements."""

    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """A block of a tensor in this process's memory."""

    extent: Extent
    tensor: Tensor


def extent_of(tensor: Tensor) -> Extent:
    """Where what this rank holds of `tensor` lies in its whole."""
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Extent(whole, (0,) * len(whole), whole)
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Extent(whole, tuple(offsets), tuple(shape))


def piece_to_write(tensor: Tensor, rank: int) -> HeldPiece | None:
    """What this rank writes of `tensor`, by reference: of a plain one rank 0 all of it.

    Where several ranks hold the same slice, each writes an equal part of its rows.
    """
    extent, held = extent_of(tensor), local(tensor).detach()
    if not isinstance(tensor, DTensor):
        return HeldPiece(extent, held) if rank == 0 else None
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None, "a rank of the tensor's mesh"
    copies, own = 1, 0  # how many hold this slice, and which of them this rank is
    for size, number, placement in zip(tensor.device_mesh.shape, coordinates, tensor.placements, strict=True):
        if placement == Replicate():
            copies, own = copies * size, own * size + number
    if copies > 1:
        first, stop = part_of_rows(extent.shape[0], own, copies)
        shape, offsets = (stop - first, *extent.shape[1:]), (extent.offsets[0] + first, *extent.offsets[1:])
        extent, held = Extent(extent.whole, offsets, shape), held[first:stop]
    return HeldPiece(extent, held) if held.numel() else None


def cut(tensor: Tensor, extent: Extent) -> Tensor:
    """The block `extent` of a whole tensor, as a view."""
    return tensor[
        _slices(
            extent.offsets, tuple(map(sum, zip(extent.offsets, extent.shape, strict=True))), (0,) * len(extent.shape)
        )
    ]


class HostCopies:
    """Host memory that tensors are copied into, kept from one checkpoint to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, prefix: str, tensors: Mapping[str, Tensor], rank: int) -> dict[str, HeldPiece]:
        """Copies of what this rank is to write of `tensors`. On CUDA they are ready after `wait`."""
        pieces = {}
        for name, tensor in tensors.items():
            if (piece := piece_to_write(tensor, rank)) is not None:
                pieces[name] = HeldPiece(piece.extent, self._copy(f"{prefix}/{name}", piece.tensor))
        return pieces

    def wait(self) -> None:
        """Returns when all copies are there; to be called by the thread that reads them."""
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self) -> None:
        """To be called after the last `take`: what `wait` waits for."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def num_bytes(self) -> int:
        """Host memory that is held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, or the copy would wait for the device.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        # On the stream that updates the weights: the next update comes after this copy.
        buffer.copy_(tensor, non_blocking=True)
        return buffer


def write_shard(file: Path, pieces: Mapping[str, HeldPiece]) -> FileProof:
    """Writes what this rank holds; see the module. Returns size and digest. Raises OSError."""
    contents = [
        Content(name, DTYPES[piece.tensor.dtype], piece.extent.shape, bytes_of(piece.tensor), piece.extent.offsets)
        for name, piece in pieces.items()
    ]
    return write_tensors(file, contents, {"DCP_VERSION": "1.0"})


def shard_name(rank: int, num_ranks: int) -> str:
    """The file of a rank in a folder of shards."""
    return f"rank_{rank + 1:05d}_of_{num_ranks:05d}.safetensors"


def bytes_of(tensor: Tensor) -> Callable[[], Buffer]:
    """A function that gives a CPU tensor's bytes, without a copy where it is contiguous."""
    return lambda: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class TensorFiles:
    """Tensors in safetensors files, whole or in pieces, by name. Only what is asked for is read."""

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        """`prefix` is left out of names that have it. Raises OSError or ValueError for a file that cannot be read."""
        self._pieces = {name.removeprefix(prefix): pieces for name, pieces in pieces_of(files).items()}
        self._shapes = {name: whole_shape(pieces) for name, pieces in self._pieces.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole tensor."""
        return dict(self._shapes)

    @property
    def dtypes(self) -> dict[str, torch.dtype | None]:
        """The type of each tensor; None for one that torch or this module does not have."""
        return {name: _DTYPES_OF_FILES.get(pieces[0].dtype) for name, pieces in self._pieces.items()}

    @property
    def counts(self) -> dict[str, int]:
        """In how many pieces each tensor is there."""
        return {name: len(pieces) for name, pieces in self._pieces.items()}

    def read(self, name: str, extent: Extent) -> Tensor:
        """The block `extent` of a tensor. Raises OSError, and ValueError where files do not have all of it."""
        pieces = self._pieces[name]
        if len(pieces) == 1 and pieces[0].shape == extent.shape and pieces[0].offsets == extent.offsets:
            return _tensor(pieces[0], read_piece(pieces[0]))
        if len(pieces) == 1 and pieces[0].shape == extent.whole and extent.shape[1:] == extent.whole[1:]:
            stops = tuple(map(sum, zip(extent.offsets, extent.shape, strict=True)))
            rows = _rows(pieces[0], extent.offsets, stops)  # whole rows follow each other: none is copied
            return _tensor(rows, read_piece(rows))
        block = torch.empty(extent.shape, dtype=_DTYPES_OF_FILES[pieces[0].dtype])
        filled = 0
        for piece in pieces:
            filled += _fill(block, extent, piece)
        if filled != block.numel():
            raise ValueError(f"{name}: the files hold {filled} of the {block.numel()} elements that are wanted")
        return block


def read_blocks(files: TensorFiles, own: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Of the tensors in `files`, found at `where`, what this rank holds of them in `own`.

    Raises CheckpointError when names or shapes differ from those of `own`, else what `TensorFiles.read` raises.
    """
    check_shapes(where, files.shapes, own)
    return {name: files.read(name, extent_of(tensor)) for name, tensor in own.items()}


def check_shapes(where: Path, shapes: Mapping[str, Sequence[int]], own: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless what is at `where` has the names and shapes of the trainer's `own` tensors."""
    if shapes.keys() != own.keys():
        differing = sorted(shapes.keys() ^ own.keys())
        raise CheckpointError(f"{where}: {len(differing)} names differ from the model's, {differing[0]} first")
    for name, tensor in own.items():
        if tuple(shapes[name]) != tuple(tensor.shape):
            raise CheckpointError(f"{where}: {name} is {tuple(shapes[name])}, the model's {tuple(tensor.shape)}")


def _fill(block: Tensor, extent: Extent, piece: Piece) -> int:
    """Copies what `piece` has of `block` into it; returns the number of elements."""
    starts = tuple(map(max, extent.offsets, piece.offsets))
    stops = tuple(
        min(a + m, b + n) for a, m, b, n in zip(extent.offsets, extent.shape, piece.offsets, piece.shape, strict=True)
    )
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return 0
    rows = _rows(piece, starts, stops)
    source = _tensor(rows, read_piece(rows))
    source = source[_slices(starts, stops, rows.offsets)]
    block[_slices(starts, stops, extent.offsets)] = source
    return source.numel()


def _rows(piece: Piece, starts: Sequence[int], stops: Sequence[int]) -> Piece:
    """The rows of a piece, by its first axis, that hold a block: they follow each other in the file."""
    if not piece.shape:
        return piece
    row_bytes = piece.num_bytes // piece.shape[0]
    first, count = starts[0] - piece.offsets[0], stops[0] - starts[0]
    return Piece(
        file=piece.file,
        dtype=piece.dtype,
        shape=(count, *piece.shape[1:]),
        offsets=(starts[0], *piece.offsets[1:]),
        start=piece.start + first * row_bytes,
        num_bytes=count * row_bytes,
    )


def _slices(starts: Sequence[int], stops: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, origin, strict=True))


def _tensor(piece: Piece, data: bytearray) -> Tensor:
    dtype = _DTYPES_OF_FILES[piece.dtype]
    if not math.prod(piece.shape):
        return torch.empty(piece.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(piece.shape)
