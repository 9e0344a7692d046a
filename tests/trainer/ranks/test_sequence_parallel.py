"""Two ranks that share the tokens of packed rows compute what one does, forward and backward."""

import json

import pytest

from asyncrl.trainer.engines.sequence_parallel import slice_lengths, slice_of
from tests.trainer.ranks.processes import run_world

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    run_world(2, "tests.trainer.ranks.sequence_program", [str(folder / "results")], folder / "log", timeout_s=150.0)
    return json.loads((folder / "results").read_text())


@pytest.mark.slow
def test_hidden_states_and_gradients_are_those_of_one_process(written):
    assert len(written["found"]) == 6
    for name, (hidden, gradient) in written["found"].items():
        assert hidden < 1e-6, name  # norms are float32 in transformers
        assert gradient < 1e-5, name


@pytest.mark.slow
def test_heads_that_cannot_be_dealt_are_refused(written):
    assert "3 heads of queries and 3 of keys cannot be dealt to 2 ranks" in written["refused"]


def test_slices_hold_each_input_once_and_are_as_equal_as_can_be():
    assert slice_lengths(7, 3) == [3, 2, 2]
    assert [slice_of(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert slice_lengths(1, 2) == [1, 0]
