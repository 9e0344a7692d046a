"""Reward functions by their signature, and those that are built in."""

import json
import textwrap

import pytest

from asyncrl.errors import RewardError, TaskError
from asyncrl.rewards.base import Sample
from asyncrl.rewards.parts import RewardParts, check_reward_parts
from asyncrl.tasks.base import checked_reward
from asyncrl.tasks.data.rewards import reward_functions, score
from asyncrl.tasks.dataset import Dataset

SOURCE = """
    import asyncio

    events = []

    def length(completion):
        return len(completion)

    def annotated(completion, answer) -> float:
        return float(answer in completion)

    def asks(completion, prompt, messages, answer, topic, *, level=0):
        return {"prompt": len(prompt), "messages": len(messages), "topic": topic == "sums", "level": level}

    def everything(completion, **columns):
        return len(columns) + 100 * ("prompt" in columns) + 100 * ("answer" in columns)

    def strict(completion, factor, topic="none"):
        return factor * (topic == "none")

    async def meets(completion, partner):
        events.append(partner)
        while len(events) < 2:
            await asyncio.sleep(0)
        return 1.0

    async def raises_later(completion):
        await asyncio.sleep(0)
        raise KeyError("gold")

    async def is_cancelled(completion):
        raise asyncio.CancelledError

    def raises(completion):
        raise ValueError("no unit")

    def nothing(completion):
        pass

    def wrong(completion):
        return {"a": "1"}

    def empty(completion):
        return {}

    def clash(completion):
        return {"length": 1}

    def by_position(completion, /):
        return 0

    def needs_topics(completion, topics):
        return 0

    def plural(completions):
        return 0

    NUMBER = 1
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current directory, with a module of rewards in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(SOURCE))
    return tmp_path


def of(spec, **known):
    """The parts that one entry gives to a completion."""
    return score(reward_functions({"part": spec}), {"completion": "", **known})


def task_of(folder, rewards, record, **args):
    (folder / "data.jsonl").write_text(json.dumps({"question": "1?", "answer": "2", "topic": "sums", **record}) + "\n")
    return Dataset("data.jsonl", rewards, prompt="question", **args)


# -- built in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "completion", "answer", "value"),
    [
        ("exact", " 72\n", "72", 1),
        ("exact", "72", 72, 1),
        ("exact", "72.", "72", 0),
        ("exact", "two", ["2", "two"], 1),
        ("exact", "", "72", 0),
        ("number", "so it is 1,072.00", "#### 1072", 1),
        ("number", "10 - 5", 5, 1),
        ("number", "-5", 5, 0),
        ("number", "no number", "5", 0),
        ("number", "3", [2, 3], 1),
        ({"kind": "regex", "pattern": r"answer: (\w+)"}, "answer: a, or answer: b", "b", 1),
        ({"kind": "regex", "pattern": r"answer: (\w+)"}, "answer: b, or answer: a", "b", 0),
        ({"kind": "regex", "pattern": r"answer: (\w+)"}, "b", "b", 0),
        ({"kind": "regex", "pattern": r"\\boxed\{(.*?)\}"}, r"\boxed{ 7 }", [6, 7], 1),
        ({"kind": "regex", "pattern": "x|(y)"}, "y x", "y", 1),
    ],
)
def test_what_is_built_in_compares_with_the_answer(spec, completion, answer, value):
    assert of(spec, completion=completion, answer=answer) == {"part": value}


def test_an_answer_without_a_number_is_left_out_where_numbers_are_compared(here):
    task = task_of(here, {"right": "number"}, {"answer": "who knows"})
    with pytest.raises(TaskError, match="has no number in its answer: 'who knows'"):
        task.train_size  # noqa: B018 - reading it is the point


# -- what a function gets, and what travels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "travels"),
    [
        ("my_rewards:length", {"answer"}),
        ("my_rewards:asks", {"answer", "prompt", "messages", "topic", "level"}),
        ("my_rewards:everything", {"answer", "question", "topic", "level"}),
        ("my_rewards:strict", {"answer", "factor", "topic"}),
    ],
)
def test_only_what_some_function_asks_for_and_the_answer_travel(here, path, travels):
    task = task_of(here, {"part": path}, {"level": 3, "factor": 1, "unused": "x"}, payload=[])
    if path.endswith("everything"):
        travels = travels | {"factor", "unused"}
    assert task.train_example(0).payload.keys() == travels


def test_further_columns_travel_where_payload_says_so(here):
    task = task_of(here, {"exact": "exact"}, {"level": 3, "deep": {"er": 4}}, payload=["topic", "deep.er"])
    assert task.train_example(0).payload == {"answer": "2", "topic": "sums", "deep.er": 4}


def test_a_function_gets_what_its_signature_names_and_may_give_several_parts(here):
    task = task_of(here, {"all": "my_rewards:asks"}, {"level": 3}, chat=True, system="Be brief.")
    example = task.train_example(0)
    assert example.payload["prompt"] == "system: Be brief.\n\nuser: 1?"
    assert example.payload["messages"] == example.prompt
    parts = checked_reward(task, "2", example.payload)
    assert parts == {"prompt": len(example.payload["prompt"]), "messages": 2, "topic": 1, "level": 3}


def test_of_a_plain_text_prompt_and_messages_are_given_too(here):
    payload = task_of(here, {"all": "my_rewards:asks"}, {}).train_example(0).payload
    assert (payload["prompt"], payload["messages"]) == ("1?", [{"role": "user", "content": "1?"}])
    assert "level" not in payload


def test_all_columns_are_those_of_the_record(here):
    task = task_of(here, {"all": "my_rewards:everything"}, {})
    assert task.reward("", task.train_example(0).payload) == {"all": 2}  # question, topic


def test_arguments_of_the_configuration_count_before_columns(here):
    spec = {"path": "my_rewards:strict", "args": {"factor": 3}}
    task = task_of(here, {"part": spec}, {"factor": 100})
    payload = task.train_example(0).payload
    assert payload == {"answer": "2", "topic": "sums"}
    assert task.reward("", payload) == {"part": 0}
    assert task.reward("", {"answer": "2"}) == {"part": 3}


def test_a_column_that_a_record_lacks_is_none(here):
    records = [{"question": f"{n}?", "answer": "2", **({"topics": ["a"]} if n else {})} for n in range(3)]
    (here / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    task = Dataset("data.jsonl", {"part": "my_rewards:needs_topics"}, prompt="question", eval_count=0)
    assert [task.train_example(n).payload["topics"] for n in range(3)] == [None, ["a"], ["a"]]


# -- coroutines and failures -------------------------------------------------------------------------------------------


def test_coroutines_of_one_completion_run_at_once():
    specs = {name: {"path": "my_rewards:meets", "args": {"partner": name}} for name in ("a", "b")}
    functions = reward_functions({**specs, "length": "my_rewards:length"})
    assert score(functions, {"completion": "xyz"}) == {"a": 1.0, "b": 1.0, "length": 3.0}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("raises", "^part raised ValueError: no unit"),
        ("raises_later", "^part raised KeyError: 'gold'"),
        ("is_cancelled", "^part: it was cancelled"),
        ("nothing", "^part must return a number, or a dict of named numbers, not None"),
        ("wrong", "^part must return a number, .*not {'a': '1'}"),
        ("empty", "^part must return a number, .*not {}"),
    ],
)
def test_what_is_no_reward_is_an_error_with_the_parts_name_and_never_a_zero(path, says):
    with pytest.raises(RewardError, match=says):
        of(f"my_rewards:{path}")


def test_two_functions_that_give_one_part_are_an_error():
    functions = reward_functions({"length": "my_rewards:length", "other": "my_rewards:clash"})
    with pytest.raises(RewardError, match="other gives the part length, and so does another"):
        score(functions, {"completion": ""})


def test_what_did_not_travel_is_named():
    with pytest.raises(RewardError, match="part asks for topics, which did not travel"):
        of("my_rewards:needs_topics")


# -- mistakes in the configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exakt", r"there is no reward 'exakt'; did you mean exact\?.*`module:function`"),
        ("regex", "regex takes the argument pattern, not {}"),
        ({"kind": "exact", "pattern": "x"}, "exact takes no arguments, not {'pattern': 'x'}"),
        ({"kind": "regex", "pattern": "("}, r"pattern='\(' is no regular expression"),
        ({"kind": "regex", "pattern": "x"}, "pattern='x' needs a group"),
        ({"kind": "regex", "pattern": 7}, "pattern=7 is no regular expression"),
        (7, "must be one of exact, number, regex, or `module:function`"),
        ({"kind": "exact", "path": "a:b"}, "must be one of"),
        ({}, "must be one of"),
        ("no_such_module:f", r"task\.args\.rewards\.part=no_such_module:f: there is no module no_such_module"),
        ("my_rewards:lenght", "has no function lenght; did you mean length?"),
        ("my_rewards:NUMBER", "has no function NUMBER"),
        ("my_rewards:", "path='my_rewards:' must be `module:function`"),
        ({"path": "my_rewards:length", "argz": {}}, "has argz; beside path there is args alone"),
        ({"path": "my_rewards:length", "args": [1]}, r"args=\[1\] must be a mapping"),
        ({"path": "my_rewards:strict", "args": {"factr": 1}}, r"has no argument factr; did you mean factor\?"),
        ("my_rewards:by_position", "takes completion by position only"),
    ],
)
def test_each_mistake_in_an_entry_is_named(spec, says):
    with pytest.raises(TaskError, match=says):
        reward_functions({"part": spec})


@pytest.mark.parametrize("name", ["a b", "", "a/b", 7, "x" * 41])
def test_a_name_that_no_metric_may_have_is_refused(name):
    with pytest.raises(TaskError, match="a name has up to 40 letters"):
        reward_functions({name: "exact"})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("needs_topics", r"rewards\.part asks for topics, which is neither given nor a column; did you mean topic\?"),
        ("plural", r"asks for completions, .*did you mean completion\?"),
        ("strict", "asks for factor, .*there are answer, completion, messages, prompt, question, topic"),
    ],
)
def test_a_signature_that_asks_for_no_column_is_refused_at_the_start_with_the_nearest(here, path, says):
    with pytest.raises(TaskError, match=says):
        task_of(here, {"part": f"my_rewards:{path}"}, {}).train_size  # noqa: B018 - reading it is the point


# -- in the reward as a whole ------------------------------------------------------------------------------------------


def test_names_of_parts_are_known_where_every_function_gives_numbers():
    known = Dataset("x.jsonl", {"right": "exact", "found": "my_rewards:annotated"})
    assert known.part_names == ("right", "found")
    assert Dataset("x.jsonl", {"right": "exact", "some": "my_rewards:asks"}).part_names is None


@pytest.mark.parametrize("rewards", [{"length": "my_rewards:length"}, {"right": "exact"}])
def test_weights_are_checked_against_parts_whether_names_are_known_or_not(rewards):
    task = Dataset("x.jsonl", rewards)
    (compute,) = RewardParts(task, {}, {"rigth": 0.5}).begin([Sample("", {"answer": "2"})])
    with pytest.raises(RewardError, match=r"reward\.weights\.rigth: there is no such part"):
        compute()


def test_reward_parts_alone_may_make_the_reward():
    from asyncrl.rewards.parts import make_parts

    task = Dataset("x.jsonl", {})
    length = make_parts({"length": {"kind": "length", "max_tokens": 10}})
    (compute,) = RewardParts(task, length, {}).begin([Sample("", {}, num_tokens=5)])
    assert compute() == {"length": -0.5}
    (compute,) = RewardParts(task, {}, {}).begin([Sample("", {}, num_tokens=5)])
    with pytest.raises(RewardError, match=r"the reward has no parts: the task gives none, and reward\.parts is empty"):
        compute()


def test_a_mix_may_have_more_parts_than_one_reward():
    names = [f"task{number}/{part}" for number in range(5) for part in "abcd"]
    assert check_reward_parts({}, {"task1/a": 0.5}, task_parts=names) == []
    assert "at most 16" not in "".join(check_reward_parts({}, {}, task_parts=names))
    assert "17 of at most 16" in check_reward_parts({}, {}, task_parts=[f"math/{n}" for n in range(17)])[0]
