"""Records as prompts: what is asked, what is held out, what is shown, what travels."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import TaskError
from asyncrl.tasks.base import load_task
from asyncrl.tasks.dataset import Dataset

EXACT = {"exact": "exact"}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    """Writes records to a file, and says its path."""

    def write(records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def problems(count, **more):
    return [{"question": f"{number} + 1 = ?", "answer": str(number + 1), **more} for number in range(count)]


def prompts_of(task):
    return [task.train_example(index).prompt for index in range(task.train_size)]


def held_out_of(task):
    return [example.prompt for example in task.eval_examples(10**6)]


def first(path, **args):
    """The one training example of a file of one record."""
    return Dataset(path, **{"rewards": EXACT, **args}).train_example(0)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_it_is_found_by_its_short_path(write):
    args = {"path": write(problems(3)), "rewards": EXACT, "prompt": "question"}
    task = load_task("asyncrl.tasks.dataset:Dataset", args)
    assert isinstance(task, Dataset)
    assert task.train_size == 2


def test_a_column_is_a_prompt_as_it_is(write):
    example = first(write([{"prompt": "1 + 1 =", "answer": 2}]))
    assert (example.prompt, example.payload) == ("1 + 1 =", {"answer": 2})


def test_a_template_puts_columns_in_place_and_leaves_other_braces_alone(write):
    path = write([{"a": 1, "b": [2, "x"], "c": "{a}", "answer": "y"}])
    template = r"{a} {b} {c} \boxed{} {{a}} {1}"
    assert first(path, template=template).prompt == r'1 [2, "x"] {a} \boxed{} {a} {1}'


def test_chat_and_system_make_messages_of_a_text(write):
    path = write(problems(1))
    assert first(path, prompt="question", chat=True).prompt == [user("0 + 1 = ?")]
    example = first(path, template="{question}!", chat=True, system="Be brief.")
    assert example.prompt == [SYSTEM, user("0 + 1 = ?!")]


def test_of_chat_messages_what_the_assistant_says_last_is_cut_off_and_is_the_answer(write):
    path = write([{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}])
    example = first(path, prompt="messages")
    assert example.prompt == [user("a"), assistant("b"), user("c")]
    assert example.payload == {"answer": "d"}


def test_a_column_of_answers_counts_before_what_the_assistant_says(write):
    path = write([{"messages": [user("a"), assistant("b")], "answer": "right", "gold": {"value": 7}}])
    assert first(path, prompt="messages").payload == {"answer": "right"}
    assert first(path, prompt="messages", answer="gold.value").payload == {"answer": 7}


def test_messages_without_an_assistant_are_asked_as_they_are_and_keep_their_own_system(write):
    own = {"role": "system", "content": "own"}
    path = write([{"messages": [own, user("a")], "answer": "b"}])
    assert first(path, prompt="messages", system="Be brief.").prompt == [own, user("a")]


def test_arguments_of_the_chat_template_go_with_every_example(write):
    path = write(problems(4))
    task = Dataset(path, EXACT, prompt="question", chat=True, chat_template_args={"enable_thinking": False})
    examples = [task.train_example(0), *task.eval_examples(1)]
    assert [example.chat_template_args for example in examples] == [{"enable_thinking": False}] * 2


# -- few shots ---------------------------------------------------------------------------------------------------------


def test_examples_are_taken_from_the_training_part_and_not_trained_on(write):
    records = problems(20)
    task = Dataset(write([*records, records[0], records[1]]), EXACT, prompt="question", few_shot=2, eval_count=3)
    shown = prompts_of(task)[0].split("\n\n")[:2]
    held_out = {prompt.split("\n\n")[-1] for prompt in held_out_of(task)}
    trained = [prompt.split("\n\n")[-1] for prompt in prompts_of(task)]
    answered = [f"{record['question']} {record['answer']}" for record in records]
    assert all(text in answered for text in shown)
    assert all(prompt.split("\n\n")[:2] == shown for prompt in [*prompts_of(task), *held_out_of(task)])
    asked = {text.rpartition(" ")[0] for text in shown}
    assert len(asked) == 2 and len(held_out) == 3
    assert not asked & held_out and not asked & set(trained) and not held_out & set(trained)
    assert set(trained) | held_out | asked == {record["question"] for record in records}


def test_examples_of_a_chat_stand_between_system_and_question(write):
    pairs = [["1?", "one"], ["2?", "two"]]
    example = first(write(problems(1)), prompt="question", chat=True, system="Be brief.", few_shot=pairs)
    assert example.prompt == [
        SYSTEM, user("1?"), assistant("one"), user("2?"), assistant("two"), user("0 + 1 = ?")
    ]  # fmt: skip


def test_given_pairs_of_texts_are_joined_with_a_blank_unless_they_bring_one(write):
    pairs = [["Q: a\nA:", "b"], ["Q: c\nA: ", "d"], ["Q: e\nA:", "\nf"]]
    example = first(write([{"prompt": "Q: g\nA:", "answer": "h"}]), few_shot=pairs)
    assert example.prompt == "Q: a\nA: b\n\nQ: c\nA: d\n\nQ: e\nA:\nf\n\nQ: g\nA:"


def test_a_column_of_worked_answers_is_shown_in_place_of_the_answer(write):
    path = write(problems(3, worked="step by step"))
    task = Dataset(path, EXACT, prompt="question", few_shot=1, few_shot_column="worked", eval_count=0)
    assert prompts_of(task)[0].startswith("0 + 1 = ? step by step\n\n")


# -- what is held out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "args", "count"),
    [
        (1, {}, 0),
        (2, {}, 1),
        (9, {}, 1),
        (100, {}, 10),
        (6000, {}, 512),
        (100, {"eval_count": 30}, 30),
        (100, {"eval_share": 0.25}, 25),
        (100, {"eval_share": 0}, 0),
        (100, {"eval_count": 0}, 0),
    ],
)
def test_so_many_are_held_out_of_one_file(write, size, args, count):
    task = Dataset(write(problems(size)), EXACT, prompt="question", **args)
    assert (task.train_size, len(held_out_of(task))) == (size - count, count)


def test_the_choice_is_seeded_and_spread_over_the_file(write):
    path = write(problems(200))
    choice = held_out_of(Dataset(path, EXACT, prompt="question"))
    assert choice == held_out_of(Dataset(path, EXACT, prompt="question"))
    assert choice != held_out_of(Dataset(path, EXACT, prompt="question", seed=1))
    numbers = [int(prompt.split()[0]) for prompt in choice]
    assert min(numbers) < 60 and max(numbers) > 140
    assert [example.prompt for example in Dataset(path, EXACT, prompt="question").eval_examples(5)] == choice[:5]


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 12), min_size=2, max_size=60),
    eval_count=st.integers(0, 8),
    few_shot=st.integers(0, 3),
    curriculum=st.sampled_from([0, 1, 17]),
    seed=st.integers(0, 5),
)
def test_no_prompt_that_is_held_out_or_shown_is_ever_trained_on(
    tmp_path_factory, numbers, eval_count, few_shot, curriculum, seed
):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"[{number}]", "answer": "a", "n": number}) for number in numbers))
    difficulty = {"difficulty": "n", "curriculum": curriculum} if curriculum else {}
    try:
        task = Dataset(str(path), EXACT, eval_count=eval_count, few_shot=few_shot, seed=seed, **difficulty)
        size = task.train_size or 100
    except TaskError as error:
        assert re.search("has no record to train on|are to be held out", str(error))  # noqa: PT017 - by its data
        return
    asked = [task.train_example(index).prompt.split("\n\n") for index in range(size)]
    trained = {parts[-1] for parts in asked}
    shown = {part.removesuffix(" a") for part in asked[0][:-1]}
    held_out = {prompt.split("\n\n")[-1] for prompt in held_out_of(task)}
    assert not trained & held_out
    assert not trained & shown
    assert not held_out & shown
    assert trained | held_out | shown <= {f"[{number}]" for number in numbers}
    assert len(held_out_of(task)) == eval_count


def test_all_of_a_file_may_be_held_out(write):
    task = Dataset(write(problems(20)), EXACT, prompt="question", eval_share=1)
    assert sorted(held_out_of(task)) == sorted(record["question"] for record in problems(20))


def test_a_second_file_is_held_out_and_what_it_asks_is_not_trained_on(write):
    path, eval_path = write(problems(10)), write(problems(3), "eval.jsonl")
    task = Dataset(path, EXACT, prompt="question", eval_path=eval_path)
    assert held_out_of(task) == ["0 + 1 = ?", "1 + 1 = ?", "2 + 1 = ?"]
    assert prompts_of(task) == [f"{number} + 1 = ?" for number in range(3, 10)]
    assert task.left_out == [f"3 records of {path} that ask what a held-out one asks: not trained on"]


def test_a_split_of_a_saved_data_set_is_held_out(tmp_path):
    import datasets

    parts = {"train": problems(20)[:15], "test": problems(20)[15:]}
    splits = {name: datasets.Dataset.from_list(records) for name, records in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    task = Dataset(str(tmp_path / "saved"), EXACT, prompt="question", eval_split="test")
    assert (task.train_size, len(held_out_of(task)), task.left_out) == (15, 5, [])


# -- a curriculum ------------------------------------------------------------------------------------------------------


def test_a_curriculum_goes_from_the_easiest_to_all(write):
    records = [{"prompt": f"[{number}]", "answer": "a", "level": (7 * number) % 64 / 2} for number in range(64)]
    level = {record["prompt"]: record["level"] for record in records}
    task = Dataset(write(records), EXACT, difficulty="level", curriculum=320, eval_count=0)
    assert task.train_size is None
    levels = [level[task.train_example(index).prompt] for index in range(320 + 64)]
    for stage in range(16):
        taken = levels[20 * stage : 20 * stage + 20]
        assert max(taken) < 2 * (stage + 1)
    assert sorted(levels[320:]) == sorted(level.values())


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"path": ""}, r"task\.args\.path must name a file"),
        ({"template": "{q}", "prompt": "question"}, "has a prompt .* and a template; give one"),
        ({"template": "no place"}, "template='no place' names no column"),
        ({"template": "{q}", "system": "s"}, "set chat: true"),
        ({"eval_path": "a.jsonl", "eval_split": "test"}, r"eval_path=a\.jsonl and eval_split=test; give one"),
        ({"eval_share": 0.1, "eval_count": 3}, "eval_share and eval_count, which both say what is held out"),
        ({"eval_share": 0.1, "eval_path": "a.jsonl"}, "eval_share and eval_path, which both"),
        ({"eval_share": 1.5}, "eval_share=1.5 must be from 0 to 1"),
        ({"eval_count": -1}, "eval_count=-1 must be 0 or more"),
        ({"difficulty": "level"}, "difficulty='level' and curriculum=0 belong together"),
        ({"curriculum": 10}, "difficulty='' and curriculum=10 belong together"),
        ({"few_shot": -1}, "few_shot=-1 must be a number, or pairs"),
        ({"few_shot": "two"}, "few_shot='two' must be a number, or pairs"),
        ({"few_shot": [["q"]]}, r"few_shot\[0\] must be two texts"),
        ({"payload": "topic"}, "payload='topic' must be a list of columns"),
        ({"chat": "yes", "rewards": None}, r"task\.args\.rewards must name the parts"),
    ],
)
def test_arguments_that_fit_no_data_are_refused_before_it_is_read(args, says):
    with pytest.raises(TaskError, match=says):
        Dataset(**{"path": "not/there.jsonl", "rewards": EXACT, **args})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, r"task\.args\.prompt: .*data\.jsonl has no column prompt .there are answer, level, question, tests"),
        ({"prompt": "questoin"}, "has no column questoin; did you mean question?"),
        ({"template": "{questions}"}, r"task\.args\.template: .* has no column questions; did you mean question?"),
        ({"prompt": "question", "answer": "answers"}, r"task\.args\.answer: .* did you mean answer?"),
        ({"prompt": "question", "payload": ["test"]}, r"task\.args\.payload: .* did you mean tests?"),
        ({"prompt": "question", "few_shot": 1, "few_shot_column": "lever"}, "few_shot_column: .* did you mean level?"),
        ({"prompt": "question", "difficulty": "levels", "curriculum": 3}, "difficulty: .* did you mean level?"),
        ({"prompt": "question", "difficulty": "tests", "curriculum": 3}, "has no number in its tests: 'a'"),
        ({"prompt": "level"}, "has no prompt: its level must be a text or a list of chat messages, not 0"),
        ({"prompt": "question", "system": "s"}, "has a text as its prompt, .*set chat: true"),
        ({"prompt": "question", "eval_count": 4}, "has no record to train on: .*lower task.args.eval_share, eval_c"),
        ({"prompt": "question", "eval_count": 5}, "eval_count=5 records are to be held out .* and 4 can be used"),
        ({"prompt": "question", "few_shot": 3}, "has no record to train on: .*or are shown as examples"),
        ({"prompt": "question", "eval_path": "{path}"}, "has no record to train on: .*ask what a held-out one asks"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused_with_what_is_near(write, args, says):
    path = write([{**record, "level": 0, "tests": "a"} for record in problems(4)])
    args = {key: path if value == "{path}" else value for key, value in args.items()}
    with pytest.raises(TaskError, match=says):
        Dataset(path, EXACT, **args).train_size  # noqa: B018 - reading it is the point


BAD = {
    "no_prompt": ({"answer": "a"}, "has no prompt: its prompt must be a text"),
    "null": ({"prompt": None, "answer": "a"}, "has no prompt"),
    "blank": ({"prompt": " \n", "answer": "a"}, "has an empty prompt"),
    "surrogate": ({"prompt": "1 \ud83d", "answer": "a"}, "lone surrogate"),
    "no_messages": ({"prompt": [], "answer": "a"}, "has no chat message that asks something"),
    "only_assistant": ({"prompt": [assistant("x")], "answer": "a"}, "has no chat message that asks something"),
    "only_system": ({"prompt": [SYSTEM, assistant("x")]}, "has no chat message that asks something"),
    "no_role": ({"prompt": [{"content": "x"}], "answer": "a"}, "message 0 must have `role` and `content`"),
    "parts": ({"prompt": [{"role": "user", "content": [{"text": "x"}]}], "answer": "a"}, "must be a text, not .{.text"),
    "no_answer": ({"prompt": "x"}, r"has no answer, which the reward exact asks for: name .* in task\.args\.answer"),
    "dict_answer": ({"prompt": "x", "answer": {"a": 1}}, "has an answer that is no text, no number"),
    "no_answers": ({"prompt": "x", "answer": []}, "has an answer that is no text, no number"),
    "list": ([1], r"must be an object with names and values, not \[1\]"),
}


def test_each_record_that_cannot_be_used_is_left_out_by_its_line_and_reason(write):
    good = [{"prompt": f"[{number}]", "answer": "a"} for number in range(60)]
    task = Dataset(write([*good[:30], *(record for record, _ in BAD.values()), *good[30:]]), EXACT, eval_count=5)
    assert task.train_size == 55
    assert len(task.left_out) == len(BAD)
    for number, (told, (kind, (_, reason))) in enumerate(zip(task.left_out, BAD.items(), strict=True)):
        assert f"data.jsonl, line {31 + number} " in told, kind
        assert re.search(reason, told), told


def test_a_few_shot_record_without_a_single_answer_is_named(write):
    task = Dataset(write([{"prompt": f"[{n}]", "answer": ["a", "b"]} for n in range(3)]), EXACT, few_shot=1)
    with pytest.raises(TaskError, match=r"that asks '\[\d\]' has no single answer to show: name .*few_shot_column"):
        task.train_example(0)


def test_scoring_needs_no_data():
    task = Dataset("not/there.jsonl", EXACT)
    assert task.reward(" 5 ", {"answer": "5"}) == {"exact": 1.0}
