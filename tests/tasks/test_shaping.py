"""Penalties on length, and the check of form."""

import pytest

from asyncrl.tasks.shaping import has_form, length_penalty, overlong_penalty


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (25, -0.25), (100, -1.0), (1000, -1.0)])
def test_the_linear_penalty_falls_to_minus_one(length, penalty):
    assert length_penalty(length, 100) == penalty


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)]
)
def test_the_overlong_penalty_starts_at_the_margin(length, penalty):
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: length_penalty(1, 0), "max_length=0 must be above 0"),
        (lambda: overlong_penalty(1, 10, 0), "margin=0 must be above 0"),
        (lambda: overlong_penalty(1, 10, 11), "margin=11 must be .* at most max_length=10"),
    ],
)
def test_limits_that_make_no_sense_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_form_is_checked_on_the_whole_completion():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    assert has_form(" <think>a\nb</think>\n<answer>1</answer>\n", pattern) == 1.0
    assert has_form("<think>a</think><answer>1</answer> and more", pattern) == 0.0
    assert has_form("", pattern) == 0.0
