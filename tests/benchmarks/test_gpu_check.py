"""The GPU check keeps what it has measured whatever a section does, and rehearses on a CPU."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks.gpu import check
from benchmarks.gpu.check import Section, run_section
from tests.benchmarks.scripts import run_script
from tests.waits import wait_until


def test_a_section_without_its_packages_or_time_is_left_out(tmp_path):
    absent = run_section(Section("x", "environment", 60, ("no_such_package", "sys")), tmp_path, "cpu", 60)
    assert absent == {"status": "left out", "why": "no no_such_package here"}
    assert run_section(Section("x", "environment", 60, ()), tmp_path, "cpu", 3)["status"] == "left out"


def test_a_section_that_fails_says_why_and_costs_itself_alone(tmp_path):
    found = run_section(Section("x", "run", 60, (), {"shape": "no such shape"}), tmp_path, "cpu", 60)
    assert found["status"] == "failed with exit code 1"
    assert "KeyError: 'no such shape'" in found["end_of_output"]


def test_a_section_that_hangs_is_killed_with_what_it_started_and_keeps_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "KILL_AFTER_S", 0.1)
    monkeypatch.setattr(check, "MIN_SECONDS", 0.0)
    hanging = (
        "import json, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"Path({str(tmp_path / 'result.json')!r}).write_text(json.dumps({{'child': child.pid}}))\n"
        "time.sleep(600)\n"
    )
    module = tmp_path / "hanging.py"
    module.write_text(hanging)
    monkeypatch.setattr(check, "command_of", lambda section, request: ["python3", str(module)])
    started = time.monotonic()
    found = run_section(Section("x", "environment", 60, ()), tmp_path, "cpu", 3.0)
    assert found["status"] == "not done after 3 s"
    assert time.monotonic() - started < 30
    wait_until(lambda: not _runs(found["figures"]["child"]), "the end of what the section started")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_rehearsal_trains_and_runs(tmp_path):
    out = tmp_path / "check.json"
    sections = ["environment", "learner 0.6B 2048", "run 0.6B"]
    done = run_script("gpu.check", "--device", "cpu", "--tiny", "--out", str(out), "--only", *sections)
    assert done.returncode == 0, done.stdout + done.stderr + out.read_text()
    found = json.loads(out.read_text())["sections"]
    assert list(found) == sections
    assert found["learner 0.6B 2048"]["figures"]["tokens_per_s"] > 0
    assert found["run 0.6B"]["figures"]["steps"] == 3
    assert found["run 0.6B"]["figures"]["step_medians"]["grad_norm"] > 0
