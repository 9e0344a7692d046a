"""The manual, asyncrl/tasks/README.md: it names every argument, and its examples work."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from asyncrl.tasks.base import checked_reward, load_task
from asyncrl.tasks.data.rewards import BUILT_IN, GIVEN
from asyncrl.tasks.dataset import Dataset
from asyncrl.tasks.mix import Mix

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "asyncrl" / "tasks" / "README.md").read_text()
OF_DATASET, OF_MIX = MANUAL.partition("## reasoning-gym")[0].split("## A mix of tasks")


@pytest.mark.parametrize(("task", "text"), [(Dataset, OF_DATASET), (Mix, OF_MIX)])
def test_every_argument_is_named(task, text):
    names = inspect.signature(task).parameters
    assert [name for name in names if f"`{name}`" not in text and f"{name}:" not in text] == []


@pytest.mark.parametrize("name", [*GIVEN, *BUILT_IN])
def test_every_reward_and_all_that_it_is_given_has_a_row(name):
    assert re.search(rf"^\| (`{name}`|`{{kind: {name}, )", MANUAL, re.MULTILINE)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the data and the module that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    (tmp_path / "data").mkdir()
    records = [{"question": f"{n} + 1?", "prompt": f"{n}", "answer": str(n + 1), "topic": "sums"} for n in range(20)]
    for name in ("problems", "words"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (code,) = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    return tmp_path


def task_of(page: str):
    section = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])["task"]
    return load_task(section["path"], section["args"])


def test_the_example_of_a_data_set_works(here):
    task = task_of(OF_DATASET)
    example = task.train_example(0)
    answer = example.payload["answer"]
    asked = f"{int(answer) - 1} + 1?\nEnd with: answer = NUMBER"
    assert example.prompt == [
        {"role": "system", "content": "Think step by step."},
        {"role": "user", "content": asked},
    ]
    assert checked_reward(task, f"of sums: answer = {answer}", example.payload) == {"right": 1.0, "style": 1.0}
    assert task.part_names == ("right", "style")


def test_the_example_of_the_readme_works(here):
    (here / "my_rewards.py").write_text("def short(completion) -> float:\n    return float(len(completion) < 200)\n")
    readme = (ROOT / "README.md").read_text().split("## Your own data")[1]
    task = task_of(readme)
    example = task.train_example(0)
    answer = example.payload["answer"]
    assert checked_reward(task, f"answer = {answer}", example.payload) == {"right": 1.0, "short": 1.0}


def test_the_example_of_a_mix_works(here):
    task = task_of(OF_MIX)
    examples = [task.train_example(index) for index in range(3)]
    assert sorted(example.payload["task_name"] for example in examples) == ["sums", "sums", "words"]
    for example in examples:
        name = example.payload["task_name"]
        assert checked_reward(task, example.payload["answer"], example.payload) == {f"{name}/exact": 1.0}
