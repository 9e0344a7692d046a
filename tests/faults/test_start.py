"""A start that is safe, and checkpoints that a user can use: each test is named after the fault that it holds."""

import pytest

from asyncrl.config.loading import load_config, to_yaml
from asyncrl.errors import ConfigError
from asyncrl.host.addresses import is_loopback, is_wildcard, rollout_address

# -- D9: words that YAML takes for something else

TEXTS = ["1.10", "2024_01_01", "007", "7e12345", "yes", "no", "null", "off", "0x10", "1_000", "2024-01-01", "12e-3"]


def load(*overrides):
    return load_config(None, ["model.path=m", *overrides])


def load_text(folder, text, *overrides):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("text", TEXTS)
def test_D9_a_text_is_taken_as_written_on_the_command_line_and_in_files(tmp_path, text):
    config = load(f"run.name={text}")
    assert (config.run.name, config.run.dir) == (text, f"runs/{text}")
    written = load_text(tmp_path, f"model: {{path: {text}}}\nrun:\n  name: {text}\n")
    assert (written.run.name, written.model.path) == (text, text)
    assert load_text(tmp_path, to_yaml(written)) == written


def test_D9_off_is_a_choice_like_any_other(tmp_path):
    assert load("log.wandb=off").log.wandb == "off"
    assert load_text(tmp_path, "model: {path: m}\nlog:\n  wandb: off\n").log.wandb == "off"
    with pytest.raises(ConfigError, match=r"log\.wandb=on .*: must be one of off, offline, online"):
        load("log.wandb=on")


def test_D9_elements_of_a_list_of_texts_are_taken_as_written(tmp_path):
    names = ["off", "1.10", "7e12345", "null", "a b"]
    assert load("update.what=partial", "update.names=[off, 1.10, 7e12345, null, 'a b']").update.names == names
    text = "model: {path: m}\nupdate:\n  what: partial\n  names:\n  - off\n  - 1.10\n  - 7e12345\n  - null\n  - a b\n"
    assert load_text(tmp_path, text).update.names == names


def test_D9_names_in_an_open_mapping_are_taken_as_written(tmp_path):
    assert load("reward.weights={no: 2, 1: 3}").reward.weights == {"no": 2, "1": 3}
    text = "model: {path: m}\nreward:\n  weights: {on: 0.5, 7: 1}\ntask: {args: {y: off, size: 1e-3}}\n"
    config = load_text(tmp_path, text)
    assert config.reward.weights == {"on": 0.5, "7": 1}
    assert config.task.args == {"y": False, "size": 1e-3}


def test_D9_a_text_may_hold_what_yaml_reserves():
    assert load("run.dir=runs/a #1: b").run.dir == "runs/a #1: b"
    assert load("run.dir='runs/a'").run.dir == "runs/a"
    assert load("run.name=a-${run.seed}", "run.seed=3").run.name == "a-3"


def test_D9_numbers_are_decimal(tmp_path):
    config = load("run.steps=010", "learner.cpus=[010]", "learner.lr=1e-4", "run.seed=1_000")
    assert (config.run.steps, config.learner.cpus, config.learner.lr, config.run.seed) == (10, [10], 1e-4, 1000)
    assert load_text(tmp_path, "model: {path: m}\nrun: {steps: 010}\n").run.steps == 10
    for override in ("run.steps=1:30", "learner.lr=1:30.5", "learner.cpus=[1:30]"):
        with pytest.raises(ConfigError, match="must be"):
            load(override)


def test_D9_sections_that_share_an_anchor_keep_their_own_types(tmp_path):
    text = "model: {path: m}\nlearner: &l {device: cpu, threads: 02}\ngenerator: {<<: *l, id: 08}\n"
    config = load_text(tmp_path, text)
    assert (config.learner.threads, config.generator.threads, config.generator.id) == (2, 2, "08")


# -- D14: addresses that mean every interface

WILDCARDS = [
    *("0", "0.0", "0.0.0", "0.0.0.0", "00", "0x0", "0x0.0", "000.0.0x0.0", "*"),
    *("[::]", "[0::0]", "[0:0:0:0:0:0:0:0]", "[::0.0.0.0]", "[::ffff:0.0.0.0]", "[::ffff:0:0]", "[::FFFF:0:0]"),
]


@pytest.mark.parametrize("host", WILDCARDS)
def test_D14_every_spelling_of_a_wildcard_address_is_refused(host):
    assert is_wildcard(host)
    with pytest.raises(ConfigError, match="listens on every interface"):
        rollout_address(f"tcp://{host}:5770")
    with pytest.raises(ConfigError, match=r"weights\.host=.* must be one private address"):
        load(f"weights.host={host}")


def test_D14_one_address_has_one_spelling_after_parsing():
    for host in ("127.1", "0x7f.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "localhost"):
        assert rollout_address(f"tcp://{host}:5770").text == "tcp://127.0.0.1:5770"
        assert is_loopback(host)
    assert rollout_address("tcp://[fe80::1]:5770").text == "tcp://[fe80::1]:5770"
    assert not is_loopback("10.1") and not is_wildcard("10.1") and not is_wildcard("zero.example")
    with pytest.raises(ConfigError, match="public address"):
        load("weights.host=::ffff:8.8.8.8")
