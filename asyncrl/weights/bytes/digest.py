"""What proves that bytes arrived: digests that are equal on every device and independent of the order of summation."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from asyncrl.link.weight_records import WeightLayout
from asyncrl.weights.bytes.layout import bucket_bytes, check_buffer


def digest_buckets(layout: WeightLayout, buffer: torch.Tensor) -> tuple[int, ...]:
    """`digest` of every bucket of a staging buffer, uint8 [layout.total_bytes]; ShapeError for another tensor."""
    check_buffer(layout, buffer)
    return tuple(digest(bucket_bytes(buffer, bucket)) for bucket in layout.buckets)


MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio
ROW_WORDS = 1 << 15  # words of one row; on CPUs a row and the scratch for it stay in a core's L2 cache
ROW_KEYS = 1 << 32  # where the keys of rows begin among all keys
_CUDA_ROWS = 128  # taken at once: a GPU is fast with large pieces only
_MASK = (1 << 64) - 1
_LOW_HALF = (1 << 32) - 1  # takes away what an arithmetic shift fills in


@torch.no_grad()
def digest(flat: torch.Tensor) -> int:
    """64-bit digest of a tensor's bytes, equal on every device.

    With the bytes as little-endian unsigned 64-bit words x_i (the last one filled up with zeros), and modulo 2**64:

        digest = n_bytes + sum_i key_i * mixed(x_i)
        mixed(x) = fold(MULTIPLIER * fold(x)),    fold(x) = x ^ (x >> 32)
        key_i = key(i % ROW_WORDS) * key(ROW_KEYS + i // ROW_WORDS),    key(n) = splitmix64(n) | 1

    `fold` is its own inverse, for the shift is the logical one, and the multiplier is odd: so `mixed` gives different
    words different values. From this follows, for tensors of equal length:

    - Whatever happens to one word (a flipped bit, a complement, zeros), the digest changes: the sum changes by an odd
      key times a number that is not 0.
    - If words a and b at places i and j are exchanged, it stays only where (mixed(a) - mixed(b)) * (key_i - key_j) is
      0. If key_i - key_j is an odd number times 2**k, that holds for a share of 2**(k - 64) of all pairs of words. Keys
      are pseudo-random, so that k is above 20 for one pair of places in a million.
    - Any two words changed to any other values: for a share of 2**-64 of the values it stays.
    - What moves or changes many words at once (a shift, exchanged rows, the tensor of another version) meets other
      keys at every place; nothing better is claimed of it than of random numbers, which is 2**-64.

    It guards against faults, not against an adversary: the weight plane must be private.

    Args:
        flat: contiguous tensor of any dtype.

    Returns:
        A signed 64-bit integer.
    """
    assert flat.is_contiguous(), "digest needs contiguous memory"
    raw = flat.reshape(-1).view(torch.uint8)
    num_bytes = raw.numel()
    whole = num_bytes - num_bytes % 8
    rows = _row_sums(_words(raw[:whole]))
    total = num_bytes
    for row, summed in enumerate(torch.stack(rows).tolist() if rows else []):
        total += key(ROW_KEYS + row) * summed
    if whole < num_bytes:
        last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        last[: num_bytes - whole] = raw[whole:]
        index = whole // 8
        word = _mixed_word(int(_words(last).item()) & _MASK)
        total += key(index % ROW_WORDS) * key(ROW_KEYS + index // ROW_WORDS) * word
    return _signed64(total)


def _words(raw: torch.Tensor) -> torch.Tensor:
    """uint8 [8 n] as int64 [n]; a copy only where the bytes do not begin at a multiple of eight."""
    return (raw if raw.data_ptr() % 8 == 0 else raw.clone()).view(torch.int64)


def _row_sums(words: torch.Tensor) -> list[torch.Tensor]:
    """The sum of every row's words, mixed and times their keys within the row: int64 scalars."""
    keys = _keys(words.device)
    whole = words.numel() - words.numel() % ROW_WORDS
    rows = words[:whole].view(-1, ROW_WORDS)
    at_once = _CUDA_ROWS if words.is_cuda else 1
    sums: list[torch.Tensor] = []
    scratch = torch.empty(2, min(at_once, len(rows)), ROW_WORDS, dtype=torch.int64, device=words.device)
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        sums += _weighted(part, keys, scratch[:, : len(part)]).unbind()
    if whole < words.numel():
        left = words.numel() - whole
        rest = torch.empty(2, 1, left, dtype=torch.int64, device=words.device)
        sums += _weighted(words[None, whole:], keys[:left], rest).unbind()
    return sums


def _weighted(words: torch.Tensor, keys: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """sum(keys * mixed(words)) of each row of [rows, n]; `scratch` is [2, rows, n]. int64 wraps, so order is free."""
    folded, mixed = scratch[0], scratch[1]
    torch.bitwise_right_shift(words, 32, out=folded)
    torch.bitwise_xor(words, folded.bitwise_and_(_LOW_HALF), out=mixed)
    mixed.mul_(_signed64(MULTIPLIER))
    torch.bitwise_right_shift(mixed, 32, out=folded)
    mixed.bitwise_xor_(folded.bitwise_and_(_LOW_HALF))
    return mixed.mul_(keys).sum(dim=1)


def splitmix64(number: int) -> int:
    """The `number`-th value of SplitMix64 started at 0 (Steele, Lea, Flood 2014): unsigned, different for each."""
    value = ((number + 1) * MULTIPLIER) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(number: int) -> int:
    """An odd number, unsigned."""
    return splitmix64(number) | 1


def _mixed_word(word: int) -> int:
    word ^= word >> 32
    word = (word * MULTIPLIER) & _MASK
    return word ^ (word >> 32)


@cache
def _keys(device: torch.device) -> torch.Tensor:
    """The keys of the places within a row, int64 [ROW_WORDS]."""
    keys = np.array([key(number) for number in range(ROW_WORDS)], dtype=np.uint64)
    return torch.from_numpy(keys.view(np.int64)).to(device)


def _signed64(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
