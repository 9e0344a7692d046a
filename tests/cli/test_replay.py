"""What `asyncrl replay` says of two runs that differ, and of a journal that does not go back far enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncrl.cli.reading import replay
from asyncrl.cli.reading.replay import (
    RecordedRun,
    check_baselines,
    check_settings,
    compare,
    comparison_lines,
    read_recorded,
    side_by_side,
)
from asyncrl.config import Config
from asyncrl.config.loading import load_config
from asyncrl.desk.opening.run_record import config_text
from asyncrl.errors import ConfigError, UserError
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StepTaken, StoredGroup


def write_steps(folder: Path, losses: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"kind": "step", "version": n, "loss": loss}) for n, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_first_difference_is_named_by_version_and_figure(tmp_path):
    write_steps(tmp_path / "run", [0.5, 0.25, 0.125])
    write_steps(tmp_path / "again", [0.5, 0.25, 0.125000001])
    comparison = compare(RecordedRun(tmp_path / "run", Config(), 3), tmp_path / "again")
    assert not comparison.equal and comparison.steps == 3
    assert comparison.difference is not None and comparison.difference.version == 3
    assert any("from version 3 on: loss was 0.125 and is 0.125000001" in line for line in comparison_lines(comparison))
    shorter = compare(RecordedRun(tmp_path / "run", Config(), 2), tmp_path / "again")
    assert shorter.equal and shorter.steps == 2 and shorter.weights_equal is None


def test_a_step_made_twice_counts_by_its_newest_line(tmp_path):
    write_steps(tmp_path / "run", [0.5, 9.0])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "version": 2, "loss": 0.25}) + "\n")
    write_steps(tmp_path / "again", [0.5, 0.25])
    assert compare(RecordedRun(tmp_path / "run", Config(), 2), tmp_path / "again").equal


def test_means_stand_side_by_side(tmp_path):
    write_steps(tmp_path / "run", [0.5, 0.25])
    write_steps(tmp_path / "again", [0.75, 0.5])
    lines = side_by_side(RecordedRun(tmp_path / "run", Config(), 2), tmp_path / "again", ["learner.lr=1"])
    assert any(line.split() == ["loss", "0.375", "0.625"] for line in lines)
    assert "counterfactual" in lines[-1]


@pytest.mark.parametrize("setting", ["run.seed=1", "sampling.temperature=2", "learner.groups_per_step=1", "nonsense"])
def test_what_decides_the_rollouts_is_no_what_if(setting):
    with pytest.raises(ConfigError, match=setting):
        check_settings([setting])


def recorded_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_text(load_config(None, ["model.path=/none"])))
    return folder


def test_remax_is_refused_for_a_run_that_sampled_no_greedy_completions(tmp_path, monkeypatch):
    config = load_config(None, [f"run.dir={tmp_path}", "model.path=m"])
    (tmp_path / "config.yaml").write_text(config_text(config))
    recorded = RecordedRun(tmp_path, config, 3)
    with pytest.raises(ConfigError, match=r"a run with algorithm.advantage=\w+, sampled none"):
        check_baselines(recorded, ["algorithm.advantage=remax"])
    check_baselines(recorded, ["learner.lr=1e-5"])
    monkeypatch.setattr(replay, "read_recorded", lambda folder, steps: recorded)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="sampled none"):
        replay.what_if([str(tmp_path), "algorithm.advantage=remax"])
    config.algorithm.advantage = "remax"
    check_baselines(recorded, ["algorithm.advantage=remax"])


def test_a_journal_without_its_beginning_is_refused_with_the_key_that_keeps_it(tmp_path):
    folder = recorded_folder(tmp_path)
    journal = Journal.open(folder / "journal", segment_bytes=4096)
    for version in range(8):
        body = bytes(3000)
        journal.append(StoredGroup("g", 1, version + 1, version, 0, version, version, version, (4,), body), 0.0)
        journal.append(StepTaken(version, ((version, 0),)), 0.0)
        journal.make_durable()
    assert read_whole(journal, folder).steps == 8
    journal = Journal.open(folder / "journal", segment_bytes=4096)
    assert journal.delete_before(5) > 0
    journal.close()
    with pytest.raises(UserError, match="run.journal_keep=true"):
        read_recorded(folder)


def read_whole(journal: Journal, folder: Path) -> RecordedRun:
    journal.close()
    return read_recorded(folder)


def test_a_journal_without_a_step_is_refused(tmp_path):
    folder = recorded_folder(tmp_path)
    Journal.open(folder / "journal").close()
    with pytest.raises(UserError, match=r"holds no (step|run)"):
        read_recorded(folder)
