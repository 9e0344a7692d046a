"""Sums and means over sequences against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.algorithms.sequences import require_same_shape, sequence_means, sequence_sums
from asyncrl.errors import ShapeError

pytestmark = pytest.mark.numeric


def test_three_tokens_by_hand():
    values, index = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1])
    assert sequence_sums(values, index).tolist() == [3.0, 3.0, 3.0]
    assert sequence_means(values, index).tolist() == [1.5, 1.5, 3.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9)), max_size=12))
def test_sums_means_and_their_gradients_equal_the_loop(tokens):
    numbers = sorted({number for number, _ in tokens})
    index = torch.tensor([numbers.index(number) for number, _ in tokens], dtype=torch.int64)
    values = torch.tensor([value for _, value in tokens], dtype=torch.float64, requires_grad=True)
    rows = [[value for other, value in tokens if other == number] for number, _ in tokens]
    assert sequence_sums(values, index).tolist() == pytest.approx([sum(row) for row in rows])
    means = sequence_means(values, index)
    assert means.tolist() == pytest.approx([sum(row) / len(row) for row in rows])
    # Each of the n tokens of a sequence has 1 / n of it, and there are n of them.
    (gradient,) = torch.autograd.grad(means.sum(), values)
    assert gradient.tolist() == pytest.approx([1.0] * len(tokens))


def test_differing_shapes_are_named():
    with pytest.raises(ShapeError, match=r"a \(2,\), b \(3,\)"):
        require_same_shape(a=torch.zeros(2), b=torch.zeros(3))
