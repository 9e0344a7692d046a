"""What `asyncrl bench` concludes from what it measured."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from asyncrl.cli.main import main
from asyncrl.cli.measuring.bench import Budget
from asyncrl.cli.measuring.bench_figures import Circumstances, interval, measure, needed_warm_steps
from asyncrl.cli.measuring.bench_pages import GeneratorFigures, GeneratorWindow, parsed, window_between
from asyncrl.cli.measuring.bench_words import advice, measured_lines, table
from asyncrl.host.process_tree import memory_by_branch, memory_of_tree
from asyncrl.metrics.exposition import Exposition
from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.report.advisor import bottleneck
from asyncrl.report.run_records import StepRecord
from tests.conftest import make_tiny_model

ROOT = Path(__file__).parents[2]


def steps(
    count: int = 20, *, tokens: float = 1000, seconds: float = 2.0, ess: float | None = 0.9, noise: float = 0.0, **more
):
    rng = random.Random(3)
    return [
        StepRecord(
            version=n, interval_s=seconds * (1 + noise * rng.uniform(-1, 1)), step_s=0.5,
            tokens_trained=tokens, policy_age_mean=1.0, policy_age_max=2, ess_share=ess,
            **({"learner_time_s": {"compute": seconds / 4, "data": 3 * seconds / 4}} | more),
        )
        for n in range(count)
    ]  # fmt: skip


def of_age(age: int, *, warm_steps: int = 20, generators: GeneratorWindow | None = None, **changes):
    under = Circumstances(max_age=age, ready_s=20.0, warm_steps=warm_steps, learner_bytes=10**9, generator_bytes=10**9)
    two = GeneratorWindow(2, 80.0, 22000.0, {"decode": 58.0, "swap": 2.0, "leases": 20.0})
    return measure(steps(**changes), generators or two, under)


def test_rates_are_those_of_the_whole_stretch():
    result = of_age(2)
    assert result.trained_per_s.mean == pytest.approx(500) and result.generated_per_s == pytest.approx(550)
    assert result.effective_per_s.mean == pytest.approx(450)
    assert result.learner_could_per_s == pytest.approx(1000 / 0.5)
    assert result.generators_could_per_s == pytest.approx(22000 / 60.0 * 2)  # two generators
    assert result.learner_idle_share == pytest.approx(0.75) and result.generator_idle_share == pytest.approx(0.25)
    assert result.learner_time == {"compute": 0.25, "data": 0.75}
    assert (result.learner_ledger, result.generator_ledger) == (pytest.approx(1.0), pytest.approx(1.0))
    assert result.notes == []


def test_what_would_be_taken_wrongly_is_said():
    (flat,) = of_age(2, ess=None).notes
    assert "all rewards of each group were equal" in flat
    (skipped,) = of_age(2, zero_variance_share=0.75).notes
    assert "75% of the groups had equal rewards" in skipped
    (early,) = of_age(8, warm_steps=5).notes
    assert "after 5 steps; 10 would be needed" in early
    (few,) = of_age(2, count=3).notes
    assert "only 3 steps" in few
    short = GeneratorWindow(1, 40.0, 100.0, {"decode": 39.0})
    (lost,) = of_age(2, generators=short).notes
    assert "generators by activity adds up to 97.5%" in lost
    grown = [StepRecord(version=n, interval_s=1.0, completion_tokens_mean=10.0 + n, ess_share=1.0) for n in range(10)]
    under = Circumstances(max_age=0, ready_s=1.0, warm_steps=4, learner_bytes=1, generator_bytes=1)
    said = measure(grown, GeneratorWindow(1, 10.0, 1.0, {"decode": 10.0}), under).notes
    assert any("changed in length by +42%" in note for note in said)


def test_an_interval_holds_the_true_rate_as_often_as_it_says():
    held = 0
    for seed in range(100):
        rng = random.Random(seed)
        drawn = [StepRecord(version=n, interval_s=rng.expovariate(1.0), tokens_trained=1) for n in range(40)]
        found = interval(drawn, lambda step: step.tokens_trained or 0.0)
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
    assert "no token was older than 2: max_age=4 changes nothing" in said[2]
    assert "staleness.max_age=2" in advice([of_age(0, tokens=600), of_age(2)])[0]
    assert all("cannot separate" not in line for line in advice([of_age(0, tokens=600), of_age(2)]))
    assert len({len(line) for line in table(results)}) == 1


def test_what_bounds_the_run_is_said_as_at_the_end_of_a_run():
    busy = GeneratorWindow(1, 40.0, 22000.0, {"decode": 38.0, "swap": 2.0})
    found = bottleneck({"compute": 24.0, "data": 16.0}, {"decode": 38.0, "swap": 2.0})
    assert found is not None and found.name == "generators"
    result = of_age(2, generators=busy, learner_time_s={"compute": 1.2, "data": 0.8})
    assert result.bounded_by == f"{found.name}: {found.evidence}"
    said = measured_lines(result)
    assert any("compute 60%   data 40%   (100.0% of the wall time)" in line for line in said)
    assert any("learner 1,000 MB, generators 1,000 MB, together 2,000 MB" in line for line in said)


# -- the time that is given, the pages of generators -------------------------------------------------------------------


@pytest.mark.parametrize("start_s", [10.0, 28.0])
def test_all_bounds_together_keep_to_the_time_that_is_given(start_s):
    now, budget = 0.0, Budget(220.0, 5)
    windows = []
    for _ in range(5):
        now += start_s
        budget.started(start_s)
        windows.append(budget.window_s(now))
        now += windows[-1]
        budget.runs_left -= 1
    assert now == pytest.approx(220.0)
    assert max(windows) - min(windows) < 1e-6, "each is measured for as long as the others"


def test_a_single_bound_is_not_measured_for_longer_than_that_is_worth():
    budget = Budget(220.0, 1)
    budget.started(25.0)
    assert budget.window_s(25.0) == 45.0
    late = Budget(10.0, 2)
    late.started(25.0)
    assert late.window_s(25.0) == 5.0, "something is measured in any case"


def test_ages_need_as_many_steps_as_the_bound_before_they_are_steady():
    assert [needed_warm_steps(age) for age in (0, 2, 4, 8)] == [4, 4, 6, 10]


def test_the_pages_of_a_generator_are_read_as_they_are_written():
    page = Exposition(GeneratorMetrics)
    page.replace(GeneratorMetrics(tokens_generated=70, time_s={"start": 3.5, "decode": 1.25}, busy_s=1.25))
    page.replace(GeneratorMetrics(tokens_generated=90, time_s={"start": 3.5, "decode": 2.25}, busy_s=2.25))
    assert parsed(page.render(), 7.0) == GeneratorFigures(7.0, 90.0, {"start": 3.5, "decode": 2.25})


def test_a_stretch_of_generators_is_the_difference_of_two_readings():
    before = {"a": GeneratorFigures(10.0, 100, {"start": 9.0}), "b": GeneratorFigures(11.0, 0, {"start": 8.0})}
    after = {
        "a": GeneratorFigures(20.0, 300, {"start": 9.0, "decode": 10.0}),
        "b": GeneratorFigures(21.5, 50, {"start": 9.0, "decode": 9.5}),
    }
    window = window_between(before, after)
    assert window == GeneratorWindow(2, 20.5, 250.0, {"decode": 19.5, "start": 1.0})
    assert window.tokens_per_s == pytest.approx(250 / 10.25)
    assert window_between(before, {"a": after["a"]}) is None, "one has left"
    assert window_between(after, before) is None, "both began anew"


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
        branches = memory_by_branch(os.getpid())
        assert sum(branches.values()) > found
        (branch,) = [held for command, held in branches.items() if "bytearray" in command]
        assert branch == pytest.approx(found, rel=0.1)
    finally:
        process.kill()
        process.wait()


def test_a_mistake_in_the_configuration_is_told_before_anything_starts(capsys):
    assert main(["bench", "configs/quickstart.yaml", "learner.lrr=1"]) == 2
    assert "learner.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--ages", "-1"], "staleness.max_age"), (["--within", "0"], "--within 0: give more than 0")],
)
def test_a_mistake_in_the_arguments_too(arguments, said, capsys):
    assert main(["bench", "configs/quickstart.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err


# -- a user's own task -------------------------------------------------------------------------------------------------

REWARDS = """
def evens(completion) -> float:
    return sum(letter in "24680" for letter in completion) / max(1, len(completion))
"""
CONFIG = """
model: {path: model, dtype: float32, max_length: 64}
task:
  path: asyncrl.tasks.dataset:Dataset
  args: {path: words.jsonl, prompt: question, rewards: {evens: "my_rewards:evens"}}
sampling: {group_size: 4, max_new_tokens: 8}
learner: {groups_per_step: 4, device: cpu}
generator: {max_sequences: 16, kv_cache_gib: 0.25, device: cpu}
"""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of everything below a folder, but for what git itself keeps and caches."""
    own = {".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__", ".hypothesis", "runs"}
    found = {}
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in own or folder != ROOT]
        for name in files:
            status = os.stat(os.path.join(path, name))
            found[os.path.join(path, name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def short_folder():
    """A folder whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow  # a real run: who measures, and where it writes, is only seen in one
def test_a_users_own_task_is_measured_and_nothing_is_left_behind(tmp_path, short_folder):
    folder, scratch = tmp_path / "own", short_folder
    folder.mkdir()
    make_tiny_model(folder / "model", tied=True)
    lines = [json.dumps({"question": f"count-to-{n}=", "answer": str(n)}) for n in range(64)]
    (folder / "words.jsonl").write_text("\n".join(lines))
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my.yaml").write_text(CONFIG)
    before = listing(folder), listing(ROOT)
    environment = {**os.environ, "TMPDIR": str(scratch)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "asyncrl.cli.main", "bench", "my.yaml", "--seconds", "6", "--json"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (listing(folder), listing(ROOT)) == before
    assert [path for path in scratch.iterdir() if path.name.startswith("asyncrl-bench")] == []
    (result,) = json.loads(done.stdout)
    assert result["steps"] >= 2 and result["generated_per_s"] > 0 and result["trained_per_s"]["mean"] > 0
    assert result["learner_ledger"] == pytest.approx(1.0, abs=0.01)
    assert result["generator_ledger"] == pytest.approx(1.0, abs=0.02), "six seconds, dated to 50 ms at each end"
    assert sum(result["learner_time"].values()) == pytest.approx(1.0)
    assert 10**8 < result["learner_bytes"] < 10**10 and 10**8 < result["generator_bytes"] < 10**10
    assert result["seconds"] + result["ready_s"] < time.monotonic() - began
