"""Runs a benchmark as a user does, and looks at what its quick mode wrote and printed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def run_script(script: str, *arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def check_quick_record(record: dict[str, Any], printed: str) -> None:
    """Figures beside those of a reference, by the rules of benchmarks.common, marked as too small for a result."""
    assert record["rows"] and record["machine"]["cpus"] == os.cpu_count()
    compared = [row for row in record["rows"] if "ratios" in row]
    assert compared, "a benchmark without a reference"
    for row in compared:
        pairs = zip(row["asyncrl"], row["reference"], row["ratios"], strict=True)
        assert all(ratio == pytest.approx(mine / other) and ratio > 0 for mine, other, ratio in pairs)
        assert row["ratio_median"] == pytest.approx(statistics.median(row["ratios"]))
    last_lines = printed.splitlines()[-len(record["rows"]) - 10 :]
    assert any("--quick" in line and "too small for a result" in line for line in last_lines)
