"""The protocol under every fault that the simulation knows, by seeds; and that a seed is a run.

A seed that fails names the command that repeats it. `python -m tests.simulation.run --seeds 10000` runs as many as one
likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.link import limits
from tests.simulation.world import simulate
from tests.sizes import usual

# A killed generator takes phases of weight syncs along that had not begun.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_SEEDS = 20
SLOW_SEEDS = usual(80, full=200)  # the first hundred find every mutant of test_mutants


def test_nothing_is_lost_and_nothing_is_trained_twice_whatever_fails():
    acknowledged = desk_lives = generator_lives = 0
    for seed in range(DEFAULT_SEEDS):
        world = simulate(seed)
        acknowledged += world.checker.counts["acknowledged"]
        desk_lives += world.counts["desk lives"]
        generator_lives += world.counts["generator lives"]
    assert acknowledged > 10 * DEFAULT_SEEDS, "the runs did something"
    assert desk_lives > 3 * DEFAULT_SEEDS
    assert generator_lives > 5 * DEFAULT_SEEDS


def test_the_same_holds_in_a_fleet_so_large_that_beats_are_rare(monkeypatch):
    monkeypatch.setattr(limits, "BEATS_PER_S", 0.5)  # so that these few count as many: a beat in 4 s and more
    for seed in range(100, 104):
        assert simulate(seed).checker.counts["acknowledged"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_lost_in_many_more_runs():
    for seed in range(DEFAULT_SEEDS, DEFAULT_SEEDS + SLOW_SEEDS):
        simulate(seed)


def test_a_seed_gives_the_same_run_each_time():
    assert simulate(3).digest == simulate(3).digest != simulate(5).digest


def test_a_seed_gives_the_same_run_whatever_the_order_of_sets():
    code = "from tests.simulation.world import simulate; print(simulate(15).digest)"
    digests = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        digests.add(run.stdout)
    assert len(digests) == 1
