"""The benchmarks run: every script in its quick mode, as its user starts it."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

import pytest

from benchmarks import common
from tests.benchmarks.scripts import run_script

ROOT = Path(__file__).parent.parent.parent
SPEED = ("transport", "generator_vs_vllm", "weight_sync", "weight_delta", "digest", "head")
SCRIPTS = (*(f"speed.{name}" for name in SPEED), "studies.async_vs_sync")


@pytest.mark.slow
@pytest.mark.timeout(650)
@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_mode_ends_well_and_writes_its_figures(script, tied_model_dir, tmp_path):
    arguments = ["--quick", "--results", str(tmp_path)]
    if script == "studies.async_vs_sync":
        arguments += ["--model", str(tied_model_dir)]
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{script.rpartition('.')[2]}.quick.json").read_text())
    assert record["rows"] and record["machine"]["cpus"] == os.cpu_count()
    compared = [row for row in record["rows"] if "ratios" in row]
    assert compared, "a benchmark without a reference"
    for row in compared:
        pairs = zip(row["asyncrl"], row["reference"], row["ratios"], strict=True)
        assert all(ratio == pytest.approx(mine / other) and ratio > 0 for mine, other, ratio in pairs)
        assert row["ratio_median"] == pytest.approx(statistics.median(row["ratios"]))
    last_lines = done.stdout.splitlines()[-len(record["rows"]) - 10 :]
    assert any("--quick" in line and "too small for a result" in line for line in last_lines)


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
