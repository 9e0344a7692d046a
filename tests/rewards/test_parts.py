"""Kinds of parts, their configuration, and their weighted sum."""

import math
import re
import threading

import pytest
import yaml

from asyncrl.errors import ConfigError, RewardError
from asyncrl.rewards import parts
from asyncrl.rewards.base import Sample
from asyncrl.rewards.parts import (
    KINDS,
    RewardParts,
    check_reward_parts,
    make_parts,
    prepare_parts,
)
from asyncrl.types import MAX_REWARD_PARTS, weighted_sum
from tests.http_servers import AnsweringServer, Answers, chat_answer

JUDGE = {"kind": "judge", "url": "http://127.0.0.1:8000/v1", "model": "m"}
OVERLONG = {"kind": "overlong", "max_tokens": 10, "margin": 4}


class Own:
    """A task with two parts."""

    def __init__(self, parts=None):
        self.parts = parts or {"exact": 1.0, "neat": 0.5}

    def reward(self, completion, payload):
        return self.parts


def values(parts, sample, weights=None, task=None):
    (compute,) = RewardParts(task or Own(), make_parts(parts), weights or {}).begin([sample])
    return compute()


def score_of(spec, completion="", payload=None, num_tokens=0):
    return values({"it": spec}, Sample(completion, payload or {}, "", num_tokens))["it"]


# -- configuration


def test_every_kind_in_the_example_of_the_docstring_is_one_and_every_kind_is_in_it():
    lines = parts.__doc__.split("reward of a rollout")[0].splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip() == "reward:")
    reward = yaml.safe_load("\n".join(line[4:] for line in lines[start:]))["reward"]
    assert check_reward_parts(reward["parts"], reward["weights"], task_parts=["exact"], reward_timeout_s=10.0) == []
    assert {spec["kind"] for spec in reward["parts"].values()} == set(KINDS)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"kind": "jugde"}, "no kind jugde; did you mean judge"),
        ({"kind": "xyz"}, "kinds are judge, reward_model, math, overlong, length, format, rule"),
        ({"url": "http://a"}, "must be a mapping with a kind"),
        ("judge", "must be a mapping with a kind"),
        ({"kind": 3}, "must be a mapping with a kind"),
        ({"kind": "judge", "url": "http://127.0.0.1:1/v1"}, "judge needs the argument model"),
        ({**JUDGE, "temlate": "x"}, "no argument temlate; did you mean template"),
        ({**JUDGE, "timeout_s": "3"}, "timeout_s='3' must be a number"),
        ({**JUDGE, "retries": 1.5}, "retries=1.5 must be an integer"),
        ({**JUDGE, "retries": True}, "retries=True must be an integer"),
        ({**JUDGE, "scale": 10}, "scale=10 must be a list"),
        ({**JUDGE, "scale": [10, 0]}, "the lower first"),
        ({**JUDGE, "scale": [0, 5, 10]}, "two numbers"),
        ({**JUDGE, "options": {"model": "x"}}, "options sets model"),
        ({**JUDGE, "options": {"temperature": 2.01}}, "options.temperature=2.01 must be a number from 0 to 2"),
        ({**JUDGE, "options": {"temperature": float("nan")}}, "options.temperature=nan"),
        ({**JUDGE, "options": {"top_p": 1.5}}, "options.top_p=1.5 must be a number from 0 to 1"),
        ({**JUDGE, "options": {"max_tokens": 0}}, "options.max_tokens=0 must be a number from 1"),
        ({**JUDGE, "timeout_s": 0}, "timeout_s=0 must be above 0"),
        ({**JUDGE, "retries": -1}, "retries=-1"),
        ({**JUDGE, "concurrency": 0}, "concurrency=0"),
        ({**JUDGE, "template": "rate {prompt}"}, "template has no {completion}"),
        ({**JUDGE, "url": "127.0.0.1:8000"}, "must be http://HOST:PORT"),
        ({**JUDGE, "url": "http://h:99999"}, "must be http://HOST:PORT"),
        ({**JUDGE, "url": "http://me:pass@h/v1"}, "name the environment variable"),
        ({**JUDGE, "url": "http://h/v1?key=1"}, "must end with its path"),
        ({**JUDGE, "timeout_s": 5.0}, "5 x 3 tries is not below generator.reward_timeout_s=10"),
        ({"kind": "reward_model"}, "either url.*or path"),
        ({"kind": "reward_model", "url": "http://h", "path": "f"}, "not both"),
        ({"kind": "reward_model", "url": "http://h", "endpoint": "pooling"}, "must be classify or score"),
        ({"kind": "reward_model", "url": "http://h", "endpoint": "score"}, "user for the query"),
        ({"kind": "reward_model", "url": "http://h", "label": -1}, "label=-1"),
        ({"kind": "reward_model", "path": "f", "device": "gpu"}, "must be auto, cpu or cuda"),
        ({"kind": "reward_model", "path": "f", "threads": 0}, "threads=0"),
        ({"kind": "overlong", "max_tokens": 10}, "needs the argument margin"),
        ({"kind": "overlong", "max_tokens": 10, "margin": 20}, "margin=20 must be above 0 and at most max_tokens=10"),
        ({"kind": "length", "max_tokens": 0}, "max_tokens=0 must be above 0"),
        ({"kind": "format", "pattern": "("}, "no regular expression"),
        ({"kind": "rule", "path": "my_module"}, "must be `module:function`"),
        ({"kind": "math", "key": 1}, "key=1 must be text"),
    ],
)
def test_each_mistake_in_a_part_is_named(spec, says):
    (problem,) = check_reward_parts({"it": spec}, {}, reward_timeout_s=10.0)
    assert problem.startswith("reward.parts.it")
    assert re.search(says, problem), problem


def test_all_mistakes_are_named_at_once():
    parts = {"a": {"kind": "nothing"}, "b": {**JUDGE, "x": 1, "model": 3}}
    assert len(check_reward_parts(parts, {"c": "heavy", "d": 1.0}, task_parts=[])) == 5


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 41, 1])
def test_a_name_that_could_not_name_a_metric_is_refused(name):
    assert "metrics are named after it" in check_reward_parts({name: OVERLONG}, {})[0]


def test_there_is_a_limit_to_the_number_of_parts():
    assert check_reward_parts({f"p{i}": OVERLONG for i in range(MAX_REWARD_PARTS)}, {}) == []
    assert "at most 16" in check_reward_parts({f"p{i}": OVERLONG for i in range(MAX_REWARD_PARTS + 1)}, {})[0]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"it": math.nan}, "must be a finite number"),
        ({"it": math.inf}, "must be a finite number"),
        ({"it": "1"}, "must be a finite number"),
        ({"it": True}, "must be a finite number"),
        ({"it": None}, "must be a finite number"),
        ({"exat": 1.0}, "there is no such part; did you mean exact"),
        ({3: 1.0}, "there is no such part"),
    ],
)
def test_each_mistake_in_a_weight_is_named(weights, says):
    (problem,) = check_reward_parts({"it": OVERLONG}, weights, task_parts=["exact"])
    assert says in problem


def test_a_weight_may_be_meant_for_a_part_of_a_task_that_does_not_name_its_parts():
    assert check_reward_parts({"it": OVERLONG}, {"it": 0, "own": -2.5}) == []


def test_a_part_must_not_take_the_name_of_one_of_the_task():
    assert "choose another" in check_reward_parts({"exact": OVERLONG}, {}, task_parts=["exact"])[0]


def test_parts_with_mistakes_are_not_made():
    with pytest.raises(ConfigError, match="no kind nothing"):
        make_parts({"it": {"kind": "nothing"}})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({**JUDGE, "api_key_env": "SURELY_NOT_SET"}, "SURELY_NOT_SET: this environment variable is empty or not set"),
        ({"kind": "reward_model", "path": "not/there"}, "no folder with a Hugging Face model"),
        ({"kind": "rule", "path": "not_there:function"}, "there is no module not_there"),
        ({"kind": "rule", "path": "math:squirt"}, "has no function squirt; did you mean sqrt"),
        ({"kind": "rule", "path": "math:pi"}, "has no function pi"),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_starts(spec, says):
    parts = make_parts({"it": spec})
    (problem,) = prepare_parts(parts)
    assert problem.startswith("reward.parts.it") and says in problem


# -- local kinds


def test_overlong_and_length_count_tokens():
    assert [score_of(OVERLONG, num_tokens=count) for count in (0, 6, 8, 10, 99)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert score_of({"kind": "length", "max_tokens": 10}, num_tokens=5) == -0.5


def test_a_number_of_tokens_that_is_not_known_is_a_failure():
    with pytest.raises(RewardError, match="it: the number of tokens"):
        score_of(OVERLONG, num_tokens=None)


def test_format_looks_at_the_whole_completion():
    spec = {"kind": "format", "pattern": "<think>.*</think>\\s*\\d+"}
    assert [score_of(spec, text) for text in ("<think>a\nb</think> 7", "7")] == [1.0, 0.0]


def test_a_rule_is_a_function_with_arguments_of_ones_own(tmp_path, monkeypatch):
    source = "def scaled(completion, payload, factor):\n    return len(completion) * factor + payload['bonus']\n"
    (tmp_path / "own_rules.py").write_text(source + "def text(completion, payload):\n    return 'good'\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"kind": "rule", "path": "own_rules:scaled", "args": {"factor": 2}}
    assert prepare_parts(make_parts({"it": spec})) == []
    assert score_of(spec, "abc", {"bonus": 1}) == 7.0
    with pytest.raises(RewardError, match="must return a number, not 'good'"):
        score_of({"kind": "rule", "path": "own_rules:text"})


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("1/2", "so it is $\\frac{1}{2}$", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("$x^2 + 2x$", "The result is \\boxed{x(x+2)}", 1.0),
        ("1,234", "1234", 1.0),
        ("\\sqrt{2}+1", "$1$", 0.0),
        ("72", "15,10=72", 1.0),
        ("72", "71", 0.0),
        (72, "It is 72.", 1.0),
        ("72", "", 0.0),
        ("72", "no idea", 0.0),
    ],
)
def test_mathematical_answers_are_compared_by_their_value(answer, completion, value):
    assert score_of({"kind": "math"}, completion, {"answer": answer}) == value


@pytest.mark.parametrize("payload", [{}, {"answer": ""}, {"answer": "\\frac{"}])
def test_a_reference_that_is_no_expression_is_a_failure_and_not_a_zero(payload):
    with pytest.raises(RewardError, match="it: .*(payload has no answer|no mathematical expression)"):
        score_of({"kind": "math"}, "72", payload)


# -- the sum


def test_the_reward_is_the_weighted_sum_and_values_stay_as_they_are():
    found = values({"long": OVERLONG}, Sample("x", {}, "", 8), {"exact": 2.0, "long": 0.5})
    assert found == {"exact": 1.0, "neat": 0.5, "long": -0.5}
    assert weighted_sum(found, {"exact": 2.0, "long": 0.5}) == 2.0 * 1.0 + 0.5 + 0.5 * -0.5
    assert weighted_sum(found, {"exact": 0, "neat": 0, "long": 0}) == 0.0


def test_a_sum_that_overflows_is_a_failure():
    with pytest.raises(RewardError, match="weighted sum of the reward's parts inf is not finite"):
        values({}, Sample("", {}), {"exact": 1e308, "neat": 1e308}, Own({"exact": 1e6, "neat": 1.0}))


def test_a_weight_for_a_part_that_the_task_turns_out_not_to_have_is_a_failure():
    with pytest.raises(RewardError, match="reward.weights.exat: there is no such part; the task has exact, neat"):
        values({}, Sample("", {}), {"exat": 0.5})


def test_a_part_may_be_missing_now_and_then_when_the_task_names_it():
    task = Own({"exact": 1.0})
    task.part_names = ("exact", "neat")
    assert values({}, Sample("", {}), {"neat": 0.5}, task) == {"exact": 1.0}


def test_a_part_with_a_name_that_the_task_turns_out_to_use_is_a_failure():
    with pytest.raises(RewardError, match="reward.parts.neat: the task has a part of this name"):
        values({"neat": OVERLONG}, Sample("", {}, "", 1))


def test_requests_of_a_job_run_together_and_come_back_in_their_order():
    """Four requests meet in the server: none is answered before all are there."""
    together = threading.Barrier(4, timeout=20)

    def answer(number, body):
        together.wait()
        return 200, chat_answer(body["messages"][0]["content"])

    server = AnsweringServer(Answers(answer))
    spec = {**JUDGE, "url": f"{server.url}/v1", "template": "score: {completion}", "timeout_s": 20.0}
    try:
        rewards = RewardParts(Own(), make_parts({"judge": spec}), {})
        computed = [compute() for compute in rewards.begin([Sample(str(i), {}) for i in (4, 1, 3, 2)])]
    finally:
        server.close()
    assert [found["judge"] for found in computed] == [0.4, 0.1, 0.3, 0.2]
    assert list(computed[0]) == ["exact", "neat", "judge"]


def test_a_part_that_fails_takes_its_completion_along_and_no_other():
    def answer(number, body):
        text = body["messages"][0]["content"]
        return (200, chat_answer("no idea")) if text == "bad" else (200, chat_answer("score: 5"))

    server = AnsweringServer(Answers(answer))
    spec = {**JUDGE, "url": f"{server.url}/v1", "template": "{completion}"}
    try:
        rewards = RewardParts(Own(), make_parts({"judge": spec}), {"judge": 0})
        first, bad, last = rewards.begin([Sample(text, {}) for text in ("good", "bad", "good")])
        assert first()["judge"] == last()["judge"] == 0.5
        with pytest.raises(RewardError, match="judge: the judge's answer does not end in"):
            bad()
    finally:
        server.close()
