"""A judge as a process of its own, for tests that kill it: `python judge_server.py PORT`.

Every answer is `score: 5`, except for requests that hold a word below. Port 0 is a free one, printed on stdout.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from tests.http_servers import CUT, HANG, AnsweringServer, Answers, chat_answer

DIES = "DIES"
SAID = {
    "GARBAGE": (200, chat_answer("as an AI I like all answers")),
    "REFUSES": (200, chat_answer(None, message={"refusal": "no"})),
    "HANGS": (200, HANG),
    "BROKEN": (500, {"error": "out of memory"}),
    "CUT": (200, CUT),
    "TRUNCATED": (200, chat_answer("score: 5", finish_reason="length")),
    "NOT_FINITE": (200, chat_answer('{"score": NaN}')),
}


def answer(number: int, body: dict) -> tuple:
    text = body["messages"][0]["content"]
    if DIES in text:
        os._exit(1)
    return next((said for word, said in SAID.items() if word in text), (200, chat_answer("score: 5")))


if __name__ == "__main__":
    print(AnsweringServer(Answers(answer), int(sys.argv[1])).port, flush=True)
    threading.Event().wait()
