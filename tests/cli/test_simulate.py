"""`asyncrl simulate` as a user calls it."""

from __future__ import annotations

import json

import pytest

from asyncrl.cli.main import main

SMALL = ["--steps", "20", "--tokens", "20", "--decode-s", "0.1", "--step-s", "0.5", "--groups-per-step", "4"]


def test_a_table_has_a_line_for_each_run(capsys):
    assert main(["simulate", *SMALL, "--generators", "1", "2", "--ages", "0", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["generators", "max_age"]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "0"], ["1", "3"], ["2", "0"], ["2", "3"]]
    assert len({len(line) for line in lines}) == 1


def test_figures_go_to_a_file_beside_the_table(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["simulate", *SMALL, "--ages", "0", "1", "--json", str(file)]) == 0
    head, synchronous, _ = capsys.readouterr().out.splitlines()
    assert "tokens of age 0, 1, ..." in head and " 100% " in synchronous
    assert [record["max_age"] for record in json.loads(file.read_text())] == [0, 1]
    assert main(["simulate", *SMALL, "--ages", "0", "--json", str(tmp_path / "none" / "f")]) == 2
    assert "--json" in capsys.readouterr().err


def test_json_has_every_figure(capsys):
    assert main(["simulate", *SMALL, "--ages", "0", "--sigma", "1", "--json", "--pause-ms", "50"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["max_age"] == 0 and record["age_mean"] == 0 and record["steps"] == 20
    assert record["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step-s", "0"], "--step-s 0"),
        (["--decode-s", "0"], "--decode-s 0"),
        (["--ages", "-1"], "--ages"),
        (["--tokens", "nan"], "--tokens"),
        (["--generators", "none"], "--generators"),
        (["--shared-cores", "2", "2"], "--shared-cores"),
    ],
)
def test_what_no_run_can_have_is_refused_with_its_name(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        raise SystemExit(main(["simulate", *arguments]))
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_the_cores_can_be_shared(capsys):
    assert main(["simulate", *SMALL, "--ages", "2", "--json", "--shared-cores", "2", "2", "2"]) == 0
    shared = json.loads(capsys.readouterr().out)[0]
    assert main(["simulate", *SMALL, "--ages", "2", "--json"]) == 0
    assert shared["tokens_per_s"] < json.loads(capsys.readouterr().out)[0]["tokens_per_s"]


def test_a_run_that_is_not_there_is_named(capsys, tmp_path):
    assert main(["simulate", "--like", str(tmp_path)]) == 2
    assert f"--like {tmp_path}: no run is there" in capsys.readouterr().err
