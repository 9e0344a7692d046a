"""The gsm8k task: reading records, prompts, and what counts as right."""

import json
import sys
from decimal import Decimal

import pytest

from asyncrl.errors import TaskError
from asyncrl.tasks.gsm8k import CHAT_INSTRUCTION, Gsm8k, last_number, prompt_text, worked_answer


def record(number: int) -> dict[str, str]:
    return {
        "question": f"Ann has {number} apples and buys 2. How many now?",
        "answer": f"She has {number}+2=<<{number}+2={number + 2}>>{number + 2}.\n#### {number + 2}",
    }


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(record(number)) for number in range(40)) + "\n\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("she pays $1,234.50.", "1234.50"),
        ("1,000,000 people", "1000000"),
        ("it is -5", "-5"),
        ("it is \u22125", "-5"),
        ("-$7 in total", "-7"),
        ("$-7 in total", "-7"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("x-5", "5"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("grew by 5%", "5"),
        ("the answer is 3.", "3"),
        ("about .5 l", "0.5"),
        ("007", "7"),
        ("72.00", "72"),
        ("no number", None),
        ("", None),
        ("one - two", None),
    ],
)
def test_the_last_number_is_found(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("completion", "exact", "form"),
    [
        ("\nShe has 72.\n#### 72", 1, 1),
        ("#### 72", 1, 1),
        ("\n#### 72\n", 1, 1),
        ("\n#### $72.00", 1, 1),
        ("\n#### 71", 0, 1),
        ("\n#### -72", 0, 1),
        ("She has 72.", 1, 0),
        ("\n#### 72 apples", 1, 0),
        ("\n#### 72\nNow 5", 0, 0),
        ("The answer #### 72", 1, 0),
        ("\n####", 0, 0),
        ("", 0, 0),
    ],
)
def test_number_and_form_are_rewarded_apart(completion, exact, form):
    task = Gsm8k(exact_weight=2.0, format_weight=0.5)
    assert task.reward(completion, {"answer": "72"}) == {"exact": 2.0 * exact, "format": 0.5 * form}


def test_a_record_becomes_a_prompt_a_payload_and_a_worked_answer(data):
    task = Gsm8k(data)
    example = task.train_example(3)
    assert example.prompt == "Question: Ann has 3 apples and buys 2. How many now?\nAnswer:"
    assert example.prompt == prompt_text(record(3)["question"])
    assert example.payload == {"answer": "5"}
    assert worked_answer(record(3)) == "\nShe has 3+2=5.\n#### 5"
    assert task.reward(worked_answer(record(3)), example.payload) == {"exact": 1.0, "format": 0.2}


def test_chat_prompts_are_messages(data):
    (message,) = Gsm8k(data, chat=True).train_example(0).prompt
    assert message["role"] == "user"
    assert message["content"].endswith(CHAT_INSTRUCTION)


def test_without_a_second_file_the_last_tenth_is_held_out(data):
    task = Gsm8k(data)
    assert task.train_size == 36
    assert [example.payload["answer"] for example in task.eval_examples(100)] == ["38", "39", "40", "41"]
    assert len(task.eval_examples(2)) == 2


def test_with_a_second_file_all_of_the_first_is_trained_on(data, tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(json.dumps(record(99)))
    task = Gsm8k(data, str(held_out))
    assert task.train_size == 40
    assert [example.payload["answer"] for example in task.eval_examples(5)] == ["101"]


def test_scoring_needs_no_data_file():
    assert Gsm8k("not/here.jsonl").reward("#### 1", {"answer": "1"})["exact"] == 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"train\.jsonl cannot be read .*give a JSON Lines file"),
        ("", "holds no records"),
        ("\n{", "line 2 is not JSON"),
        ('{"question": "?"}', "line 1 must be an object with the texts `question` and `answer`"),
        ("[1]", "line 1 must be an object"),
        (b"\xff\xfe", "line 1 cannot be read: not UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, says):
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=says):
        Gsm8k(str(path)).train_size  # noqa: B018 - reading it is the point


def test_an_answer_without_a_number_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps({"question": "?", "answer": "who knows"})] * 2))
    with pytest.raises(TaskError, match=r"2 of 2 records .* line 1 has no number in its answer: 'who knows'; .*line 2"):
        Gsm8k(str(path)).train_example(0)


def test_a_data_set_name_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets, or give a file"):
        Gsm8k("openai/gsm8k").train_size  # noqa: B018 - reading it is the point


def test_a_question_that_is_held_out_is_not_trained_on(tmp_path):
    path, test_path = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"What is {n}?", "answer": f"#### {n}"}) for n in range(6)))
    test_path.write_text(json.dumps({"question": "What  is 4?\n", "answer": "#### 4"}))
    task = Gsm8k(str(path), str(test_path))
    assert task.train_size == 5
    assert task.left_out == [f"1 records of {path} that ask what a held-out one asks: not trained on"]
    assert len(task.eval_examples(3)) == 1
