"""Shuffling without a list: a seeded permutation of range(size) that is computed per index, in constant memory."""

from __future__ import annotations

import hashlib
from functools import lru_cache

ROUNDS = 6


def shuffled_index(index: int, size: int, *key: int | str) -> int:
    """Where a shuffle of range(size), named by `key`, puts `index`. A bijection; equal arguments give equal results.

    A Feistel network over the next power of four, walked until it lands inside the range (Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002, the cycle-walking cipher): under four steps on average.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    salt = _salt(key)
    while True:
        index = _feistel(index, half_bits, salt)
        if index < size:
            return index


@lru_cache(maxsize=64)
def _salt(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def _feistel(value: int, half_bits: int, salt: bytes) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    num_bytes = (half_bits + 7) // 8
    for turn in range(ROUNDS):
        message = salt + bytes((turn,)) + right.to_bytes(num_bytes, "little")
        mixed = int.from_bytes(hashlib.blake2b(message, digest_size=min(64, num_bytes)).digest(), "little")
        left, right = right, left ^ (mixed & mask)
    return left << half_bits | right


def example_index(ordinal: int, seed: int, train_size: int | None) -> int:
    """Which example of the task is training prompt number `ordinal`, from 0 without end.

    Epochs follow each other, each a new shuffle of all examples; with train_size None the task's own order.
    """
    if train_size is None:
        return ordinal
    epoch, place = divmod(ordinal, train_size)
    return shuffled_index(place, train_size, "epoch", seed, epoch)
