"""The manual, asyncrl/rewards/README.md: it names every kind with its arguments, and its task is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncrl.rewards.base import RemotePart, arguments_of
from asyncrl.rewards.parts import KINDS
from asyncrl.tasks.base import checked_reward, load_task

MANUAL = (Path(__file__).parents[2] / "asyncrl" / "rewards" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_row_with_all_arguments(kind):
    (row,) = [line for line in MANUAL.splitlines() if line.startswith(f"| `{kind}` |")]
    of_all_remote_ones = set(arguments_of(RemotePart)) - {"url", "model"}
    for argument, needed in arguments_of(KINDS[kind]).items():
        if argument in of_all_remote_ones:
            assert f"| `{argument}` |" in MANUAL
        elif needed:
            assert f"**{argument}**" in row
        else:
            assert re.search(rf"\b{argument}\b", row), argument


def test_the_task_in_it_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    (tmp_path / "manual_task.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("manual_task:Reverse", {"letters": 6})
    example = task.train_example(7)
    assert example.prompt == "reverse w000007: "
    assert checked_reward(task, " 700000w\n", example.payload) == {"exact": 1.0}
    assert len(task.eval_examples(3)) == 3
