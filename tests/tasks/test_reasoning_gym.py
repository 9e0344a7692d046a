"""Tasks of reasoning-gym: what they ask, how they score, and the list of data sets that need a word.

Skipped where the package is not installed: it is no part of the lock files (`asyncrl/tasks/README.md`, reasoning-gym).
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS

from asyncrl.errors import RewardError, TaskError
from asyncrl.host.guarded_process import foreign_environment
from asyncrl.rewards.pool import RewardPool
from asyncrl.tasks.base import checked_reward, load_task
from asyncrl.tasks.reasoning_gym import CHUNK, ReasoningGym

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "asyncrl" / "tasks" / "README.md").read_text()
PATH = "asyncrl.tasks.reasoning_gym:ReasoningGym"
NAMES = sorted(set(DATASETS) - {"composite"})


def entry_of(payload):
    """The entry as the library itself makes it, without the task's code; only for data sets without a level."""
    from reasoning_gym import create_dataset

    assert payload["level"] is None
    dataset = create_dataset(payload["dataset"], **payload["config"], seed=payload["seed"], size=CHUNK)
    return dataset[payload["index"]]


def told(name: str, reason: str) -> bool:
    """Whether the manual's list has the data set with that reason."""
    return re.search(rf"^\| `{reason}` \|.*`{name}`", MANUAL, re.MULTILINE) is not None


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "knights_knaves", "word_ladder"])
def test_a_right_answer_is_worth_1_and_a_wrong_one_less(name):
    task = load_task(PATH, {"datasets": name})
    example = task.train_example(3)
    entry = entry_of(example.payload)
    assert example.prompt[-1] == {"role": "user", "content": entry["question"]}
    right = f"Let me think. <answer>no</answer> Or rather\n<answer>\n{entry['answer']} </answer>"
    assert checked_reward(task, right, example.payload) == {name: 1.0}
    assert checked_reward(task, "<answer>nothing of the sort</answer>", example.payload)[name] < 0.5
    assert checked_reward(task, entry["answer"], example.payload) == {name: 0.0}  # without its tags


@pytest.mark.parametrize(("form", "text"), [("last_line", "so\n\n {} \n"), ("completion", " {}\n")])
def test_where_the_answer_stands(form, text):
    task = ReasoningGym("chain_sum", answer=form, chat=False)
    example = task.train_example(0)
    assert example.prompt.startswith("Question: State the final answer") and example.prompt.endswith("\nAnswer:")
    assert task.reward(text.format(entry_of(example.payload)["answer"]), example.payload) == {"chain_sum": 1.0}
    assert task.reward(" \n", example.payload) == {"chain_sum": 0.0}


def test_examples_differ_and_held_out_ones_are_none_of_them():
    task, other = (ReasoningGym("chain_sum", seed=seed) for seed in (0, 10_000))
    numbers = [*range(40), CHUNK - 1, CHUNK, CHUNK + 1]
    asked = [task.train_example(number).prompt[-1]["content"] for number in numbers]
    assert len(set(asked)) == len(asked)
    assert {other.train_example(n).prompt[-1]["content"] for n in range(5)}.isdisjoint(asked)
    held_out = [example.prompt[-1]["content"] for example in task.eval_examples(20)]
    assert len(set(held_out)) == 20 and set(held_out).isdisjoint(asked)
    assert [example.prompt[-1]["content"] for example in task.eval_examples(5)] == held_out[:5]


def test_several_data_sets_by_weight_each_with_a_part_of_its_name():
    task = ReasoningGym({"chain_sum": 3, "leg_counting": {"weight": 1}, "bitwise_arithmetic": 0})
    assert task.part_names == ("chain_sum", "leg_counting", "bitwise_arithmetic")
    drawn = [task.train_example(number).payload["dataset"] for number in range(40)]
    assert (drawn.count("chain_sum"), drawn.count("leg_counting")) == (30, 10)
    asked = [example.payload["dataset"] for example in task.eval_examples(7)]
    assert asked == [*task.part_names, *task.part_names, "chain_sum"]


def test_a_curriculum_rises_to_the_level_that_evaluations_ask():
    task = ReasoningGym({"chain_sum": {"curriculum": 40, "config": {"max_terms": 6}}})
    levels = [task.train_example(number).payload["level"] for number in range(60)]
    last = max(levels)
    assert levels == sorted(levels) and set(levels) == set(range(last + 1)) and levels[40:] == [last] * 20
    assert task.eval_examples(1)[0].payload["level"] == last
    fixed = ReasoningGym({"chain_sum": {"level": 1}})
    assert {fixed.train_example(number).payload["level"] for number in (0, 999)} == {1}
    low, high = (ReasoningGym({"chain_sum": {"level": level}}) for level in (0, last))
    length = [sum(len(task.train_example(n).prompt[-1]["content"]) for n in range(20)) for task in (low, high)]
    assert length[0] < length[1]


def test_another_version_of_the_library_is_a_failure_and_not_a_0():
    task = ReasoningGym("chain_sum", answer="completion")
    payload = {**task.train_example(0).payload, "question": "0123"}
    with pytest.raises(RewardError, match="one version"):
        task.reward("7", payload)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"datasets": "chain_sums"}, "did you mean chain_sum?"),
        ({"datasets": "composite"}, "name the data sets themselves"),
        ({"datasets": []}, "must name data sets"),
        ({"datasets": ["chain_sum", "chain_sum"]}, "each once"),
        ({"datasets": {"chain_sum": 0}}, "none is left to train on"),
        ({"datasets": {"chain_sum": -1}}, "weight=-1"),
        ({"datasets": {"chain_sum": "x"}}, "must be a weight, or a mapping"),
        ({"datasets": {"chain_sum": {"wait": 1}}}, "did you mean weight?"),
        ({"datasets": {"chain_sum": {"config": {"max_term": 1}}}}, "did you mean max_terms?"),
        ({"datasets": {"chain_sum": {"config": {"seed": 1}}}}, "counts seeds itself"),
        ({"datasets": {"chain_sum": {"config": {"min_terms": 9, "max_terms": 2}}}}, "AssertionError"),
        ({"datasets": {"chain_sum": {"level": 99}}}, "the highest of its curriculum is"),
        ({"datasets": {"chain_sum": {"curriculum": -1}}}, "curriculum=-1"),
        ({"datasets": "chain_sum", "answer": "tag"}, "did you mean tags?"),
        ({"datasets": "chain_sum", "seed": 2**31}, "from 0 to 2"),
        ({"datasets": "chain_sum", "template": "{q}"}, "the place {question}"),
    ],
)
def test_a_mistake_is_named(args, message):
    with pytest.raises(TaskError, match=re.escape(message)):
        load_task(PATH, args)


MAKE = """
import json, sys
from asyncrl.tasks.reasoning_gym import ReasoningGym
made = ReasoningGym(["isomorphic_strings", "polynomial_multiplication"], answer="completion").train_example
print(json.dumps([made(number).payload for number in range(4)]))
"""


def test_a_reward_worker_makes_the_questions_of_the_helper_even_where_these_walk_through_sets():
    done = subprocess.run(
        [sys.executable, "-c", MAKE], cwd=ROOT, env=foreign_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    payloads = json.loads(done.stdout)

    async def scored():
        pool = RewardPool(PATH, {"datasets": [payloads[0]["dataset"], payloads[1]["dataset"]]}, 1, 30.0)
        try:
            async with asyncio.timeout(120):
                await pool.start()
                good = [await pool.score(["<answer>True</answer>", "?"], payload) for payload in payloads]
                stale = await pool.score(["<answer>1</answer>"], {**payloads[0], "question": "of another version"})
                return [outcome for outcomes in good for outcome in outcomes], stale[0]
        finally:
            await pool.close()

    outcomes, stale = asyncio.run(scored())
    assert [outcome.failed for outcome in outcomes] == [False] * 8, outcomes
    assert stale.failed and stale.reason == "reward_error" and "one version" in stale.detail


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """What two processes found, which went through all data sets in opposite orders."""
    folder = tmp_path_factory.mktemp("walks")
    found = []
    for order in ("forwards", "backwards"):
        command = [sys.executable, "-m", "tests.tasks.reasoning_gym_walk", str(folder / order), order]
        subprocess.run(command, cwd=ROOT, env=foreign_environment(), check=True, timeout=900)
        found.append(json.loads((folder / order).read_text()))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_every_data_set_loads_is_deterministic_and_scores_its_own_answer_or_is_listed_with_the_reason(walks):
    forwards, backwards = walks
    unlisted = {}
    for name in NAMES:
        entries = forwards[name]["entries"]
        scores = [found[1] for found in entries.values() if isinstance(found, list)]
        reasons = {
            "fails": len(scores) < len(entries),
            "no own answer": None in scores,
            "own answer below 1": any(score is not None and score < 1 for score in scores),
            "another entry each time": entries != backwards[name]["entries"],
        }
        if wrong := [reason for reason, applies in reasons.items() if applies != told(name, reason)]:
            unlisted[name] = (wrong, entries, backwards[name]["entries"])
    assert len(NAMES) == 105 and not unlisted, json.dumps(unlisted, indent=1)
