"""A small HTTP server that answers as a test says, rudely where it is told to."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, CUT, RESET, TRICKLE = "hang", "cut", "reset", "trickle"  # in place of an answer's body


class Answers:
    """What a server is asked (`requests`, `headers`), and what it answers: `answer(number, body)` -> (status, body)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[Any, ...]]):
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_a_time = self.most_at_a_time = 0
        self.over = threading.Event()
        self.lock = threading.Lock()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, a burst of connections may find some of them reset


class AnsweringServer:
    """Serves `answers` on a free port of 127.0.0.1, or on `port`, until `close`."""

    def __init__(self, answers: Answers, port: int = 0):
        self.answers = answers
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"answers": answers}))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.answers.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    answers: Answers

    def do_POST(self):
        answers = self.answers
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with answers.lock:
            number = len(answers.requests)
            answers.requests.append({"path": self.path, **body})
            answers.headers.append(dict(self.headers))
            answers.at_a_time += 1
            answers.most_at_a_time = max(answers.most_at_a_time, answers.at_a_time)
        try:
            status, content, *headers = answers.answer(number, body)
        finally:
            with answers.lock:
                answers.at_a_time -= 1
        self._send(status, content, dict(*headers))

    def _send(self, status, content, headers):
        if content == HANG:
            self.answers.over.wait(60)
            return
        if content == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", "1000000" if content in (CUT, TRICKLE) else str(len(text)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if content == TRICKLE:
            while not self.answers.over.wait(0.02):
                self.wfile.write(b" ")
                self.wfile.flush()
        else:
            self.wfile.write(text)

    def log_message(self, format, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError, OSError):
            self.close_connection = True


def chat_answer(text: str | None, **choice: Any) -> dict[str, Any]:
    """A chat completion as OpenAI's protocol has it."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
    }
