"""What proves that bytes arrived: digests that are equal on every device and independent of the order of summation."""

from __future__ import annotations

import torch

from asyncrl.link.weight_records import WeightLayout
from asyncrl.weights.bytes.layout import check_buffer


def digest_buckets(layout: WeightLayout, buffer: torch.Tensor) -> tuple[int, ...]:
    """`digest` of every bucket of a staging buffer, uint8 [layout.total_bytes]; ShapeError for another tensor."""
    check_buffer(layout, buffer)
    return tuple(digest(buffer[start:stop]) for start, stop in layout.buckets)


_MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2**64 / golden ratio
_CHUNK_WORDS = {"cpu": 1 << 15, "cuda": 1 << 22}  # on CPUs the scratch of a chunk stays in a core's L2 cache


@torch.no_grad()
def digest(flat: torch.Tensor) -> int:
    """64-bit digest of a tensor's bytes: equal on every device, other if one word changes or two are swapped.

    With the bytes as little-endian 64-bit words x_i, modulo 2**64 and with an arithmetic shift,

        digest = n_bytes + sum_i (x_i ^ (x_i >> 32)) * (2 i + 1) * 0x9E3779B97F4A7C15

    Every factor is odd, so a change of one word always changes the sum. The fold brings a word's high half into its low
    bits: without it, words that differ in high bits only (a float 1 against a 0) could swap places unseen. It guards
    against faults, not against an adversary: the weight plane must be private.

    Args:
        flat: contiguous tensor of any dtype.

    Returns:
        A signed 64-bit integer.
    """
    assert flat.is_contiguous(), "digest needs contiguous memory"
    raw = flat.reshape(-1).view(torch.uint8)
    num_bytes = raw.numel()
    tail = num_bytes % 8
    words = raw[: num_bytes - tail].view(torch.int64)
    chunk = _CHUNK_WORDS.get(flat.device.type, 1 << 15)
    total = _digest_words(words, chunk)
    if tail:
        last = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        last[:tail] = raw[num_bytes - tail :]
        index = words.numel()
        word = int(last.view(torch.int64).item())
        total += (word ^ (word >> 32)) * (2 * index + 1) * _MULTIPLIER
    return _signed64(total + num_bytes)


def _digest_words(words: torch.Tensor, chunk: int) -> int:
    if not words.numel():
        return 0
    chunk = min(chunk, words.numel())
    factors = torch.arange(chunk, dtype=torch.int64, device=words.device)
    factors.mul_(2).add_(1).mul_(_signed64(_MULTIPLIER))
    stride = _signed64(2 * chunk * _MULTIPLIER)  # what every factor grows by from one chunk to the next
    scratch = torch.empty_like(factors)
    sums = []
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk]
        out = scratch[: part.numel()]
        torch.bitwise_right_shift(part, 32, out=out)
        out.bitwise_xor_(part).mul_(factors[: part.numel()])
        sums.append(out.sum())  # int64 addition wraps, so order and device do not matter
        factors.add_(stride)
    return int(torch.stack(sums).sum().item())


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
