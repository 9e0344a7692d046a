"""`asyncrl watch RUN`: the report of a run that goes on, at a loopback address, kept up to date while it is looked at.

The page is made here, between readers, and the server hands out what is ready: a reader waits for nobody. What the
metrics file got is read from where the last reading ended.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from asyncrl.errors import BindError
from asyncrl.metrics.http_server import HttpAnswer, HttpRequest, HttpServer
from asyncrl.report.page.document import content_of, page
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summarize

LOOPBACK = "127.0.0.1"
TURN_S = 1.0  # between two looks at the file
LOOKED_AT_S = 30.0  # a page that nobody asked for in so long is not made anew
WORK_SHARE = 0.1  # of one core, at most, for making pages: the run needs it more


@dataclass(frozen=True, slots=True)
class ReadyPage:
    """The newest page, as it is handed out. tag: names it, so that nobody is sent what he has."""

    whole: bytes
    main: bytes
    tag: str


class Watch:
    """One run, watched."""

    def __init__(self, run_dir: str | Path, port: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the run and serves its page. port: 0 takes a free one.

        Raises UserError when run_dir is no run, BindError when the port cannot be had.
        """
        self._clock = clock
        self._run = RunRecords(run_dir, follow=True)
        self._number = 0
        self._asked_at = clock()
        self._rest_until = clock()
        self._ready = self._make()
        self._server = HttpServer(_listening(port), {"/": self._whole, "/main": self._main}, only_local_names=True)
        self._server.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"{self._server.url}/"

    def turn(self) -> bool:
        """Makes the page anew if there is news and somebody looks; says whether it did."""
        now = self._clock()
        if now < self._rest_until or now - self._asked_at > LOOKED_AT_S or not self._run.read_on():
            return False
        self._ready = self._make()
        return True

    def serve(self, stop_fd: int) -> None:
        """Turns until `stop_fd` can be read."""
        while not select.select([stop_fd], [], [], TURN_S)[0]:
            self.turn()

    def close(self) -> None:
        """Ends the server."""
        self._server.close()

    def _make(self) -> ReadyPage:
        began = self._clock()
        content = content_of(self._run, summarize(self._run))
        self._number += 1
        ready = ReadyPage(page(content, live=True).encode(), content.main.encode(), f'"{os.getpid()}-{self._number}"')
        now = self._clock()
        self._rest_until = now + (now - began) / WORK_SHARE
        return ready

    # -- in the server's thread ------------------------------------------------------------------------------------

    def _whole(self, request: HttpRequest) -> HttpAnswer:
        self._asked_at = self._clock()
        return HttpAnswer(HTTPStatus.OK, "text/html; charset=utf-8", self._ready.whole)

    def _main(self, request: HttpRequest) -> HttpAnswer:
        self._asked_at = self._clock()
        ready = self._ready  # one assignment by the other thread: never half a page
        headers = {"ETag": ready.tag}
        if request.headers.get("if-none-match") == ready.tag:
            return HttpAnswer(HTTPStatus.NOT_MODIFIED, "text/html; charset=utf-8", headers=headers)
        return HttpAnswer(HTTPStatus.OK, "text/html; charset=utf-8", ready.main, headers)


def _listening(port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise BindError(f"--port {port}: give a number from 1 to 65535, or 0 for any free port")
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise BindError(f"--port {port} cannot be had on {LOOPBACK} ({why}); give a free one, or none") from error
