"""A small HTTP server in a thread of its own: GET and HEAD, one request for each connection, a deadline on each.

Whoever serves pages only hands out what is there; a reader has CLIENT_TIMEOUT_S for the whole exchange, and when there
are too many, the one that is there longest goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

CLIENT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
MAX_CLIENTS = 16
MAX_REQUEST_BYTES = 8192


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What a reader asked: its path, without what follows a question mark, and its headers by lower-case names."""

    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What it gets. A page must have it ready, or made in a moment: all others wait meanwhile."""

    status: HTTPStatus
    kind: str  # the content type
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[HttpRequest], HttpAnswer]


def text_answer(status: HTTPStatus, text: str) -> HttpAnswer:
    """A sentence as an answer."""
    return HttpAnswer(status, "text/plain", f"{text}\n".encode())


class HttpServer:
    """Serves pages at one address until `close`."""

    def __init__(self, listening: socket.socket, pages: Mapping[str, Page], *, only_local_names: bool = False) -> None:
        """listening: a bound socket, which this closes. pages: by path.

        only_local_names: requests must name this host as an address or as localhost. A page of some other site that
        has its own name point at 127.0.0.1 could else read the pages from a browser here (DNS rebinding).
        """
        self.address: tuple[str, int] = listening.getsockname()[:2]
        self._socket = listening
        self._pages = pages
        self._only_local_names = only_local_names
        self.clients: dict[asyncio.StreamWriter, None] = {}  # the one that is there longest first
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        # A daemon thread: a process that ends without `close` does not wait for readers.
        self.thread = threading.Thread(target=self._run, name="http pages", daemon=True)

    @property
    def url(self) -> str:
        """Where the pages are, without their names."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Begins to serve."""
        self.thread.start()

    def close(self) -> None:
        """Ends the thread; readers that are at it are cut off."""
        with contextlib.suppress(RuntimeError):  # the loop ended by itself
            self._loop.call_soon_threadsafe(self._stop.set)
        self.thread.join(CLOSE_TIMEOUT_S)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._client, sock=self._socket, limit=MAX_REQUEST_BYTES)
        await self._stop.wait()
        server.close()
        for writer in list(self.clients):
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self.clients) >= MAX_CLIENTS:
            next(iter(self.clients)).transport.abort()
        self.clients[writer] = None
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the reader left, dawdled or sent no request; it has no answer to expect
        finally:
            self.clients.pop(writer, None)
            writer.transport.abort()

    def _answer(self, request: bytes) -> bytes:
        first, *rest = request.decode("latin-1").split("\r\n")
        method, _, target = first.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        page = self._pages.get(path)
        if method not in ("GET", "HEAD"):
            answer = text_answer(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD")
        elif self._only_local_names and not is_local_name(headers.get("host", "")):
            answer = text_answer(HTTPStatus.FORBIDDEN, f"ask for {self.url}, not for another name of this host")
        elif page is None:
            answer = text_answer(HTTPStatus.NOT_FOUND, f"there are {' and '.join(self._pages)}")
        else:
            answer = page(HttpRequest(path, headers))
        more = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        head = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\nContent-Type: {answer.kind}\r\n"
            f"Content-Length: {len(answer.body)}\r\nCache-Control: no-store\r\n{more}Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else answer.body)


def is_local_name(host: str) -> bool:
    """Whether a Host header is localhost or a loopback address, whatever the port: a name that no site can own."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
