"""The benchmarks run: every script in its quick mode, as its user starts it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import common
from tests.benchmarks.scripts import check_quick_record, run_script

ROOT = Path(__file__).parent.parent.parent
SPEED = ("transport", "generator_vs_vllm", "weight_sync", "weight_delta", "digest", "head")
SCRIPTS = (*(f"speed.{name}" for name in SPEED), "studies.async_vs_sync")


@pytest.mark.slow
@pytest.mark.timeout(650)
@pytest.mark.parametrize("script", [f"speed.{name}" for name in SPEED])
def test_quick_mode_ends_well_and_writes_its_figures(script, tmp_path):
    """That of studies.async_vs_sync: test_U10_the_benchmark_runs_a_users_own_task_outside_the_repository."""
    arguments = ["--quick", "--results", str(tmp_path)]
    if script == "speed.head":
        arguments += ["--pairs", "1"]  # each takes six processes
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{script.rpartition('.')[2]}.quick.json").read_text())
    check_quick_record(record, done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script):
    done = run_script(script, "--help")
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--quick", "--pairs", "--results"))


@pytest.mark.parametrize("script", ["speed.learner_peer", "studies.delayed_sampling"])
def test_a_part_of_others_says_how_it_is_started(script):
    done = run_script(script, "--help")
    assert done.returncode == 2 and f"python -m benchmarks.{script} " in done.stderr.splitlines()[-1]


def test_work_of_others_is_told_from_ones_own():
    with common.watch() as watch:
        own = common.cpu_seconds()
        while common.cpu_seconds() - own < 0.3:
            sum(range(100_000))
    # Own work counts as nobody else's, whatever the machine does besides: all of it would be 0.3 s.
    assert watch.others_share <= 1 - 0.25 / (watch.seconds * os.cpu_count())


def test_a_busy_machine_and_too_few_pairs_mark_the_result(tmp_path, capsys):
    parser = common.arguments("a benchmark")
    options = parser.parse_args(["--pairs", "2", "--results", str(tmp_path)])
    report = common.Report("sample", options)
    report.watched(common.Watch(seconds=1.0, others_share=0.31))
    assert report.pairs("work", "s", [1.0, 3.0, 2.0], [2.0, 2.0, 2.0], "other") == 1.0
    report.begin()
    report.watched(common.Watch(seconds=1.0, others_share=0.02))
    report.figure("rest", "s", [1.0])
    path = report.finish()
    printed = capsys.readouterr().out
    assert "BUSY MACHINE: others took up to 31% of the CPU" in printed and "fewer than 5" in printed
    record = json.loads(path.read_text())
    assert record["busy_machine"] and record["rows"][0]["ratio_range"] == [0.5, 1.5]
    assert [row["others_cpu_share"] for row in record["rows"]] == [0.31, 0.02]
    assert [line.startswith("!") for line in printed.splitlines() if ", s " in line] == [True, False]
