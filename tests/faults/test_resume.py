"""What decides a run: compared when a generator says hello and when a run is started again, and never lost silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.desk.opening.restoring import make_sessions
from asyncrl.generator.assembly import _session
from asyncrl.generator.identity import claim_identity
from asyncrl.link.codec import decode
from asyncrl.link.messages import Refusal, Welcome
from asyncrl.tasks.fingerprint import shared_settings

TASK = """
from helper_of_own_task import bonus
from asyncrl.tasks.base import Example


class Own:
    train_size = 8

    def train_example(self, index):
        return Example(f"{index} is", {"answer": str(index)})

    def eval_examples(self, count):
        return [Example("9 is", {"answer": "9"})][:count]

    def reward(self, completion, payload):
        return {"exact": float(payload["answer"] in completion) + bonus()}
"""
HELPER = "def bonus():\n    return 0.5\n"
FUNCTION = "def short(completion, payload):\n    return 1.0\n"


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a task of one's own, a module it imports, and a reward function."""
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "own_task.py").write_text(TASK)
    (folder / "helper_of_own_task.py").write_text(HELPER)
    (folder / "own_rewards.py").write_text(FUNCTION)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def configure(tied_model_dir: Path, tmp_path: Path) -> Any:
    """Makes configurations of one run; `section__key=value` changes a key."""

    def make(**changes: Any) -> Config:
        config = Config()
        config.run.name, config.run.dir = "faults", str(tmp_path / "run")
        config.run.steps, config.learner.groups_per_step, config.sampling.group_size = 6, 2, 4
        config.model.path, config.model.max_length, config.sampling.max_new_tokens = str(tied_model_dir), 64, 12
        config.task.path = "own_task:Own"
        config.reward.parts = {"short": {"kind": "rule", "path": "own_rewards:short"}}
        for name, value in changes.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        return config

    return make


def answer_to(generator: Config, learner: Config, folder: Path) -> Refusal | Welcome:
    """What the learner answers to the hello of a generator that is started with another configuration."""
    identity = claim_identity(folder, "g1")
    identity.lock.close()
    session = _session(generator, identity)
    [frame] = session.due(float("inf"))
    hello = decode(frame, max_bytes=2**20)
    return make_sessions(learner, 1).hello(b"g1", hello, version=0, now=0.0).reply


# -- W8: generator and learner


def test_W8_equal_configurations_are_admitted_wherever_they_differ_in_what_decides_nothing(
    configure, task_folder, tmp_path
):
    other = configure(generator__max_sequences=5, learner__lr=0.5, run__dir=str(tmp_path / "elsewhere"))
    assert isinstance(answer_to(other, configure(), tmp_path), Welcome)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("reward__weights", {"digits": 100}, '{"digits": 100}'),
        ("reward__weights", {"exact": 1.5}, '{"exact": 1.5}'),
        ("reward__parts", {}, "{}"),
        ("task__args", {"size": 3}, '{"size": 3}'),
        ("model__max_length", 65, "65"),
        ("model__dtype", "bfloat16", '"bfloat16"'),
    ],
)
def test_W8_a_key_that_decides_rewards_or_prompts_and_differs_is_refused_with_both_values(
    key, value, shown, configure, task_folder, tmp_path
):
    name = key.replace("__", ".")
    learner, generator = configure(**{key: value}), configure()
    refusal = answer_to(generator, learner, tmp_path)
    assert isinstance(refusal, Refusal) and name in refusal.reason
    assert f"{name}: {shown}" in refusal.expected and f"{name}: " in refusal.got and shown not in refusal.got
    assert isinstance(answer_to(learner, generator, tmp_path), Refusal)
    assert isinstance(answer_to(learner, learner, tmp_path), Welcome)


@pytest.mark.parametrize("module", ["own_task", "helper_of_own_task", "own_rewards"])
def test_W8_an_edited_source_file_of_task_or_reward_is_refused_with_both_digests(
    module, configure, task_folder, tmp_path
):
    config = configure()
    sessions = make_sessions(config, 1)
    before = dict(shared_settings(config))[f"file {module} (source)"]
    file = task_folder / f"{module}.py"
    file.write_text(file.read_text().replace("0.5", "0.6").replace("1.0", "2.0").replace("is", "=="))
    identity = claim_identity(tmp_path, "g1")
    [frame] = _session(config, identity).due(float("inf"))
    refusal = sessions.hello(b"g1", decode(frame, max_bytes=2**20), version=0, now=0.0).reply
    assert isinstance(refusal, Refusal)
    assert module in refusal.reason and before in refusal.expected and before not in refusal.got


def test_W8_a_long_value_is_compared_too(configure, task_folder, tmp_path):
    one = configure(task__args={"words": ["a"] * 5000})
    two = configure(task__args={"words": ["a"] * 4999 + ["b"]})
    refusal = answer_to(one, two, tmp_path)
    assert isinstance(refusal, Refusal) and "task.args: 25" in refusal.expected and "sha256" in refusal.got
