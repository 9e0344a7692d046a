"""Flat and padded tokens: there and back, gradients, and indices that are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.layout import pad_sequences, sequence_lengths, unpad_sequences
from asyncrl.errors import ShapeError

pytestmark = pytest.mark.numeric


def test_three_tokens_by_hand():
    padded, mask = pad_sequences(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))
    assert padded.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert mask.tolist() == [[True, True], [True, False]]
    rows = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    assert unpad_sequences(rows, mask).tolist() == [1.0, 2.0, 3.0]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), max_size=6), whole=st.booleans())
def test_padding_equals_a_loop_over_sequences_and_is_undone_exactly(lengths, whole):
    index = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    flat = torch.randint(1, 99, index.shape) if whole else torch.randn(index.shape, dtype=torch.float64)
    padded, mask = pad_sequences(flat, index, len(lengths))
    width = max(lengths, default=0)
    rows = [[*part.tolist(), *[0] * (width - len(part))] for part in flat.split(lengths)] if lengths else []
    assert padded.shape == mask.shape == (len(lengths), width)
    assert padded.tolist() == rows
    assert mask.sum(1).tolist() == sequence_lengths(index).tolist() == lengths
    assert padded.dtype == flat.dtype
    assert torch.equal(unpad_sequences(padded, mask), flat)


def test_gradients_pass_through_both_ways_and_none_comes_from_padding():
    flat = torch.randn(5, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 1, 1, 1, 2])
    padded, mask = pad_sequences(flat, index)
    weights = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    (gradient,) = torch.autograd.grad((padded * weights).sum(), flat)
    assert gradient.tolist() == [0.0, 3.0, 4.0, 5.0, 6.0]
    rows = torch.randn(3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(unpad_sequences(rows, mask).sum(), rows)
    assert torch.equal(gradient, mask.float())


def test_no_tokens_are_no_rows():
    nothing = torch.zeros(0, dtype=torch.int64)
    padded, mask = pad_sequences(torch.zeros(0), nothing, 0)
    assert padded.shape == (0, 0)
    assert unpad_sequences(padded, mask).shape == (0,)
    with pytest.raises(ShapeError, match="0 tokens for 2 sequences"):
        pad_sequences(torch.zeros(0), nothing, 2)


@pytest.mark.parametrize(
    ("index", "num_sequences"),
    [
        ([1, 1], None),  # does not start at 0
        ([-1, 0], None),
        ([0, 2], None),  # sequence 1 has no token
        ([0, 1, 0], None),  # tokens of sequence 0 in two places
        ([0, 0], 2),  # sequence 1 has no token, at the end
        ([0, 1], 1),  # one sequence too many
    ],
)
def test_an_index_with_gaps_or_out_of_order_is_refused(index, num_sequences):
    with pytest.raises(ShapeError, match="sequence_index must rise from 0"):
        pad_sequences(torch.zeros(len(index)), torch.tensor(index), num_sequences)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeError, match=r"\[N\]"):
        pad_sequences(torch.zeros(3), torch.tensor([0, 0]))
    with pytest.raises(ShapeError, match=r"\[N\]"):
        sequence_lengths(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"\[B, T\]"):
        unpad_sequences(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
