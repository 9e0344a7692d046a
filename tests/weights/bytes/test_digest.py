"""Digests: the documented formula on every device, and which damage they find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weights.bytes.digest import MULTIPLIER, ROW_KEYS, ROW_WORDS, digest, key

MASK = 2**64 - 1
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def slow_digest(data: bytes) -> int:
    """The documented formula with Python's own integers."""

    def fold(word):
        return word ^ (word >> 32)

    total = len(data)
    for index in range(-(-len(data) // 8)):
        word = int.from_bytes(data[8 * index : 8 * index + 8].ljust(8, b"\0"), "little")
        mixed = fold(fold(word) * MULTIPLIER & MASK)
        total += key(index % ROW_WORDS) * key(ROW_KEYS + index // ROW_WORDS) * mixed
    return int.from_bytes((total & MASK).to_bytes(8, "little"), "little", signed=True)


def flat_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


@given(st.binary(max_size=300))
def test_digest_is_the_documented_sum(data):
    assert digest(flat_bytes(data)) == slow_digest(data)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_digest_over_many_rows_is_the_documented_sum(device, rows):
    num_bytes = rows * 8 * ROW_WORDS + 13
    if rows < 100:
        data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        assert digest(data.to(device)) == slow_digest(bytes(data.tolist()))
    else:  # too much for Python's integers: the same bytes in numpy's
        data = np.random.default_rng(0).integers(0, 2**64, rows * ROW_WORDS, dtype=np.uint64)
        with np.errstate(over="ignore"):
            mixed = (data ^ (data >> np.uint64(32))) * np.uint64(MULTIPLIER)
            keys = np.array([key(place) for place in range(ROW_WORDS)], dtype=np.uint64)
            row_keys = np.array([key(ROW_KEYS + row) for row in range(rows)], dtype=np.uint64)
            weighted = (mixed ^ (mixed >> np.uint64(32))).reshape(rows, -1) * keys * row_keys[:, None]
            total = int(weighted.sum() + np.uint64(data.nbytes))
        assert digest(torch.from_numpy(data.view(np.int64)).to(device)) & MASK == total


def test_keys_are_odd_and_no_two_places_of_a_row_or_rows_share_one():
    for keys in ([key(place) for place in range(ROW_WORDS)], [key(ROW_KEYS + row) for row in range(1 << 16)]):
        assert all(each % 2 for each in keys) and len(set(keys)) == len(keys)


@given(st.integers(0, MASK))
def test_the_fold_is_its_own_inverse_which_the_proof_rests_on(word):
    folded = word ^ (word >> 32)
    assert folded ^ (folded >> 32) == word


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_bit_changes_the_digest(data, draw):
    position = draw.draw(st.integers(0, len(data) * 8 - 1))
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    assert digest(flat_bytes(bytes(changed))) != digest(flat_bytes(data))


@settings(max_examples=50)
@given(st.integers(0, 8191), st.integers(0, 8191), st.sampled_from([0.0, -0.0, 2.0, float("inf"), -1.0]))
def test_swapping_two_unequal_weights_changes_the_digest(left, right, other):
    # Words that differ in high bits only are the hard case for a sum of products.
    weights = torch.full((8192,), other)
    weights[::3] = 1.0
    before = digest(weights)
    values = weights[left].item(), weights[right].item()
    weights[right], weights[left] = values
    assert (digest(weights) == before) == (values[0] == values[1])


def test_length_is_part_of_the_digest():
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(128, dtype=torch.uint8))


def test_bytes_that_begin_anywhere_have_the_digest_of_their_copy():
    data = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    for start in range(9):
        assert digest(data[start : start + 900]) == digest(data[start : start + 900].clone())


def test_exchanged_rows_of_an_identity_matrix_and_of_constants_are_seen():
    table = torch.eye(256)
    before = digest(table)
    for left, right in [(0, 1), (0, 128), (64, 192), (3, 250)]:
        other = table.clone()
        other[[left, right]] = other[[right, left]]
        assert digest(other) != before
    steps = torch.arange(256.0)[:, None].expand(256, 512).contiguous()  # rows of equal words
    other = steps.clone()
    other[[1, 2]] = other[[2, 1]]
    assert digest(other) != digest(steps)
