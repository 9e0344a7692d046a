"""`asyncrl-trainer-node`: what it is told, and which ranks it makes of that."""

from __future__ import annotations

import pytest

from asyncrl.cli import trainer_node
from asyncrl.cli.trainer_node import layout_of, load, main
from asyncrl.errors import ConfigError
from tests.model_folders import make_model_folder

KEYS = ["learner.nodes=3", "learner.ranks=4", "learner.port=29500", "weights.host=10.0.0.1"]


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  path: {make_model_folder(tmp_path / 'model')}\n")
    return load(str(file), KEYS)


def test_a_node_has_its_own_part_of_all_ranks(config):
    layout = layout_of(config, 2, "")
    assert (layout.first, layout.count, layout.world_size) == (8, 4, 12)
    assert layout.environment(1, 29500) == {
        "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }  # fmt: skip


def test_another_way_to_the_learner_can_be_given(config):
    layout = layout_of(config, 1, "learner.cluster:1234")
    assert (layout.host, layout.port) == ("learner.cluster", 1234)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        layout_of(config, 1, "1234")


@pytest.mark.parametrize("node", [-1, 0, 3])
def test_a_node_that_is_none_of_the_others_is_refused(config, node):
    with pytest.raises(ConfigError, match="from 1 to 2 with learner.nodes=3"):
        layout_of(config, node, "")


def test_help_and_missing_arguments(capsys):
    assert main(["--help"]) == 0
    assert "--node N" in capsys.readouterr().out
    assert main(["run.yaml"]) == 2
    assert "give a configuration file and the number of this host" in capsys.readouterr().err


def test_more_processes_than_ranks_are_refused(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert main([str(tmp_path / "run.yaml"), *KEYS, "--node", "1"]) == 2
    assert "LOCAL_RANK=4 with learner.ranks=4" in capsys.readouterr().err


def test_torchrun_takes_the_command_that_the_help_shows():
    from torch.distributed.run import parse_args

    line = next(line for line in (trainer_node.__doc__ or "").splitlines() if line.strip().startswith("torchrun"))
    _, *words = line.split()
    found = parse_args(words)
    assert found.no_python and found.training_script == "asyncrl-trainer-node"
    assert found.training_script_args == ["CONFIG", "--node", "1"]
    words.remove("--")
    with pytest.raises(SystemExit):
        parse_args(words)
