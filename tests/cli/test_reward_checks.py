"""Rewards that cannot work are refused by both commands before anything starts, with exit code 2."""

import pytest
import yaml

from asyncrl.cli.common import command
from tests.model_folders import make_model_folder

ROLES = ["learner", "generator"]
OVERLONG = {"kind": "overlong", "max_tokens": 8, "margin": 4}
JUDGE = {"kind": "judge", "url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.fixture
def start(tmp_path, capsys):
    """Runs a command with this `reward` section; gives its exit code and what it complained about."""
    model = make_model_folder(tmp_path / "model")

    def run(role, parts=None, weights=None, *arguments, **sections):
        config = {"model": {"path": str(model)}, "run": {"dir": str(tmp_path / "run")}, **sections}
        config["reward"] = {"parts": parts or {}, "weights": weights or {}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        code = command(role, [str(path), *arguments], lambda config: 0)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize("role", ROLES)
def test_good_rewards_pass(start, role, dry_run):
    parts = {"judge": JUDGE, "overlong": OVERLONG, "math": {"kind": "math"}}
    assert start(role, parts, {"exact": 1, "judge": 0.5}, *dry_run) == (0, "")


@pytest.mark.parametrize(("role", "dry_run"), [("learner", []), ("generator", ["--dry-run"])])
@pytest.mark.parametrize(
    ("parts", "weights", "says"),
    [
        ({"it": {"kind": "jugde"}}, {}, "no kind jugde; did you mean judge"),
        ({"it": {**JUDGE, "modle": "x"}}, {}, "no argument modle; did you mean model"),
        ({"it": {"kind": "overlong", "max_tokens": 8}}, {}, "needs the argument margin"),
        ({"it": {"kind": "reward_model", "url": "http://h", "path": "p"}}, {}, "not both"),
        ({"exact": OVERLONG}, {}, "the task has a part of this name already"),
        ({}, {"exat": 1.0}, "reward.weights.exat: there is no such part; did you mean exact"),
        ({}, {"exact": float("inf")}, "must be a finite number"),
        ({"it": {**JUDGE, "timeout_s": 60}}, {}, "generator.reward_timeout_s=10"),
    ],
)
def test_each_mistake_is_a_user_error_in_both_roles(start, role, parts, weights, says, dry_run):
    code, complaint = start(role, parts, weights, *dry_run)
    assert code == 2
    assert says in complaint and "Traceback" not in complaint


@pytest.mark.parametrize(("role", "dry_run"), [("learner", ["--dry-run"]), ("generator", [])])
def test_a_mistake_is_one_whether_it_is_a_start_or_a_dry_run(start, role, dry_run):
    code, complaint = start(role, {}, {"exat": 1.0}, *dry_run)
    assert code == 2 and "did you mean exact" in complaint


def test_keys_and_folders_are_needed_where_rewards_are_computed(start):
    parts = {
        "judge": {**JUDGE, "api_key_env": "SURELY_NOT_SET"},
        "model": {"kind": "reward_model", "path": "not/there"},
    }
    assert start("learner", parts) == (0, "")
    code, complaint = start("generator", parts)
    assert code == 2
    assert "SURELY_NOT_SET" in complaint and "not/there" in complaint


def test_a_part_can_be_given_on_the_command_line(start):
    code, complaint = start("learner", None, None, "reward.parts={it: {kind: nothing}}")
    assert (code, "no kind nothing" in complaint) == (2, True)
    assert start("learner", {"it": OVERLONG}, None, "reward.parts.it.margin=2", "reward.weights.it=0.5") == (0, "")
