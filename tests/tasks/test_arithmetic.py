"""The arithmetic task: which problems there are, and what counts as right."""

import pytest

from asyncrl.errors import TaskError
from asyncrl.tasks.arithmetic import CHARACTERS, Arithmetic, Problem, worked_answer

EVERY_PAIR = [(left, right) for left in range(10, 100) for right in range(10, 100)]


def problems_of(task: Arithmetic) -> tuple[list[Problem], list[Problem]]:
    return [task.train_problem(index) for index in range(task.train_size)], task.held_out_problems(10**6)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ("+", {Problem(a, "+", b) for a, b in EVERY_PAIR}),
        ("-", {Problem(a, "-", b) for a, b in EVERY_PAIR if a >= b}),
        ("+-", {Problem(a, o, b) for a, b in EVERY_PAIR for o in "+-" if o == "+" or a >= b}),
    ],
)
def test_every_problem_is_either_trained_on_or_held_out_and_only_once(operations, expected):
    train, held_out = problems_of(Arithmetic(2, operations))
    assert len(train) + len(held_out) == len(expected)
    assert set(train) | set(held_out) == expected
    assert 0 < len(held_out) <= 512


def test_held_out_problems_are_a_fixed_mixed_prefix():
    task = Arithmetic()
    few, many = task.eval_examples(20), task.eval_examples(100)
    assert many[:20] == few
    assert few == Arithmetic().eval_examples(20)
    assert few != Arithmetic(seed=1).eval_examples(20)
    lefts = [problem.left for problem in task.held_out_problems(512)]
    assert min(lefts) < 15 and max(lefts) > 94


def test_the_answer_written_last_counts():
    task = Arithmetic()
    example = task.train_example(0)
    left, right = map(int, example.prompt.rstrip("=").split("+"))
    assert example.payload == {"answer": str(left + right)}
    payload = {"answer": "105"}
    for completion in ("105", " 105 ", "15,10=105", "1=2=105"):
        assert task.reward(completion, payload) == {"exact": 1.0}
    for completion in ("", "=", "15", "105=", "105,", "0105", "15,10=95", "one hundred and five"):
        assert task.reward(completion, payload) == {"exact": 0.0}


@pytest.mark.parametrize("operations", ["+", "-"])
def test_the_working_ends_in_the_right_answer_and_uses_only_the_tasks_characters(operations):
    task = Arithmetic(3, operations)
    for index in range(0, 100_000, 97):
        problem = task.train_problem(index)
        worked = worked_answer(problem)
        assert task.reward(worked, {"answer": str(problem.answer)}) == {"exact": 1.0}
        assert set(problem.text + worked) <= set(CHARACTERS)


@pytest.mark.parametrize(
    ("problem", "right", "all_lost"),
    [
        (Problem(47, "+", 58), "15,10=105", "15,9=95"),
        (Problem(85, "+", 47), "12,13=132", "12,12=22"),
        (Problem(55, "+", 55), "10,11=110", "10,10=0"),
        (Problem(11, "+", 22), "3,3=33", "3,3=33"),
        (Problem(52, "-", 27), "-5,2=25", "-5,3=35"),
    ],
)
def test_carries_are_worked_or_lost(problem, right, all_lost):
    assert worked_answer(problem) == right
    assert worked_answer(problem, forget=lambda: True) == all_lost
    assert worked_answer(problem, forget=lambda: False) == right


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"digits": 0}, "digits=0 must be from 1 to 9"),
        ({"digits": 10}, "digits=10"),
        ({"operations": ""}, "operations=''"),
        ({"operations": "+*"}, r"operations='\+\*' must be '\+', '-' or '\+-'"),
        ({"operations": "++"}, "operations"),
    ],
)
def test_bad_arguments_are_named(args, says):
    with pytest.raises(TaskError, match=says):
        Arithmetic(**args)


def test_an_index_past_the_end_is_refused():
    task = Arithmetic()
    with pytest.raises(IndexError):
        task.train_example(task.train_size)
