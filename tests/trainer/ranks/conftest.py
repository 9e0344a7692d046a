"""A world of two ranks for the quick tests of several modules: processes cost more than what they do here."""

from __future__ import annotations

import pytest

from tests.trainer.ranks.loading_cases import save_model
from tests.trainer.ranks.test_equal_to_one_rank import Results, results_of
from tests.trainer.tiny import save_tiny_model

# Of ranks that share all rows.
SHARING = (("gspo", "few_inputs"), ("inputs_of_another_slice", "gradients_counted_by_each"))
# Of ranks that have a copy of the model each, and rows of their own.
COPIES = (("grpo s1 x2",), ("replicas_by_themselves s1 x2", "summed_each_pass s1 x2"))


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Results:
    """What `world_program` found, of `SHARING` and of `COPIES`."""
    folder = tmp_path_factory.mktemp("two_ranks")
    save_model("lora in bfloat16", folder / "lora in bfloat16")
    save_tiny_model(folder / "other", seed=1)
    cases, mutants = ((*ours, *theirs) for ours, theirs in zip(SHARING, COPIES, strict=True))
    return results_of(2, 2, cases, mutants, folder, sequence=2) | {"folder": str(folder)}
