"""A journal and a checkpoint that an earlier release wrote are read as they were meant.

Data: make_data.py, once; what it wrote then must stay readable.
"""

import numpy as np
import pytest

from tests.golden import product
from tests.golden.stored import OLD_RUN, copy_of, read_arrays, read_json

EXPECTED = read_json("old_run.json")
KINDS_THEN = set(range(1, 7))


@pytest.fixture
def run_dir(tmp_path):
    return copy_of(OLD_RUN, tmp_path)


def test_every_record_of_the_journal_comes_back(run_dir):
    records = product.read_journal(run_dir / "journal")
    assert [product.record_values(record) for record in records] == EXPECTED["records"]
    assert {product.record_kind(record) for record in records} == KINDS_THEN <= product.record_kinds()
    assert len(list((run_dir / "journal").glob("*.segment"))) > 1


def test_the_groups_in_the_journal_come_back(run_dir):
    groups = product.groups_of(product.read_journal(run_dir / "journal"))
    assert [product.group_values(group) for group in groups.values()] == EXPECTED["groups"]


def test_a_learner_resumes_from_the_journal(run_dir):
    version = EXPECTED["checkpoint"]["version"]
    assert product.recovery_values(run_dir / "journal", version) == EXPECTED["recovery"]
    assert EXPECTED["recovery"]["steps"] and EXPECTED["recovery"]["buffered"]


def test_the_number_of_starts_is_known(run_dir):
    assert product.starts_of(run_dir) == EXPECTED["starts"] == 3


def test_the_checkpoint_verifies(run_dir):
    folder = run_dir / "checkpoints" / EXPECTED["checkpoint"]["folder"]
    assert product.manifest_values(folder) == EXPECTED["manifest"]


def test_the_checkpoint_is_restored_whole(run_dir):
    trainer = product.small_trainer(seed=99, version=0)
    stored = read_arrays("old_checkpoint.npz")
    before = product.trained_weights(trainer)
    assert not any(np.array_equal(before[name], stored[name]) for name in before)
    assert product.restore(run_dir / "checkpoints", trainer) == EXPECTED["checkpoint"]
    restored = product.trained_weights(trainer) | product.optimizer_values(trainer)
    assert restored.keys() == stored.keys()
    for name, value in stored.items():
        assert restored[name].dtype == value.dtype and restored[name].tobytes() == value.tobytes(), name


def test_a_damaged_checkpoint_is_not_taken(run_dir):
    path = run_dir / "checkpoints" / EXPECTED["checkpoint"]["folder"] / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert product.restore(run_dir / "checkpoints", product.small_trainer(seed=99, version=0)) is None
