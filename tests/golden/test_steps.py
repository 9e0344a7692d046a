"""Ten steps of each kind of training, from a stored journal, in float64: losses, gradients and final weights.

Float64 and a tolerance, not bits: kernels differ from CPU to CPU in the last place. Data: make_data.py.
"""

import json

import numpy as np
import pytest

from tests.golden import product
from tests.golden.stored import JOURNAL, copy_of, read_arrays, read_json

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-9
METHODS = sorted(product.METHODS)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = copy_of(JOURNAL, tmp_path_factory.mktemp("golden"))
    return list(product.batches_of(product.read_journal(folder)))


def run(method, batches):
    """Metrics of every step, and the weights after the last."""
    trainer = product.new_trainer(method, version=batches[0][0])
    metrics = [product.train(trainer, groups) for _, groups in batches]
    return metrics, product.trained_weights(trainer)


def test_the_journal_holds_what_makes_steps_differ(batches):
    versions, groups = [version for version, _ in batches], [group for _, batch in batches for group in batch]
    rollouts = [product.group_values(group)["rollouts"] for group in groups]
    rewards = [{rollout["reward"] for rollout in row} for row in rollouts]
    spans = [len(rollout["spans"]) for row in rollouts for rollout in row]
    assert versions == list(range(versions[0], versions[0] + 10))
    assert {1, 2, 3} <= set(spans)
    assert any(len(row) == 1 for row in rewards) and any(len(row) > 2 for row in rewards)
    assert len({len(rollout["tokens"]) for row in rollouts for rollout in row}) > 5


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_are_those_stored(method, batches):
    metrics, weights = run(method, batches)
    expected = read_json("steps.json")[method]
    assert len(metrics) == len(expected) == 10
    for measured, stored in zip(metrics, expected, strict=True):
        assert {"loss", "policy_loss", "grad_norm"} <= stored.keys()
        assert {name: measured[name] for name in stored} == pytest.approx(stored, rel=TOLERANCE, abs=TOLERANCE)
    stored_weights = read_arrays(f"weights_{method}.npz")
    assert weights.keys() == stored_weights.keys()
    for name, stored in stored_weights.items():
        assert weights[name].dtype == stored.dtype == np.float64
        np.testing.assert_allclose(weights[name], stored, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_steps_give_the_same_bits(method, batches):
    (metrics, weights), (again, weights_again) = run(method, batches), run(method, batches)
    assert json.dumps(metrics) == json.dumps(again)
    assert {name: value.tobytes() for name, value in weights.items()} == {
        name: value.tobytes() for name, value in weights_again.items()
    }
