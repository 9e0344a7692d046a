"""Packing against a loop over tokens; budgets, order and refusals."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import NonFiniteError, ProtocolError, ShapeError
from asyncrl.trainer.packing import pack_groups, sorted_groups
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan


def make_rollout(tokens, logprobs=None, spans=None):
    return Rollout(
        token_ids=np.asarray(tokens, dtype=np.int32),
        behaviour_logprobs=np.asarray(logprobs if logprobs is not None else [-0.5] * len(tokens), dtype=np.float32),
        version_spans=tuple(VersionSpan(*span) for span in (spans or [(0, len(tokens), 0)])),
        finish_reason=FinishReason.STOP,
        reward=0.0,
    )


def make_group(ordinal, prompt, rollouts):
    return Group(LeaseKey(LeaseKind.TRAIN, ordinal, 0), np.asarray(prompt, dtype=np.int32), rollouts)


def readings(batches):
    """One tuple per completion token: its context as the model sees it, and its numbers."""
    out = []
    for batch in batches:
        rows = batch.rows
        assert rows.lengths.sum() == rows.num_inputs
        starts = np.cumsum([0, *rows.lengths])
        for n in range(rows.num_tokens):
            place = int(rows.predictor[n])
            row = int(np.searchsorted(starts, place, side="right")) - 1
            seen = slice(starts[row], place + 1)
            context, positions = rows.input_ids[seen], rows.position_ids[seen]
            if rows.segment_ids is not None:
                segments = rows.segment_ids[seen]
                visible = (segments == 0) | (segments == segments[-1])
                context, positions = context[visible], positions[visible]
            assert rows.input_ids[place] == context[-1]
            assert positions.tolist() == list(range(len(context)))
            out.append(
                (
                    tuple(context.tolist()),
                    int(batch.rows.token_ids[n]),
                    float(batch.behaviour_logprobs[n]),
                    int(batch.rollout_index[batch.sequence_index[n]]),
                    int(batch.policy_ages[n]),
                )
            )
    return sorted(out)


def expected_readings(groups, version):
    """The same by definition, one token at a time."""
    out = []
    index = -1
    for group in groups:
        for rollout in group.rollouts:
            index += 1
            versions = rollout.token_versions()
            for t in range(rollout.num_tokens):
                context = [*group.prompt_token_ids, *rollout.token_ids[:t]]
                out.append(
                    (
                        tuple(int(token) for token in context),
                        int(rollout.token_ids[t]),
                        float(rollout.behaviour_logprobs[t]),
                        index,
                        int(version - versions[t]),
                    )
                )
    return sorted(out)


def random_case(seed, num_groups=4, group_size=3, prompt=5, completion=6):
    rng = np.random.default_rng(seed)
    groups = []
    for ordinal in range(num_groups):
        rollouts = []
        for _ in range(rng.integers(1, group_size, endpoint=True)):
            length = int(rng.integers(1, completion, endpoint=True))
            cut = int(rng.integers(0, length))
            spans = [(0, cut, 1), (cut, length, 3)] if cut else [(0, length, 2)]
            rollouts.append(make_rollout(rng.integers(0, 50, length), rng.normal(-1, 0.3, length), spans))
        groups.append(make_group(ordinal, rng.integers(0, 50, rng.integers(1, prompt, endpoint=True)), rollouts))
    return groups


def test_three_tokens_by_hand():
    group = make_group(7, [10, 11], [make_rollout([12, 13, 14], [-0.1, -0.2, -0.3], [(0, 1, 4), (1, 3, 5)])])
    (batch,) = pack_groups([group], version=6, token_budget=100)
    assert batch.rows.input_ids.tolist() == [10, 11, 12, 13]  # 14 is never an input
    assert batch.rows.predictor.tolist() == [1, 2, 3]
    assert batch.rows.token_ids.tolist() == [12, 13, 14]
    np.testing.assert_allclose(batch.behaviour_logprobs, [-0.1, -0.2, -0.3], rtol=1e-6)
    assert batch.rollout_index.tolist() == [0]
    assert batch.policy_ages.tolist() == [2, 1, 1]
    assert batch.rows.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.rows.lengths.tolist() == [4]
    assert batch.rows.segment_ids is None


def test_a_shared_row_by_hand():
    group = make_group(0, [1, 2, 3], [make_rollout([4, 5, 6]), make_rollout([7, 8])])
    (batch,) = pack_groups([group], version=0, token_budget=100, shared_row_tokens=8)
    # Shorter completion first.
    assert batch.rows.input_ids.tolist() == [1, 2, 3, 7, 4, 5]
    assert batch.rows.segment_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.rows.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.rows.predictor.tolist() == [2, 3, 2, 4, 5]
    assert batch.rows.token_ids.tolist() == [7, 8, 4, 5, 6]
    assert batch.sequence_index.tolist() == [0, 0, 1, 1, 1]
    assert batch.rollout_index.tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 60), shared=st.sampled_from([0, 6, 12, 40]))
def test_every_token_keeps_its_context_and_its_numbers(seed, budget, shared):
    groups = random_case(seed)
    batches = pack_groups(groups, 5, budget, shared_row_tokens=shared)
    assert readings(batches) == expected_readings(groups, 5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 60), shared=st.sampled_from([0, 12]))
def test_no_micro_batch_exceeds_the_budget_but_a_single_longer_row(seed, budget, shared):
    groups = random_case(seed)
    for batch in pack_groups(groups, 5, budget, shared_row_tokens=shared):
        assert batch.rows.num_inputs <= budget or len(batch.rows.lengths) == 1


def test_nothing_is_padded_and_rows_are_sorted_by_length():
    groups = random_case(0, num_groups=40, completion=60)
    batches = pack_groups(groups, 5, 200)
    real = sum(len(g.prompt_token_ids) + r.num_tokens - 1 for g in groups for r in g.rollouts)
    assert sum(batch.rows.num_inputs for batch in batches) == real
    lengths = np.concatenate([batch.rows.lengths for batch in batches])
    assert (np.diff(lengths) <= 0).all()
    # A micro-batch is full: the first row of the next one would not have fitted.
    for batch, after in zip(batches, batches[1:], strict=False):
        assert batch.rows.num_inputs + after.rows.lengths[0] > 200


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shuffle=st.randoms(), shared=st.sampled_from([0, 12]))
def test_the_order_of_arrival_does_not_matter(seed, shuffle, shared):
    groups = random_case(seed)
    arrived = list(groups)
    shuffle.shuffle(arrived)
    assert sorted_groups(arrived) == groups
    in_order = pack_groups(groups, 5, 30, shared_row_tokens=shared)
    as_arrived = pack_groups(arrived, 5, 30, shared_row_tokens=shared)
    assert len(in_order) == len(as_arrived)
    for left, right in zip(in_order, as_arrived, strict=True):
        for name in ("input_ids", "position_ids", "lengths", "predictor", "token_ids"):
            np.testing.assert_array_equal(getattr(left.rows, name), getattr(right.rows, name))
        for name in ("sequence_index", "behaviour_logprobs", "policy_ages"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_prompts_are_shared_only_where_that_saves_a_tenth():
    long_prompt = make_group(0, range(20), [make_rollout([1, 2]), make_rollout([3, 4])])
    short_prompt = make_group(1, [1], [make_rollout(range(9)), make_rollout(range(9))])
    (plain, shared) = pack_groups([long_prompt, short_prompt], 0, 100, shared_row_tokens=50)
    assert plain.rows.segment_ids is None
    assert shared.rows.segment_ids is not None
    assert shared.rows.lengths.tolist() == [22]


def test_one_token_after_one_token_is_the_smallest_rollout():
    (batch,) = pack_groups([make_group(0, [9], [make_rollout([4])])], 0, 1)
    assert batch.rows.input_ids.tolist() == [9]
    assert batch.rows.predictor.tolist() == [0]


def test_no_groups_make_no_micro_batches():
    assert pack_groups([], 0, 10) == []


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (make_group(3, [], [make_rollout([1])]), ShapeError, "ordinal 3.*empty prompt"),
        (make_group(3, [1], [make_rollout([])]), ShapeError, "0 tokens"),
        (make_group(3, [1], [make_rollout([1, 2], [-1.0])]), ShapeError, "2 tokens and 1 log-probs"),
        (make_group(3, [1], [make_rollout([1, 2], spans=[(0, 1, 0)])]), ShapeError, "do not cover"),
        (make_group(3, [1], [make_rollout([1, 2], spans=[(0, 1, 0), (0, 2, 0)])]), ShapeError, "cover"),
        (make_group(3, [1], [make_rollout([1], [np.nan])]), NonFiniteError, "behaviour log-probs"),
        (make_group(3, [1], [make_rollout([1], [-np.inf])]), NonFiniteError, "behaviour log-probs"),
        (make_group(3, [1], [make_rollout([1], spans=[(0, 1, 6)])]), ProtocolError, "6.*holds 5"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_numbers(group, error, message):
    with pytest.raises(error, match=message):
        pack_groups([group], 5, 10)


def test_five_hundred_rollouts_pack_the_same_twice():
    groups = random_case(1, num_groups=170)
    order = list(range(len(groups)))
    random.Random(0).shuffle(order)
    in_order = pack_groups(groups, 5, 300)
    shuffled = pack_groups([groups[i] for i in order], 5, 300)
    rows_of = [[batch.rows.input_ids.tolist() for batch in batches] for batches in (in_order, shuffled)]
    assert rows_of[0] == rows_of[1]
