"""What `asyncrl bench` concludes from what it measured."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from asyncrl.cli.main import main
from asyncrl.cli.measuring.bench_figures import advice, interval, measure, measured_lines, table
from asyncrl.host.process_memory import memory_of_tree
from asyncrl.report.advisor import bottleneck


def steps(count: int = 20, *, tokens: float = 1000.0, seconds: float = 2.0, ess: float = 0.9, noise: float = 0.0):
    rng = random.Random(3)
    return [
        {
            "version": n, "interval_s": seconds * (1 + noise * rng.uniform(-1, 1)), "step_s": 0.5,
            "tokens_trained": tokens, "tokens_generated": tokens * 1.1, "learner_idle_s": 0.5,
            "generator_busy_s": 3.0, "generator_idle_s": 1.0, "policy_age_mean": 1.0, "policy_age_max": 2,
            "ess_share": ess, "learner_time_s": {"compute": 0.5, "data": 1.5}, "generator_time_s": {},
        }
        for n in range(count)
    ]  # fmt: skip


def of_age(age: int, **changes):
    return measure(age, steps(**changes), ready_s=20.0, memory_bytes=10**9)


def test_rates_are_those_of_the_whole_stretch():
    result = of_age(2)
    assert result.trained_per_s.mean == pytest.approx(500) and result.generated_per_s == pytest.approx(550)
    assert result.effective_per_s.mean == pytest.approx(450)
    assert result.learner_could_per_s == pytest.approx(1000 / 1.5)
    assert result.generators_could_per_s == pytest.approx(1100 / 3.0 * 2)  # two generators
    assert result.learner_idle_share == pytest.approx(0.25) and result.generator_idle_share == pytest.approx(0.25)
    assert result.learner_time == {"compute": 0.25, "data": 0.75} and result.generator_time == {}


def test_an_interval_holds_the_true_rate_as_often_as_it_says():
    held = 0
    for seed in range(100):
        rng = random.Random(seed)
        drawn = [{"interval_s": rng.expovariate(1.0), "tokens_trained": 1.0} for _ in range(40)]
        found = interval(drawn, lambda step: step["tokens_trained"])
        held += found.low <= 1.0 <= found.high
    assert 0.82 <= held / 100 <= 0.97


def test_the_least_age_that_cannot_be_told_from_the_best_is_advised():
    results = [
        of_age(0, tokens=600),
        of_age(1, tokens=990, noise=0.3),
        of_age(2, tokens=1000, noise=0.3),
        of_age(4, tokens=1000, ess=0.5),
    ]
    said = advice(results)
    assert "staleness.max_age=1" in said[0] and "cannot separate 1 from 2" in said[1]
    assert "staleness.max_age=2" in advice([of_age(0, tokens=600), of_age(2)])[0]
    assert all("cannot separate" not in line for line in advice([of_age(0, tokens=600), of_age(2)]))
    assert len({len(line) for line in table(results)}) == 1


def test_what_bounds_the_run_is_said_as_at_the_end_of_a_run():
    times = {"learner_time_s": {"compute": 1.2, "data": 0.8}, "generator_time_s": {"decode": 1.9, "swap": 0.1}}
    lines = [{**line, **times} for line in steps()]
    found = bottleneck({"compute": 24.0, "data": 16.0}, {"decode": 38.0, "swap": 2.0})
    assert found is not None and found.name == "generators"
    result = measure(2, lines, ready_s=20.0, memory_bytes=1)
    assert result.bounded_by == f"{found.name}: {found.evidence}"
    assert any("compute 60%   data 40%" in line for line in measured_lines(result))
    assert advice([result]) == [f"bounded by {result.bounded_by}"]


FORKS = """
import os, sys
block = bytearray(64 * 2**20)
block[::4096] = b"x" * len(block[::4096])
if os.fork():
    print("ready", flush=True)
sys.stdin.read()
"""


def test_memory_of_shared_pages_counts_once():
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        found = memory_of_tree(process.pid)
        assert 64 * 2**20 <= found < 110 * 2**20, "twice the block would be 128 MiB"
        assert memory_of_tree(os.getpid()) > found
    finally:
        process.kill()
        process.wait()


def test_a_mistake_in_the_configuration_is_told_before_anything_starts(capsys):
    assert main(["bench", "configs/quickstart.yaml", "learner.lrr=1"]) == 2
    assert "learner.lr" in capsys.readouterr().err
