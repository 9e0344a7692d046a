"""The permutation that is computed per index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.tasks.shuffle import shuffled_index


@given(size=st.integers(1, 700), seed=st.integers(0, 2**40))
def test_every_index_is_hit_exactly_once(size, seed):
    assert sorted(shuffled_index(index, size, seed) for index in range(size)) == list(range(size))


@given(size=st.integers(2**40, 10**20), index=st.integers(0, 2**40 - 1))
def test_huge_ranges_stay_in_range_and_repeat(size, index):
    place = shuffled_index(index, size, "key")
    assert 0 <= place < size
    assert place == shuffled_index(index, size, "key")


def test_different_keys_give_unrelated_orders():
    orders = [[shuffled_index(index, 1000, "epoch", 0, epoch) for index in range(1000)] for epoch in range(4)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two independent shuffles agree at one place on average.
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_neighbours_are_scattered():
    order = [shuffled_index(index, 10_000, 1) for index in range(10_000)]
    steps = [abs(a - b) for a, b in zip(order, order[1:], strict=False)]
    # The mean distance of two random places is a third of the range.
    assert 0.31 < sum(steps) / len(steps) / 10_000 < 0.355


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(index):
    with pytest.raises(ValueError, match=rf"index {index} is not in range\(5\)"):
        shuffled_index(index, 5, 0)
