"""The kind `math` against answers as people and models write them."""

import time

import pytest

from asyncrl.errors import RewardError
from asyncrl.rewards.base import Sample
from asyncrl.rewards.kinds.answer_texts import last_answer
from asyncrl.rewards.kinds.math_answer import MathAnswer

pytest.importorskip("math_verify")

# reference, completion, value
ANSWERS = [
    ("-5", r"-\$5", 1),
    ("-5", "-€5", 1),
    (r"-\$5", r"\boxed{-5}", 1),
    ("3", r"\boxed{1 so \boxed{3}", 1),
    ("3", r"\boxed{\{3\}}", 1),
    (r"\$18.90", r"The answer is \$18.90.", 1),
    (r"\$18.90", r"\boxed{18.90}", 1),
    (r"\$18.90", r"\boxed{\$18.9}", 1),
    (r"\$18.90", r"$18.9", 1),
    (r"$\$18.90$", r"it costs 18.90", 1),
    (r"\boxed{\$18.90}", r"18.9 dollars", 1),
    (r"\$18.90", r"19.90", 0),
    (r"US\$5", r"5", 1),
    (r"€5", r"5", 1),
    (r"5", r"£5", 1),
    (r"\$1{,}000", r"1000", 1),
    (r"\$1,000", r"\boxed{1,000}", 1),
    (r"1000", r"\boxed{1{,}000}", 1),
    (r"18.90 dollars", r"\boxed{18.90}", 1),
    (r"18.90", r"\boxed{18.90 dollars}", 1),
    (r"USD 5", r"5", 1),
    (r"5 000", r"5000", 1),
    (r"0", r"\boxed{5 000}", 0),
    (r"5000", r"\boxed{5\,000}", 1),
    (r"1'000", r"1000", 1),
    (r"3 1/2", r"3.5", 1),
    (r"7/2", r"\boxed{3 1/2}", 1),
    (r"1e3", r"1000", 1),
    (r"1000", r"\boxed{1e3}", 1),
    (r"3", r"\boxed{1} … \boxed{3}", 1),
    (r"3", r"\boxed{1} so \boxed{3}", 1),
    (r"1", r"\boxed{1} so \boxed{3}", 0),
    (r"3", r"First \boxed{1}. Then \boxed{2}. So \boxed{3}", 1),
    (r"\{1,3\}", r"\boxed{1} so \boxed{3}", 0),
    (r"1,2", r"\boxed{1}, \boxed{2}", 1),
    (r"1,2", r"\boxed{1} and \boxed{2}", 1),
    (r"1,2", r"$\boxed{1}$ or $\boxed{2}$", 1),
    (r"3", r"\boxed{3} then \boxed{3}", 1),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{3}} hm, \boxed{\frac{1}{2}}", 1),
    (r"Thus \boxed{1}, wait \boxed{3}", r"\boxed{3}", 1),
    (r"2023-05-01", r"\boxed{2017}", 0),
    (r"2023-05-01", r"2017", 0),
    (r"2023-05-01", r"\boxed{2023-05-01}", 1),
    (r"2023-05-01", r"It was 2023-05-01.", 1),
    (r"2023-05-01", r"It was 2023/5/1", 1),
    (r"2023-05-01", r"\boxed{2023-05-02}", 0),
    (r"2017", r"\boxed{2023-05-01}", 0),
    (r"2023", r"born 2023-05-01", 0),
    (r"5/1/2023", r"\boxed{5/2023}", 0),
    (r"5/1/2023", r"\boxed{5/1/2023}", 1),
    (r"1.2.3", r"0.36", 0),
    (r"1.2.3", r"\boxed{1.2.3}", 1),
    (r"0.36", r"1.2.3", 0),
    (r"-3", r"−3", 1),
    (r"50%", r"50\%", 1),
    (r"50\%", r"\boxed{0.5}", 1),
    (r"1/2", r"\boxed{0.5}", 1),
    (r"2+2", r"4", 1),
    (r"x=3", r"\boxed{3}", 1),
    (r"\sqrt{2}+1", r"$1+\sqrt{2}$", 1),
    (r"10", r"10-5", 0),
    (r"2012-3", r"2009", 1),
    (r"\boxed{\boxed{3}}", r"3", 1),
    (r"\text{A}", r"\boxed{A}", 1),
    (r"(1,2)", r"\boxed{(1,2)}", 1),
]


def value(answer, completion):
    return MathAnswer().value(Sample(completion, {"answer": answer}))


@pytest.mark.parametrize(("answer", "completion", "expected"), ANSWERS)
def test_W11_the_final_expression_is_compared_with_the_reference(answer, completion, expected):
    assert value(answer, completion) == expected


@pytest.mark.parametrize("answer", ["", "none of these?!", r"\$", "€", "$", r"\boxed{}"])
def test_W11_a_reference_without_an_expression_is_a_failure_and_no_zero(answer):
    with pytest.raises(RewardError, match="is no mathematical expression"):
        value(answer, "3")


def test_W11_boxes_that_are_open_or_many_take_no_time():
    text = r"\boxed{" * 2000 + "3" + "}" * 1000
    started = time.thread_time()
    last_answer(text)
    last_answer(r"\boxed{1}, " * 5000)
    assert time.thread_time() - started < 5.0
