"""The order of a curriculum, and the shares of a mix, over all their lengths and weights."""

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.tasks.data.order import MAX_CYCLE, STAGES, Shares, curriculum_index, epoch_index

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def dealt(weights, count):
    shares = Shares(weights)
    return [shares.of(index) for index in range(count)]


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, count=st.integers(0, 400))
def test_after_any_number_of_prompts_each_task_has_its_share_rounded_down_or_up(weights, count):
    got = Counter(who for who, _ in dealt(weights, count))
    for who, weight in enumerate(weights):
        share = Fraction(weight * count, sum(weights))
        assert floor(share) <= got[who] <= ceil(share)


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**9), count=st.integers(1, 300))
def test_any_window_has_the_shares_within_two(weights, start, count):
    shares = Shares(weights)
    got = Counter(shares.of(start + offset)[0] for offset in range(count))
    for who, weight in enumerate(weights):
        assert abs(got[who] - weight * count / sum(weights)) < 2


@settings(deadline=None)
@given(weights=WEIGHTS)
def test_each_task_is_walked_without_a_gap(weights):
    numbers = [[] for _ in weights]
    for who, number in dealt(weights, 300):
        numbers[who].append(number)
    assert all(own == list(range(len(own))) for own in numbers)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1], [1]),
        ([2, 1], [2, 1]),
        ([0.7, 0.3], [7, 3]),
        ([0.5, 0.25, 0.25], [2, 1, 1]),
        ([10, 10], [1, 1]),
        ([1e-9, 1], [1, MAX_CYCLE]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.33333, 0.66667], [3333, 6667]),
    ],
)
def test_weights_become_whole_numbers_exactly_where_the_cycle_stays_short(weights, counts):
    assert Shares(weights).counts == counts


def test_a_cycle_goes_on_where_the_one_before_ended():
    shares = Shares([2, 1])
    assert [shares.of(index) for index in range(6)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]
    assert shares.of(3 * 10**12) == (0, 2 * 10**12)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 90), length=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_window_of_a_curriculum_grows_from_the_easiest_to_all(size, length, seed):
    order = [curriculum_index(index, size, length, seed) for index in range(length + size)]
    assert all(0 <= place < size for place in order)
    for index, place in enumerate(order[:length]):
        assert place < -(-size * (min(STAGES, length) * index // length + 1) // min(STAGES, length))
    assert sorted(order[length:]) == list(range(size))  # then an epoch of all
    assert order == [curriculum_index(index, size, length, seed) for index in range(length + size)]


def test_a_stage_of_a_curriculum_repeats_nothing_before_its_window_is_through():
    size, length = 160, 320  # 16 stages of 20 prompts, over windows of 10, 20, ... 160
    for stage in range(16):
        window = 10 * (stage + 1)
        taken = [curriculum_index(20 * stage + place, size, length, 0) for place in range(20)]
        assert max(Counter(taken).values()) == (2 if window == 10 else 1)
        assert max(taken) >= window // 2


def test_epochs_are_new_shuffles_of_all():
    epochs = [[epoch_index(20 * epoch + place, 20, "key", 1) for place in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
