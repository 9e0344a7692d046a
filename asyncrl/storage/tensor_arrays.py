"""Tensors of safetensors files as numpy arrays, put together from their pieces. No torch: the command line reads them.

numpy has no bfloat16: it is the upper half of a float32, and is read and written as that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncrl.storage.tensor_files import Buffer, Piece, read_piece, whole_shape

_KINDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def read_array(pieces: Sequence[Piece]) -> np.ndarray:
    """The whole tensor of which these are the pieces; bfloat16 and float16 as float32.

    Raises OSError, and ValueError where the pieces do not make a whole.
    """
    if len(pieces) == 1 and not any(pieces[0].offsets):
        return _array(pieces[0])
    first = _array(pieces[0])
    whole = np.empty(whole_shape(pieces), dtype=first.dtype)
    filled = 0
    for piece in pieces:
        array = first if piece is pieces[0] else _array(piece)
        whole[tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.shape, strict=True))] = array
        filled += array.size
    if filled != whole.size:
        raise ValueError(f"{pieces[0].file}: pieces hold {filled} of {whole.size} elements")
    return whole


def bytes_as(array: np.ndarray, dtype: str) -> Buffer:
    """The array's elements as a safetensors file of this dtype has them, rounded to the nearest as torch does."""
    if dtype != "BF16":
        return np.ascontiguousarray(array, dtype=_KINDS[dtype]).tobytes()
    words = np.ascontiguousarray(array, dtype="<f4").reshape(-1).view("<u4")
    # To nearest, ties to even: add half of what is cut off, and one more where the last bit that stays is odd.
    rounded = ((words + (0x7FFF + ((words >> 16) & 1)).astype("<u4")) >> 16).astype("<u2")
    rounded[np.isnan(words.view("<f4"))] = 0x7FC0
    data: bytes = rounded.tobytes()
    return data


def _array(piece: Piece) -> np.ndarray:
    data = read_piece(piece)
    if piece.dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4").reshape(piece.shape)
    array = np.frombuffer(data, dtype=_KINDS[piece.dtype]).reshape(piece.shape)
    return array.astype("<f4") if piece.dtype == "F16" else array
