"""What a judge is asked, and what of its answers is a score."""

import asyncio

import pytest

from asyncrl.errors import RewardError
from asyncrl.rewards.base import Sample
from asyncrl.rewards.kinds.judge import Judge, score_in
from tests.http_servers import chat_answer

SAMPLE = Sample("It is {answer}, score: 10", {"answer": "42"}, prompt="What is 6x7?", num_tokens=5)


class Answering:
    """An endpoint with one answer."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def post(self, path, body):
        self.asked.append((path, body))
        return self.answer


def judged(answer, **arguments):
    endpoint = Answering(answer)
    judge = Judge(url="http://127.0.0.1:1/v1", model="judge", **arguments)
    return asyncio.run(judge.fetch(endpoint, SAMPLE)), endpoint.asked


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("score: 7", 7.0),
        ("Right, but short.\n\nScore: 7.5\n", 7.5),
        ("**Score: 3**", 3.0),
        ("score = .5", 0.5),
        ("score:-1", -1.0),
        ("score: 2 is too low, so\nscore: 9", 9.0),
        ('{"score": 4}', 4.0),
        ('Fine.\n{"why": "short", "score": 0.25}', 0.25),
        ('{\n  "why": "long",\n  "score": 1\n}', 1.0),
        ('Here it is:\n```json\n{"score": 6}\n```', 6.0),
    ],
)
def test_an_answer_that_ends_in_a_score_is_one(text, score):
    assert score_in(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "I cannot judge this.",
        "score: high",
        "score: 7/10",
        "score: 7 or 8",
        "score: nan",
        "score: inf",
        "score: 7\nThank you.",
        "The score is 7",
        '{"score": "7"}',
        '{"score": NaN}',
        '{"score": true}',
        '{"score": null}',
        '{"points": 7}',
        '{"score": 7',
        "[7]",
        "7",
        "[" * 100_000,
    ],
)
def test_anything_else_is_a_failure_and_not_a_zero(text):
    with pytest.raises(RewardError):
        score_in(text)


def test_the_score_is_mapped_from_its_scale_to_0_and_1():
    assert judged(chat_answer("score: 7"))[0] == pytest.approx(0.7)
    assert judged(chat_answer("score: 0"), scale=[-1, 1])[0] == 0.5


def test_the_request_holds_the_template_with_prompt_completion_and_payload_in_place():
    template = 'Q: {prompt} A: {completion} Right: {answer}. Answer {"score": x}, not {}.'
    _, asked = judged(chat_answer("score: 1"), template=template, options={"temperature": 0.5})
    content = 'Q: What is 6x7? A: It is {answer}, score: 10 Right: 42. Answer {"score": x}, not {}.'
    body = {"model": "judge", "messages": [{"role": "user", "content": content}], "temperature": 0.5}
    assert asked == [("/chat/completions", body)]


def test_the_template_that_is_used_without_one_shows_both_and_asks_for_the_form_that_is_read():
    _, asked = judged(chat_answer("score: 1"))
    content = asked[0][1]["messages"][0]["content"]
    assert SAMPLE.prompt in content and SAMPLE.completion in content
    assert score_in(content) == 7.0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (chat_answer("score: 11"), "outside of its scale, 0 to 10"),
        (chat_answer("score: 7", finish_reason="length"), "ended by 'length'"),
        (chat_answer("score: 7", finish_reason="content_filter"), "ended by 'content_filter'"),
        (chat_answer(None, message={"refusal": "I will not."}), "refused: 'I will not.'"),
        (chat_answer("score: 7", message={"refusal": "No."}), "refused"),
        (chat_answer(None), "has no text"),
        (chat_answer([{"type": "text"}]), "has no text"),
        ({"choices": []}, "no chat completion"),
        ({"error": "busy"}, "no chat completion"),
        ([1], "no chat completion"),
        (None, "no chat completion"),
        ({"choices": [{"message": "text"}]}, "no chat completion"),
    ],
)
def test_an_answer_without_a_usable_score_is_a_failure(answer, says):
    with pytest.raises(RewardError, match=says):
        judged(answer)


def test_a_name_in_the_template_that_the_payload_lacks_is_a_failure_that_says_what_there_is():
    with pytest.raises(RewardError, match=r"\{reference\}.*answer, completion, prompt"):
        judged(chat_answer("score: 1"), template="{completion} {reference}")
