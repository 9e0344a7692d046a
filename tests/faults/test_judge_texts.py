"""What goes to a judge, and what of its answers goes into logs and messages."""

import asyncio
import json

import numpy as np
import pytest

from asyncrl.errors import ConfigError, DeadlineExceeded, RewardError
from asyncrl.link import codec
from asyncrl.link.rollouts import grant_to_lease, lease_to_grant
from asyncrl.rewards.base import Sample
from asyncrl.rewards.parts import RewardParts, make_parts, prepare_parts
from asyncrl.rewards.pool import RewardPool
from asyncrl.rewards.secret_texts import redacted
from asyncrl.tasks.pipe import PromptMade, decode_from_helper, encode
from asyncrl.tasks.rendering import last_user_text
from asyncrl.types import Lease, LeaseKey, LeaseKind
from tests.http_servers import AnsweringServer, Answers, chat_answer

KEY = "sk-proj-Ab3/dE+fgh_IJKLmnop-0123456789"


class Own:
    def reward(self, completion, payload):
        return {"exact": 1.0}


@pytest.fixture
def judge_that_says(monkeypatch):
    """Makes a server that answers so, and the part that asks it."""
    monkeypatch.setenv("KEY_OF_THE_JUDGE", KEY)
    servers = []

    def make(status, content, **arguments):
        answers = Answers(lambda number, body: (status, content))
        servers.append(AnsweringServer(answers))
        judge = {"kind": "judge", "url": servers[-1].url, "model": "m", "retries": 0, "api_key_env": "KEY_OF_THE_JUDGE"}
        return answers, {"judge": judge | arguments}

    yield make
    for server in servers:
        server.close()


def shows_the_key(text):
    return any(KEY[start : start + 8] in text for start in range(len(KEY) - 7))


BODIES = {
    "whole": {"error": {"message": f"Incorrect API key provided: {KEY}."}},
    "header": {"error": f"bad header Authorization: Bearer {KEY}"},
    "beginning": {"error": f"Incorrect API key provided: {KEY[:24]}..."},
    "end": {"error": f"no such key: ***{KEY[-14:]}"},
    "cut": {"error": "x" * 170 + KEY},
    "echo": {"headers": {"authorization": f"Bearer {KEY}", "host": "x"}},
    "plain": f"denied for {KEY}\n".encode(),
}


@pytest.mark.parametrize("status", [200, 401, 429, 500])
@pytest.mark.parametrize("name", BODIES)
def test_R14_a_key_in_a_judges_answer_goes_nowhere(name, status, judge_that_says):
    answers, parts = judge_that_says(status, BODIES[name])
    (compute,) = RewardParts(Own(), make_parts(parts), {}).begin([Sample("c", {})])
    with pytest.raises((RewardError, DeadlineExceeded)) as caught:
        compute()
    assert answers.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert not shows_the_key(str(caught.value))
    assert status != 401 or "[key]" in str(caught.value)


@pytest.mark.parametrize("content", [f"the key is {KEY}", f'{{"score": "{KEY}"}}', f"score: {KEY}"])
def test_R14_nor_does_one_in_what_the_judge_wrote(content, judge_that_says, caplog):
    _, parts = judge_that_says(200, chat_answer(content))

    async def run():
        pool = RewardPool("asyncrl.tasks.arithmetic:Arithmetic", {}, 1, 20.0, parts=parts)
        try:
            await pool.start()
            return await pool.score(["105"], {"answer": "105"})
        finally:
            await pool.close()

    (outcome,) = asyncio.run(run())
    assert outcome.failed and "judge: " in outcome.detail
    assert not shows_the_key(outcome.detail + caplog.text)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdefghij",
        "authorization=Basic dXNlcjpwYXNz",
        json.dumps({"Authorization": "Bearer abcdefghij"}),
        "got 'Bearer abcdefghij' instead",
        '{"api_key": "abcdefghij"}',
        "x-api-key: abcdefghij",
    ],
)
def test_R14_authorization_values_of_any_key_are_left_out(text):
    shown = redacted(text, [])
    assert "[key]" in shown and "abcdefghij" not in shown and "dXNlcjpwYXNz" not in shown


def test_R14_other_words_of_a_server_stay():
    text = "HTTP 500: model m is overloaded; basic auth is off; try a bearer token"
    assert redacted(text, [KEY, ""]) == text


@pytest.mark.parametrize("key", ["two words", "line\n", "tab\tkey", "schlüssel", "nul\x7f"])
def test_R14_a_key_that_no_header_can_carry_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_JUDGE", key)
    part = {"kind": "judge", "url": "http://127.0.0.1:1", "model": "m", "api_key_env": "KEY_OF_THE_JUDGE"}
    (problem,) = prepare_parts(make_parts({"judge": part}))
    assert "KEY_OF_THE_JUDGE" in problem and key not in problem
    with pytest.raises(ConfigError):
        make_parts({"judge": part})["judge"].api_key()


MESSAGES = [
    {"role": "system", "content": "Answer with a number."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And {twice} that?"},
]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (MESSAGES, "And {twice} that?"),
        (MESSAGES[:2], "What is 1 + 1?"),
        (MESSAGES[:1], "Answer with a number."),
        ([*MESSAGES[:2], {"role": "tool", "content": "42"}], "What is 1 + 1?"),
        ("plain text: 1 + 1 =", ""),
    ],
)
def test_U12_the_prompt_of_chat_messages_is_what_the_user_says_last(prompt, expected):
    assert last_user_text(prompt) == expected


@pytest.mark.parametrize("user_text", ["And {twice} that?", ""])
def test_U12_the_users_words_travel_from_the_example_to_the_lease(user_text):
    lease = Lease(
        LeaseKey(LeaseKind.TRAIN, 0, 0), 0, 9.0, np.array([1, 2], np.int32), {}, 2, 4, 1.0, user_text=user_text
    )  # fmt: skip
    grant = codec.decode(codec.encode(lease_to_grant(lease, 1), max_bytes=10_000), max_bytes=10_000)
    assert grant_to_lease(grant).user_text == user_text
    made = PromptMade(0, 0, token_ids=lease.prompt_token_ids.tobytes(), user_text=user_text)
    assert decode_from_helper(encode(made)).made().user_text == user_text


def test_U12_a_judge_sees_the_prompt_as_written_and_on_request_as_rendered(judge_that_says):
    template = "Q: {prompt} | {rendered_prompt} | A: {completion}"
    answers, parts = judge_that_says(200, chat_answer("score: 10"), template=template)

    async def run():
        pool = RewardPool("asyncrl.tasks.arithmetic:Arithmetic", {}, 1, 20.0, parts=parts)
        try:
            await pool.start()
            rendered = "user\nAnd {twice} that?\nassistant\n"
            first = await pool.score(["4"], {"answer": "4"}, "And {twice} that?", [1], rendered_prompt=rendered)
            return first + await pool.score(["4"], {"answer": "4"}, "2 + 2 = ", [1])
        finally:
            await pool.close()

    assert [outcome.parts["judge"] for outcome in asyncio.run(run())] == [1.0, 1.0]
    assert [request["messages"][0]["content"] for request in answers.requests] == [
        "Q: And {twice} that? | user\nAnd {twice} that?\nassistant\n | A: 4",
        "Q: 2 + 2 =  | 2 + 2 =  | A: 4",
    ]
