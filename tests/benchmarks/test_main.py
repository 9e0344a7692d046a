"""`python -m benchmarks`: the list, the comparison with what is committed, a script that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as entry
from benchmarks.readme_table import with_table


def results(folder: Path, name: str, unit: str, ratios: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    median = sorted(ratios)[len(ratios) // 2]
    row = {"what": "a step", "unit": unit, "ratios": ratios, "ratio_median": median, "ratio_range": [0, 9]}
    (folder / f"{name}.json").write_text(json.dumps({"rows": [row]}))


def test_every_script_is_listed_with_its_sentence_and_its_committed_figures(capsys):
    assert entry.main([]) == 0
    said = capsys.readouterr().out
    names = {path.stem for folder in ("speed", "studies") for path in (entry.HERE / folder).glob("*_vs_*.py")}
    assert names and all(f".{name}: " in said for name in names)
    assert "10M, 64 completions a step, equal lengths, tokens/s: 1.72 of TRL, transformers" in said
    assert all(name in {script.name for script in entry.scripts()} for name in entry.QUICK)


@pytest.mark.parametrize(
    ("unit", "committed", "measured", "code"),
    [
        ("tokens/s", [1.0, 1.1, 1.2], [0.91, 0.92, 0.93], 0),  # within a tenth of the worst pair
        ("tokens/s", [1.0, 1.1, 1.2], [0.7, 0.89, 1.2], 1),
        ("tokens/s", [1.0, 1.1, 1.2], [5.0, 5.0, 5.0], 0),
        ("ms", [1.0, 1.1, 1.2], [1.3, 1.31, 1.31], 0),
        ("ms", [1.0, 1.1, 1.2], [1.3, 1.33, 1.4], 1),
        ("ms", [1.0, 1.1, 1.2], [0.1, 0.1, 0.1], 0),
        ("tokens per CPU second", [1.0], [0.5], 1),
    ],
)
def test_a_ratio_that_is_worse_than_the_worst_committed_pair_fails(
    tmp_path, monkeypatch, capsys, unit, committed, measured, code
):
    monkeypatch.setattr(entry, "COMMITTED", tmp_path / "committed")
    results(tmp_path / "committed", "speed", unit, committed)
    results(tmp_path / "new", "speed", unit, measured)
    results(tmp_path / "new", "speed.quick", unit, [0.0001 if unit != "ms" else 1000.0])
    assert entry.main(["--compare", str(tmp_path / "new")]) == code
    assert ("WORSE" in capsys.readouterr().out) == bool(code)


def test_a_regression_planted_into_a_committed_result_is_found(tmp_path, capsys):
    """Every committed file, as it is and with the medians of its ratios spoilt: the first passes, the second fails."""
    for path in entry.COMMITTED.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    assert entry.main(["--compare", str(tmp_path)]) == 0
    path = tmp_path / "learner_vs_trl.json"
    record = json.loads(path.read_text())
    row = record["rows"][0]
    row["ratio_median"] = min(row["ratios"]) * 0.85
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert entry.main(["--compare", str(tmp_path)]) == 1
    worse = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WORSE")]
    assert len(worse) == 1 and f"learner_vs_trl: {row['what']}, tokens/s" in worse[0]


def test_the_table_of_the_readme_is_that_of_the_committed_results():
    page = entry.README.read_text(encoding="utf-8")
    assert with_table(page) == page, "run python -m benchmarks --readme"
    with pytest.raises(ValueError, match="must have"):
        with_table("no markers")


def test_nothing_to_compare_is_no_success(tmp_path, capsys):
    assert entry.main(["--compare", str(tmp_path)]) == 2
    assert "measure first" in capsys.readouterr().err


def test_a_name_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        entry.main(["--run", "speed.nothing"])
    assert "speed.nothing" in capsys.readouterr().err


def test_a_script_that_fails_is_named_and_the_others_run(capfd, monkeypatch):
    ran = []

    class Done:
        def __init__(self, code: int) -> None:
            self.returncode = code

    def run(command, **_):
        ran.append(command)
        return Done(3 if "digest" in command[2] else 0)

    monkeypatch.setattr(entry.subprocess, "run", run)
    assert entry.main(["--quick", "speed.digest", "speed.transport"]) == 1
    assert [command[2] for command in ran] == ["benchmarks.speed.digest", "benchmarks.speed.transport"]
    assert "failed: speed.digest" in capfd.readouterr().err


@pytest.mark.slow
def test_the_desks_load_is_measured_to_its_end():
    """Its stub generators speak the protocol of the desk. Whether its bars hold says a quiet machine."""
    command = [sys.executable, "-m", "benchmarks.speed.desk_load", "--quick"]
    done = subprocess.run(command, cwd=entry.HERE.parent, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
