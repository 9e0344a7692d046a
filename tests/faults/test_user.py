"""What a user is told: the manuals promise what the programs do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncrl.cli.reward_checks import check_rewards
from asyncrl.config.loading import load_config
from asyncrl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

RULES = """
def good(completion, payload, scale=1.0):
    return scale

def one_argument(completion):
    return 1.0
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    (tmp_path / "rules_of_a_user.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))


def config_with(*overrides):
    return load_config(None, ["model.path=nowhere", *overrides])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rules_of_a_user:missing", "missing"),
        ("no_such_module_here:good", "no_such_module_here"),
        ("rules_of_a_user:one_argument", "function(completion, payload, **args)"),
    ],
)
def test_U11_a_wrong_rule_function_is_named_where_rewards_are_computed(rules, path, said):
    config = config_with(f"reward.parts={{mine: {{kind: rule, path: '{path}'}}}}")
    with pytest.raises(ConfigError, match="reward.parts.mine") as refused:
        check_rewards(config, "generator")
    assert said in str(refused.value)


def test_U11_arguments_of_a_rule_function_are_checked_against_it(rules):
    part = "{{mine: {{kind: rule, path: 'rules_of_a_user:good', args: {{{}: 2}}}}}}"
    check_rewards(config_with("reward.parts=" + part.format("scale")), "generator")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'scales'"):
        check_rewards(config_with("reward.parts=" + part.format("scales")), "generator")


def test_U11_the_manuals_promise_no_line_for_every_step():
    """Progress lines come at most twice a second: of 16 quick steps 13 were printed."""
    for manual in [ROOT / "README.md", *(ROOT / "asyncrl").rglob("README.md")]:
        assert not re.search(r"\b(a|one) line (per|a|for (each|every)) step", manual.read_text()), manual
