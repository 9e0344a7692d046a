"""The nouns that have rules of their own."""

from __future__ import annotations

import pytest

from asyncrl.types import Frontier, min_rollouts


def test_a_frontier_is_the_set_it_stands_for():
    frontier = Frontier()
    for ordinal, watermark in [(0, 1), (2, 1), (4, 1), (1, 3), (3, 5), (3, 5)]:
        frontier.add(ordinal)
        assert frontier.watermark == watermark
    assert len(frontier) == 5 and 4 in frontier and 5 not in frontier and -1 not in frontier
    frontier.add(9)
    again = Frontier(frontier.watermark, frontier.above)
    assert (again.watermark, again.above, len(again)) == (5, {9}, 6)
    assert again == frontier == frontier.copy() and again != Frontier(5)


def test_a_frontier_takes_all_below_a_number_at_once_and_what_follows_it_without_a_gap():
    frontier = Frontier(2, [4, 6, 7, 9])
    frontier.add_below(1)
    assert frontier == Frontier(2, [4, 6, 7, 9])
    frontier.add_below(6)
    assert frontier == Frontier(8, [9])


def test_what_is_missing_in_a_frontier_are_the_gaps():
    frontier = Frontier(3, [5, 6, 9])
    assert frontier.missing(0, 11) == [3, 4, 7, 8, 10]
    assert frontier.missing(4, 8) == [4, 7]
    assert Frontier(3).missing(1, 6) == [3, 4, 5] and frontier.missing(0, 2) == frontier.missing(8, 7) == []


@pytest.mark.parametrize(("group_size", "enough"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_half_of_a_group_is_enough_to_train_on_and_two_rollouts_at_least(group_size, enough):
    assert min_rollouts(group_size) == enough
