"""Two and three gloo ranks compute what one does: figures, losses and gradients. One world of each size makes all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sizes import usual
from tests.trainer.ranks.cases import CASES, LONG, MUTANTS
from tests.trainer.ranks.processes import run_world

STEPS = 4  # two of which a shared trunk spends on its critic alone; the mutants are seen within two
# In more of them only rounding adds up: it is worst where 100 steps end, and the bounds are those of 100.
LONG_STEPS = usual(30, full=100)
SIZES = {
    # Three ranks have the cases in which their number matters: uneven shards, dummies, rows that are too few.
    2: (tuple(CASES), tuple(MUTANTS)),
    3: (("grpo", "ppo_shared_trunk", "few_rows"), ()),
}
LONG_OF_THREE = ("grpo", "ppo_shared_trunk", "decoupled")
# Relative to one rank. Sums are taken in another order, and each step builds on the one before.
TOLERANCE, FLOAT32_TOLERANCE = 1e-6, 2e-3

Results = dict[str, Any]


def results_of(size: int, steps: int, cases, mutants, folder: Path, *, sequence: int = 1, replicas: int = 1) -> Results:
    file = folder / f"{size}.json"
    arguments = [str(file), str(steps), str(sequence), str(replicas), *cases, "--", *mutants]
    timeout_s = 280.0 if steps <= STEPS and size < 4 else 570.0
    run_world(size, "tests.trainer.ranks.world_program", arguments, folder / f"{size}.log", timeout_s)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, Results]:
    folder = tmp_path_factory.mktemp("worlds")
    return {size: results_of(size, STEPS, *names, folder) for size, names in SIZES.items()}


def worst_of(found: Results) -> tuple[str, float]:
    return max(found["worst"].items(), key=lambda item: item[1])


@pytest.mark.bits
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, (names, _) in SIZES.items() for name in names])
def test_figures_and_gradients_are_those_of_one_rank(results, size, name):
    figure, off = worst_of(results[size][name])
    assert off <= (FLOAT32_TOLERANCE if name == "float32" else TOLERANCE), figure
    assert any(key.startswith("gradient of") for key in results[size][name]["worst"])


def test_there_were_dummies_and_fewer_rows_than_ranks(results):
    assert results[2]["grpo"]["dummies"] > 0
    assert results[3]["few_rows"]["dummies"] > 0


@pytest.mark.bits
@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_broken_is_seen(results, name):
    assert worst_of(results[2][name])[1] > 1e-2


@pytest.mark.bits
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_score_the_canary_as_one_process_does(results, size):
    canary = results[size]["canary"]
    assert canary["shapes"] == [7] * 4
    assert canary["dtype"] == "float32"
    assert canary["off"] < 1e-5
    assert -6.0 < canary["mean"] < -0.5  # sequences that the policy finds likely


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_differs_is_named_with_what_differs(results, size):
    same_state, same_start, state, start = results[size]["differing"]
    assert same_state == same_start == ""
    assert state.startswith(f"AsyncRLError: trainer rank {size - 1} and rank 0 differ in kl_coef")
    assert start.startswith(f"ConfigError: trainer rank {size - 1} and rank 0 differ in the section learner")


@pytest.mark.slow
@pytest.mark.bits
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("size", "cases"), [(2, LONG), (3, LONG_OF_THREE)])
def test_losses_of_many_steps_are_those_of_one_rank(size, cases, tmp_path):
    results = results_of(size, LONG_STEPS, cases, (), tmp_path)
    for name in cases:
        assert results[name]["worst"]["loss"] <= 1e-5, name
        assert worst_of(results[name])[1] <= 1e-3, name
