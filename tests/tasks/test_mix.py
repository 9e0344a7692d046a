"""A mix of tasks: who makes which prompt, what is evaluated, and whose reward is asked."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import RewardError, TaskError
from asyncrl.rewards.parts import check_reward_parts
from asyncrl.tasks.base import Example, checked_reward, load_task
from asyncrl.tasks.mix import NAME_KEY, Mix, eval_counts
from asyncrl.types import is_part_name, reward_parts_problem

ARITHMETIC = "asyncrl.tasks.arithmetic:Arithmetic"
DATASET = "asyncrl.tasks.dataset:Dataset"
HERE = "tests.tasks.test_mix"


class Endless:
    """Counts up, and returns what it is told to as its reward."""

    train_size = None

    def __init__(self, evals: int = 0, clash: bool = False, gives=None):
        self.evals, self.clash, self.gives = evals, clash, gives

    def train_example(self, index):
        return Example(f"endless {index}", {NAME_KEY: "own"} if self.clash else {"index": index})

    def eval_examples(self, count):
        return [Example(f"held out {index}", {}) for index in range(min(count, self.evals))]

    def reward(self, completion, payload):
        assert NAME_KEY not in payload
        return {"own": float(payload["index"])} if self.gives is None else self.gives


class Empty(Endless):
    train_size = 0


@pytest.fixture
def words(tmp_path):
    """A task of 30 words in a file, as an entry of a mix."""
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"word{n}", "answer": "w", "bad": 1}) for n in range(30)))
    return {"path": DATASET, "args": {"path": str(path), "rewards": {"exact": "exact"}}}


@pytest.fixture
def mix(words):
    return load_task("asyncrl.tasks.mix:Mix", {"tasks": {"sums": {"path": ARITHMETIC, "weight": 2}, "words": words}})


def names(examples):
    return [example.payload[NAME_KEY] for example in examples]


def test_every_window_has_the_shares_and_every_task_its_own_epochs(mix):
    examples = [mix.train_example(index) for index in range(3 * 54)]
    assert Counter(names(examples)) == {"sums": 108, "words": 54}
    for start in range(150):
        assert abs(names(examples[start : start + 12]).count("words") - 4) < 2
    asked = [example.prompt for example in examples if example.payload[NAME_KEY] == "words"]
    assert sorted(asked[:27]) == sorted(asked[27:54])
    assert len(set(asked[:27])) == 27 and asked[:27] != asked[27:54]
    assert examples == [mix.train_example(index) for index in range(3 * 54)]


def test_the_seed_orders_each_task_anew(words):
    tasks = {"words": words}
    first, again, other = ([Mix(tasks, seed=seed).train_example(n).prompt for n in range(27)] for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_an_endless_task_goes_on_in_its_own_order(words):
    mix = Mix({"count": {"path": f"{HERE}:Endless", "weight": 1}, "words": words})
    prompts = [mix.train_example(index) for index in range(20)]
    own = [example.prompt for example in prompts if example.payload[NAME_KEY] == "count"]
    assert own == [f"endless {index}" for index in range(10)]


@settings(max_examples=20, deadline=None)
@given(weight=st.integers(1, 9), start=st.integers(0, 500))
def test_no_held_out_example_of_any_task_is_trained_on(tmp_path_factory, weight, start):
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"word{n % 20}", "answer": "w"}) for n in range(30)))
    words = {"path": DATASET, "args": {"path": str(path), "rewards": {"exact": "exact"}}, "weight": weight}
    mix = Mix({"words": words, "sums": {"path": ARITHMETIC, "args": {"digits": 1}}})
    held_out = {example.prompt for example in mix.eval_examples(100)}
    trained = {mix.train_example(start + offset).prompt for offset in range(300)}
    assert held_out and not held_out & trained


def test_the_reward_is_that_of_the_task_that_made_the_prompt(mix):
    payloads = {example.payload[NAME_KEY]: example for example in map(mix.train_example, range(9))}
    sums, words = payloads["sums"], payloads["words"]
    assert checked_reward(mix, sums.payload["answer"], sums.payload) == {"sums/exact": 1.0}
    assert checked_reward(mix, "v", words.payload) == {"words/exact": 0.0}
    assert mix.part_names == ("sums/exact", "words/exact")
    assert reward_parts_problem({"sums/exact": 1.0}) == ""


def test_names_of_parts_are_unknown_where_one_task_does_not_say_them(words):
    mix = Mix({"count": {"path": f"{HERE}:Endless"}, "words": words})
    assert mix.part_names is None
    assert checked_reward(mix, "", {NAME_KEY: "count", "index": 3}) == {"count/own": 3.0}


def test_a_task_without_parts_of_its_own_leaves_the_reward_to_the_configuration(words):
    judged = {**words, "args": {**words["args"], "rewards": {}}}
    assert checked_reward(Mix({"judged": judged, "words": words}), "", {NAME_KEY: "judged"}) == {}


@pytest.mark.parametrize(
    ("payload", "gives", "says"),
    [
        ({}, None, "is of the task None, which is none of the mix"),
        ({NAME_KEY: "other"}, None, "is of the task 'other', which is none"),
        ({NAME_KEY: "count"}, [1.0], r"count: reward must return a dict of named parts, not \[1.0\]"),
    ],
)
def test_what_is_no_reward_is_an_error(payload, gives, says):
    mix = Mix({"count": {"path": f"{HERE}:Endless", "args": {"gives": gives}}})
    with pytest.raises(RewardError, match=says):
        mix.reward("", payload)


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "said", "available", "counts"),
    [
        (10, [None, None], [99, 99], [5, 5]),
        (10, [None, None, None], [99, 99, 99], [4, 3, 3]),
        (10, [None, None, None], [99, 1, 99], [5, 1, 4]),
        (10, [None, None], [2, 3], [2, 3]),
        (10, [6, None], [99, 99], [6, 4]),
        (10, [6, 4], [99, 2], [6, 2]),
        (10, [0, None], [99, 99], [0, 10]),
        (10, [10, None], [99, 99], [10, 0]),
        (1, [None, None], [99, 99], [1, 0]),
    ],
)
def test_held_out_examples_are_dealt_as_said_and_else_equally(count, said, available, counts):
    assert eval_counts(count, said, available) == counts


@given(
    count=st.integers(0, 60),
    tasks=st.lists(st.tuples(st.none() | st.integers(0, 10), st.integers(0, 40)), min_size=1, max_size=6),
)
def test_never_more_than_there_are_and_all_where_there_is_room(count, tasks):
    said, available = [number for number, _ in tasks], [number for _, number in tasks]
    count = max(count, sum(number or 0 for number in said))
    counts = eval_counts(count, said, available)
    assert all(0 <= given <= there for given, there in zip(counts, available, strict=True))
    assert sum(counts) <= count
    others = [who for who, number in enumerate(said) if number is None]
    left = count - sum(number or 0 for number in said)
    assert sum(counts[who] for who in others) == min(left, sum(available[who] for who in others)) or not others


def test_every_task_gives_its_held_out_examples(mix, words):
    assert Counter(names(mix.eval_examples(5))) == {"words": 3, "sums": 2}
    assert Counter(names(mix.eval_examples(64))) == {"words": 3, "sums": 61}
    said = Mix({"sums": {"path": ARITHMETIC, "evals": 7}, "words": words})
    assert Counter(names(said.eval_examples(9))) == {"sums": 7, "words": 2}
    with pytest.raises(TaskError, match=r"ask for 7 held-out examples, and eval\.prompts=5: raise"):
        said.eval_examples(5)


def test_a_task_without_weight_is_evaluated_alone(words):
    tests = {**words, "args": {**words["args"], "eval_share": 1}, "weight": 0}
    mix = Mix({"tests": tests, "sums": {"path": ARITHMETIC}})
    assert {example.payload[NAME_KEY] for example in map(mix.train_example, range(50))} == {"sums"}
    assert Counter(names(mix.eval_examples(40))) == {"tests": 20, "sums": 20}


def test_what_is_left_out_of_each_task_has_its_name(words, tmp_path):
    with (tmp_path / "words.jsonl").open("a") as file:
        file.write("\n{")
    (told,) = Mix({"sums": {"path": ARITHMETIC}, "words": words}).left_out
    assert told.startswith("words: ") and "line 31 is not JSON" in told


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ({}, r"task\.args\.tasks must name tasks"),
        (["a"], r"task\.args\.tasks must name tasks"),
        ({"a b": {"path": ARITHMETIC}}, r"task\.args\.tasks\.a b: a name has up to 40"),
        ({"a/b": {"path": ARITHMETIC}}, r"task\.args\.tasks\.a/b: a name has up to 40"),
        ({"a": ARITHMETIC}, r"task\.args\.tasks\.a must be a mapping with the path of a task"),
        ({"a": {"args": {}}}, "must be a mapping with the path"),
        ({"a": {"path": ARITHMETIC, "wieght": 2}}, "has no wieght; did you mean weight?"),
        ({"a": {"path": ARITHMETIC, "weight": -1}}, "weight=-1 must be a number, 0 or more"),
        ({"a": {"path": ARITHMETIC, "weight": 0}}, "every task of task.args.tasks has weight 0"),
        ({"a": {"path": ARITHMETIC, "weight": "2"}}, "weight='2' must be a number"),
        ({"a": {"path": ARITHMETIC, "weight": float("inf")}}, "weight=inf must be"),
        ({"a": {"path": ARITHMETIC, "evals": -1}}, "evals=-1 must be a number of held-out"),
        ({"a": {"path": ARITHMETIC, "args": [1]}}, r"args=\[1\] must be a mapping"),
        ({"a": {"path": "nothing"}}, r"task\.args\.tasks\.a: task\.path='nothing' must be `module:Class`"),
        ({"a": {"path": ARITHMETIC, "args": {"digits": 0}}}, r"tasks\.a: task\.args\.digits=0"),
    ],
)
def test_each_mistake_is_named_with_its_task(tasks, says):
    with pytest.raises(TaskError, match=says):
        Mix(tasks)


def test_a_task_without_training_examples_and_a_payload_with_the_name_are_refused():
    with pytest.raises(TaskError, match="the task none of the mix has train_size=0"):
        Mix({"none": {"path": f"{HERE}:Empty"}}).train_example(0)
    with pytest.raises(TaskError, match="the payload of the task clash has a task_name of its own"):
        Mix({"clash": {"path": f"{HERE}:Endless", "args": {"clash": True}}}).train_example(0)


def test_parts_of_the_configuration_may_not_be_named_so():
    length = {"kind": "length", "max_tokens": 8}
    assert check_reward_parts({"length": length}, {}) == []
    assert "reward.parts.math/length: a name has" in check_reward_parts({"math/length": length}, {})[0]


@pytest.mark.parametrize("name", ["exact", "math/exact", "a.b-c/d_e", "x" * 40, "x" * 19 + "/" + "y" * 20])
def test_parts_may_be_named_after_a_task(name):
    assert is_part_name(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a/b/c", "a//b", "../a", "a/.b", "x" * 41, "x" * 20 + "/" + "y" * 20]
)
def test_no_other_slash_is_part_of_a_name(name):
    assert not is_part_name(name)
    assert "must be named by" in reward_parts_problem({name: 1.0})


# -- what one task is evaluated on, and another trains on ----------------------------------------------------------


def shared_mix(tmp_path, train, held_out, *, system=""):
    """A mix whose first task trains on the prompts `train`, while its second one is evaluated on `held_out`."""
    tasks = {}
    for name, prompts, share, weight in (("lessons", train, 0, 1), ("exam", held_out, 1, 0)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "7"}) for prompt in prompts))
        args = {"path": str(path), "rewards": {"exact": "exact"}, "eval_share": share}
        if name == "exam":
            args |= {"chat": True, "system": system} if system else {}
        tasks[name] = {"path": DATASET, "args": args, "weight": weight}
    return Mix(tasks)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_what_one_task_is_evaluated_on_no_other_trains_on(tmp_path, system):
    mix = shared_mix(tmp_path, [f"sum {n}" for n in range(20)], ["sum 3", " sum  5\n", "sum 77"], system=system)
    assert len(mix.eval_examples(8)) == 3
    trained, refused = set(), []
    for index in range(20):
        try:
            trained.add(mix.train_example(index).prompt)
        except TaskError as error:
            refused.append(str(error))
    assert trained == {f"sum {n}" for n in range(20)} - {"sum 3", "sum 5"}
    said = "of the task lessons: it asks what a held-out example of the task exam asks, and is not trained on"
    assert refused == [said, said]


def test_a_held_out_example_that_is_not_used_leaves_nothing_out(tmp_path):
    mix = shared_mix(tmp_path, [f"sum {n}" for n in range(20)], ["sum 3", "sum 5"])
    assert len(mix.eval_examples(1)) == 1
    refused = 0
    for index in range(20):
        try:
            mix.train_example(index)
        except TaskError:
            refused += 1
    assert refused == 1
