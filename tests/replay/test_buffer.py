"""The replay buffer: order, the rule for taking a batch, what is over-age, and how fair drops are."""

from __future__ import annotations

import random

import pytest

from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.replay.lengths import LengthHistogram
from asyncrl.replay.pacing import Pacing
from asyncrl.types import LeaseKey, LeaseKind
from tests.replay.replay_making import make_group


def make_buffer(groups_per_step, max_age, over_age="drop"):
    return ReplayBuffer(Pacing(groups_per_step, max_age, steps=100), over_age)


def make_lease(ordinal, issued_version, holder="g1"):
    return LeaseRecord(LeaseKey(LeaseKind.TRAIN, ordinal, 0), holder, issued_version, 0.0, 600.0)


def ordinals(groups):
    return [group.ordinal for group in groups]


def test_a_batch_is_the_groups_with_the_oldest_tokens_with_ties_in_order_of_their_prompts():
    buffer = make_buffer(groups_per_step=3, max_age=4)
    for ordinal, version in [(9, 2), (7, 3), (8, 2), (1, 4)]:
        buffer.add(make_group(ordinal, version=version))
    assert ordinals(buffer.take(4)) == [8, 9, 7]
    assert len(buffer) == 1


def test_the_trace_in_the_module_docstring_is_true():
    buffer = make_buffer(groups_per_step=2, max_age=1)
    buffer.add(make_group(12, version=5))
    buffer.add(make_group(10, version=4))
    assert not buffer.can_take(5, {4: 1})
    assert buffer.waiting_for(5, [make_lease(11, 4)]).startswith(
        "version 5 waits for 1 of 1 leases issued at version 4"
    )
    buffer.add(make_group(11, version=5, issued=4))
    assert buffer.can_take(5, {})
    assert ordinals(buffer.take(5)) == [10, 11]
    assert len(buffer) == 1


def test_no_batch_is_taken_from_too_few_groups_and_the_report_counts_what_is_missing():
    buffer = make_buffer(groups_per_step=3, max_age=1)
    buffer.add(make_group(0))
    assert not buffer.can_take(0, {})
    assert buffer.waiting_for(0, [make_lease(1, 0, "g7")]) == (
        "version 0 waits for 2 more groups: 1 of 3 are buffered, running: 1.0 at g7"
    )
    assert "no lease is running" in buffer.waiting_for(0, [])


def test_two_old_leases_that_one_later_batch_cannot_hold_are_waited_for_early():
    # The second example of replay.pacing: taking b3 now would leave a0 and a1 for version 2, where only one fits.
    buffer = make_buffer(groups_per_step=1, max_age=2)
    buffer.add(make_group(3, version=1))
    leases = [make_lease(0, 0), make_lease(1, 0)]
    assert not buffer.can_take(1, {0: 2})
    report = buffer.waiting_for(1, leases)
    assert "waits for 1 of 2 leases issued at version 0" in report and "0.0 at g1, 1.0 at g1" in report
    assert buffer.can_take(1, {0: 1})
    buffer.add(make_group(0, version=0))
    assert buffer.can_take(1, {0: 1})
    assert ordinals(buffer.take(1)) == [0]


def test_max_age_0_takes_exactly_the_groups_of_its_version():
    buffer = make_buffer(groups_per_step=2, max_age=0)
    buffer.add(make_group(4, version=7))
    assert not buffer.can_take(7, {7: 1})
    buffer.add(make_group(3, version=7))
    assert buffer.can_take(7, {})
    assert ordinals(buffer.take(7)) == [3, 4]


def test_over_age_groups_are_dropped_and_counted_once():
    buffer = make_buffer(groups_per_step=1, max_age=1)
    for ordinal, version in [(0, 2), (1, 3), (2, 4)]:
        buffer.add(make_group(ordinal, version=version, num_tokens=(3, 3, 3)))
    with pytest.raises(AssertionError, match="drop_over_age first"):
        buffer.take(4)
    assert ordinals(buffer.drop_over_age(4)) == [0]
    assert buffer.drop_over_age(4) == []
    assert sum(buffer.dropped_by_length_decile()) == pytest.approx(3), "its three rollouts, once"
    assert ordinals(buffer.take(4)) == [1]


def test_over_age_groups_are_trained_where_the_user_wants_that():
    buffer = make_buffer(groups_per_step=2, max_age=1, over_age="train")
    buffer.add(make_group(0, version=0))
    buffer.add(make_group(1, version=5))
    assert buffer.drop_over_age(5) == []
    assert buffer.can_take(5, {})
    assert ordinals(buffer.take(5)) == [0, 1]


def test_bytes_are_counted_in_and_out():
    buffer = make_buffer(groups_per_step=1, max_age=0)
    buffer.add(make_group(0, version=0, body=b"x" * 100))
    buffer.add(make_group(1, version=9, body=b"x" * 10))
    assert buffer.num_bytes == 110
    buffer.drop_over_age(9)
    assert buffer.num_bytes == 10
    buffer.take(9)
    assert buffer.num_bytes == 0


def test_the_same_ordinal_twice_is_our_own_mistake():
    buffer = make_buffer(groups_per_step=2, max_age=0)
    buffer.add(make_group(5, attempt=0))
    with pytest.raises(AssertionError, match="ordinal 5"):
        buffer.add(make_group(5, attempt=1))


def test_drops_of_long_rollouts_show_in_the_last_decile():
    buffer = make_buffer(groups_per_step=1, max_age=0)
    for ordinal in range(100):
        # The ten longest prompts are the ones that are late.
        buffer.add(make_group(ordinal, version=0 if ordinal >= 90 else 1, num_tokens=(10 * (ordinal + 1),)))
    buffer.drop_over_age(1)
    deciles = buffer.dropped_by_length_decile()
    assert sum(deciles) == pytest.approx(10)
    assert deciles[9] > 7 and sum(deciles[:8]) == pytest.approx(0, abs=1e-6)


def test_drops_that_do_not_depend_on_length_are_even_over_the_deciles():
    everything, dropped = LengthHistogram(), LengthHistogram()
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(5, 1)) + 1 for _ in range(500)]
    everything.add(lengths * 4)
    dropped.add(lengths)
    assert dropped.by_decile_of(everything) == pytest.approx([len(lengths) / 10] * 10)


def test_equal_lengths_are_shared_among_all_deciles():
    everything, dropped = LengthHistogram(), LengthHistogram()
    everything.add([256] * 50)
    dropped.add([256] * 5)
    assert dropped.by_decile_of(everything) == pytest.approx([0.5] * 10)
    assert LengthHistogram().by_decile_of(everything) == [0.0] * 10
