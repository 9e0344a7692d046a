"""The test of the test: each broken rule of `mutants` is noticed within so many seeds."""

from __future__ import annotations

import pytest

from tests.simulation.checker import Violation
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import simulate

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")


def seeds_until_it_is_found(mutant) -> int:
    """The seeds that a mutant lives through. Fails when it lives through all.

    The seed that found it before is tried first: it costs one run while simulation and protocol stay as they are.
    """
    for number, seed in enumerate([mutant.found_by, *range(mutant.seeds)]):
        with pytest.MonkeyPatch.context() as patch:
            mutant.apply(patch)
            try:
                simulate(seed)
            except (Violation, Exception):  # noqa: BLE001 - some broken rules the code notices itself
                return number
    pytest.fail(f"{mutant.name}: {mutant.seeds} seeds noticed nothing of it: {mutant.promise}")


SLOW = [mutant for mutant in MUTANTS if mutant.slow]
FAST = [mutant for mutant in MUTANTS if not mutant.slow]


@pytest.mark.parametrize("mutant", FAST, ids=lambda mutant: mutant.name)
def test_a_broken_rule_is_noticed(mutant):
    seeds_until_it_is_found(mutant)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", SLOW, ids=lambda mutant: mutant.name)
def test_a_broken_rule_that_hides_well_is_noticed(mutant):
    seeds_until_it_is_found(mutant)


def test_there_are_mutants_of_every_kind():
    assert len(MUTANTS) >= 20
    assert len({mutant.promise for mutant in MUTANTS}) == len(MUTANTS)
