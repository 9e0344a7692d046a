"""The import-path hook, and the check of what a reward returns."""

import textwrap
from pathlib import Path

import pytest

from asyncrl.errors import RewardError, TaskError
from asyncrl.tasks import base
from asyncrl.tasks.base import Task, checked_reward, load_task

WHOLE = """
    from asyncrl.tasks.base import Example

    class Whole:
        train_size = 3

        def __init__(self, letters: int = 4, *, loud: bool = False):
            if letters < 1:
                raise ValueError(f"letters={letters} must be at least 1")
            self.letters = letters

        def train_example(self, index):
            return Example("x" * self.letters, {"index": index})

        def eval_examples(self, count):
            return []

        def reward(self, completion, payload):
            return {"length": len(completion)}
"""


def write_module(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory that is not on the import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return tmp_path


def test_a_module_in_the_current_directory_is_found_and_gets_its_arguments(here):
    write_module(here, "whole_task", WHOLE)
    task = load_task("whole_task:Whole", {"letters": 2})
    assert isinstance(task, Task)
    assert task.train_example(1).prompt == "xx"
    assert task.train_example(1).payload == {"index": 1}


def test_the_worked_example_of_the_docstring_is_a_task(here):
    source = base.__doc__.split("# my_module.py")[1].split("and is used with")[0]
    write_module(here, "my_module", source)
    task = load_task("my_module:Reverse", {"letters": 6})
    example = task.train_example(1)
    assert task.train_size is None
    assert checked_reward(task, f" {example.payload['answer']}", example.payload) == {"exact": 1.0}
    assert checked_reward(task, "zzz", example.payload) == {"exact": 0.0}


@pytest.mark.parametrize(
    ("path", "args", "says"),
    [
        ("no_colon", {}, "must be `module:Class`"),
        (":Class", {}, "must be `module:Class`"),
        ("not_there:Class", {}, "there is no module not_there"),
        ("asyncrl.tasks.not_there:Class", {}, "there is no module asyncrl.tasks.not_there"),
        ("faulty:Hole", {}, "has no class Hole; did you mean Whole?"),
        ("faulty:NUMBER", {}, "has no class NUMBER"),
        ("faulty:Part", {}, "Part has no train_size, reward"),
        ("faulty:Whole", {"leters": 3}, r"'leters'.*Whole takes letters: int = 4, loud: bool = False"),
        ("faulty:Whole", {"letters": 0}, "ValueError: letters=0 must be at least 1"),
        ("needs_other:Any", {}, "needs the module surely_not_installed, install it"),
        ("broken:Any", {}, "importing broken raised SyntaxError"),
    ],
)
def test_each_mistake_is_named(here, monkeypatch, path, args, says):
    part = "    class Part:\n        def train_example(self, index): ...\n        def eval_examples(self, count): ...\n"
    write_module(here, "faulty", WHOLE + "    NUMBER = 1\n" + part)
    write_module(here, "needs_other", "import surely_not_installed")
    write_module(here, "broken", "class :")
    monkeypatch.delitem(__import__("sys").modules, "faulty", raising=False)
    with pytest.raises(TaskError, match=says):
        load_task(path, args)


class Returns:
    """A task whose reward returns what it was made with."""

    def __init__(self, value):
        self.value = value

    def reward(self, completion, payload):
        return self.value


def test_integers_and_booleans_become_floats():
    parts = checked_reward(Returns({"exact": True, "length": 3}), "", {})
    assert parts == {"exact": 1.0, "length": 3.0}
    assert all(type(value) is float for value in parts.values())


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.0,
        {},
        [("exact", 1.0)],
        {"exact": "1"},
        {"exact": None},
        {1: 1.0},
        {"exact": float("nan")},
        {"exact": float("inf"), "other": 1.0},
        {"exact": float("inf"), "other": float("-inf")},
        {"exact": 1e308, "other": 1e308},
    ],
)
def test_what_is_not_a_dict_of_finite_numbers_is_an_error_and_not_a_zero(value):
    with pytest.raises(RewardError):
        checked_reward(Returns(value), "", {})
