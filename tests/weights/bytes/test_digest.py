"""Digests: the documented formula on every device, and which damage they find."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weights.bytes.digest import digest


def slow_digest(data: bytes) -> int:
    """The documented formula with Python's own integers."""
    total = len(data)
    for index in range(0, len(data), 8):
        word = int.from_bytes(data[index : index + 8].ljust(8, b"\0"), "little", signed=True)
        total += (word ^ (word >> 32)) * (2 * (index // 8) + 1) * 0x9E3779B97F4A7C15
    return int.from_bytes((total % 2**64).to_bytes(8, "little"), "little", signed=True)


def flat_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


@given(st.binary(max_size=300))
def test_digest_is_the_documented_sum(data):
    assert digest(flat_bytes(data)) == slow_digest(data)


def test_digest_over_many_chunks_is_the_documented_sum():
    data = torch.randint(0, 256, (3 * 8 * (1 << 15) + 13,), dtype=torch.uint8)
    assert digest(data) == slow_digest(bytes(data.tolist()))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_bit_changes_the_digest(data, draw):
    position = draw.draw(st.integers(0, len(data) * 8 - 1))
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    assert digest(flat_bytes(bytes(changed))) != digest(flat_bytes(data))


@settings(max_examples=50)
@given(st.integers(0, 8191), st.integers(0, 8191))
def test_swapping_two_unequal_weights_changes_the_digest(left, right):
    # Ones among zeros differ in high bits only, the hard case for a sum of products.
    weights = torch.zeros(8192)
    weights[::3] = 1.0
    before = digest(weights)
    values = weights[left].item(), weights[right].item()
    weights[right], weights[left] = values
    assert (digest(weights) == before) == (values[0] == values[1])


def test_length_is_part_of_the_digest():
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(128, dtype=torch.uint8))
