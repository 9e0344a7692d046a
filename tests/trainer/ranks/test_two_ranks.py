"""Two ranks that share rows, and two that have a copy of the model each, compute what one does: one world for both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.ranks.cases import COPIES, SHARING
from tests.trainer.ranks.loading_cases import save_model
from tests.trainer.ranks.test_equal_to_one_rank import Results, results_of, worst_of
from tests.trainer.ranks.test_replicas import check_copies, check_exports, check_figures
from tests.trainer.ranks.test_sequence_parallel import check_world
from tests.trainer.tiny import save_tiny_model

pytestmark = pytest.mark.bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two_ranks")
    save_model("lora in bfloat16", folder / "lora in bfloat16")
    save_tiny_model(folder / "other", seed=1)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Results:
    cases, mutants = ((*ours, *theirs) for ours, theirs in zip(SHARING, COPIES, strict=True))
    return results_of(2, 2, cases, mutants, folder, sequence=2)


def test_two_ranks_that_share_rows_are_as_one(results):
    check_world(results, *SHARING)


def test_two_ranks_with_a_copy_each_are_as_one(results, folder):
    (case,), (mutant, variant) = COPIES
    check_figures(results, (case, variant))
    assert worst_of(results[mutant])[1] > 1e-2
    check_copies(results["replicas"])
    check_exports(folder)
