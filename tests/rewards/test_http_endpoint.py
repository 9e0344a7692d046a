"""Requests against a real server that is late, broken, rude or busy."""

import asyncio
import socket
import time

import pytest

from asyncrl.errors import DeadlineExceeded, RewardError
from asyncrl.rewards.http_endpoint import HttpEndpoint
from tests.http_servers import CUT, HANG, RESET, TRICKLE, AnsweringServer, Answers
from tests.waits import LATE_S

SETTINGS = {"timeout_s": 5.0, "retries": 2, "concurrency": 4}
OK = {"ok": True}


@pytest.fixture
def serve():
    servers = []

    def start(*scripted):
        """Answers in turn; the last one is repeated."""
        servers.append(AnsweringServer(Answers(lambda number, body: scripted[min(number, len(scripted) - 1)])))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def post(server, **settings):
    async def ask():
        endpoint = HttpEndpoint(server.url, **SETTINGS | settings)
        return await endpoint.post("/ask", {"question": "?"})

    return asyncio.run(ask())


def test_an_answer_comes_back_decoded_and_the_key_goes_into_the_header_alone(serve):
    server = serve((200, OK))
    assert post(server, api_key="secret") == OK
    assert server.answers.requests == [{"path": "/ask", "question": "?"}]
    assert server.answers.headers[0]["Authorization"] == "Bearer secret"


def test_without_a_key_nothing_is_sent_in_its_place(serve):
    server = serve((200, OK))
    post(server)
    assert "Authorization" not in server.answers.headers[0]


@pytest.mark.parametrize("passing", [(429, {}), (500, {}), (503, {}), (408, {}), (200, RESET), (200, CUT)])
def test_what_may_pass_is_tried_again(serve, passing):
    server = serve(passing, passing, (200, OK))
    assert post(server) == OK
    assert len(server.answers.requests) == 3


def test_a_server_that_says_when_to_come_back_is_heard(serve):
    server = serve((429, {}, {"Retry-After": "1"}), (200, OK))
    started = time.monotonic()
    assert post(server) == OK
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize(
    ("answer", "tries", "says"),
    [
        ((500, {"error": "no memory"}), 3, "HTTP 500: .*no memory.*tried 3 times"),
        ((200, RESET), 3, "tried 3 times"),
        ((200, CUT), 3, "tried 3 times"),
        ((400, {"error": "too long"}), 1, "HTTP 400: .*too long"),
        ((401, {}), 1, "HTTP 401"),
        ((302, {}), 1, "HTTP 302"),
        ((200, b"<html>not this</html>"), 1, "no JSON .*not this"),
        ((200, b"[" * 100_000), 1, "no JSON"),
        ((200, b"1" * (2**20 + 1)), 1, "more than 1048576 bytes"),
    ],
)
def test_what_does_not_pass_is_an_error_that_names_it(serve, answer, tries, says):
    server = serve(answer)
    with pytest.raises(RewardError, match=says):
        post(server)
    assert len(server.answers.requests) == tries


@pytest.mark.parametrize("late", [HANG, TRICKLE])
def test_a_server_that_hangs_or_sends_a_byte_now_and_then_is_left_at_the_deadline(serve, late):
    server = serve((200, late))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="no answer within 0.3 s"):
        post(server, timeout_s=0.3, retries=1)
    assert 0.3 <= time.monotonic() - started < 0.3 + LATE_S


def test_pauses_between_tries_do_not_lengthen_the_deadline(serve):
    server = serve((429, {}, {"Retry-After": "3600"}))
    with pytest.raises(DeadlineExceeded, match="before that: HTTP 429"):
        post(server, timeout_s=1.0, retries=1)


def test_a_hang_that_passes_is_tried_again(serve):
    server = serve((200, HANG), (200, OK))
    assert post(server, timeout_s=2.0) == OK


def test_nobody_there_is_an_error_and_no_traceback_of_a_library():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(RewardError, match="ConnectError.*tried 3 times"):
        asyncio.run(HttpEndpoint(url, **SETTINGS).post("/ask", {}))


def test_no_more_requests_are_under_way_than_allowed():
    async def many(endpoint):
        return await asyncio.gather(*(endpoint.post("/ask", {}) for _ in range(24)))

    def slow(number, body):
        answers.over.wait(0.02)
        return 200, OK

    answers = Answers(slow)
    server = AnsweringServer(answers)
    try:
        assert asyncio.run(many(HttpEndpoint(server.url, **SETTINGS))) == [OK] * 24
    finally:
        server.close()
    assert 2 <= answers.most_at_a_time <= SETTINGS["concurrency"]
