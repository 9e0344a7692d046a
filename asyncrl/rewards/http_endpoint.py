"""JSON over HTTP with deadlines, retries and a bound on what is under way, and a thread with an event loop for it.

Every request has one deadline that covers all of it: a server that sends a byte a second cannot outlast it, as it would
outlast the read timeouts of HTTP clients.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from asyncrl.errors import DeadlineExceeded, RewardError
from asyncrl.host.addresses import is_loopback
from asyncrl.rewards.base import ServerUnavailable
from asyncrl.rewards.leftovers import is_full
from asyncrl.rewards.secret_texts import redacted

if TYPE_CHECKING:
    import httpx

MAX_ANSWER_BYTES = 2**20
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 8.0
RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})


class _TryAgainError(Exception):
    """A failure that may pass. `pause_s` is the pause the server asked for; `timed_out` says that no answer came."""

    def __init__(self, detail: str, pause_s: float = 0.0, timed_out: bool = False):
        super().__init__(detail)
        self.pause_s = pause_s
        self.timed_out = timed_out


class HttpEndpoint:
    """One server, used from one event loop. Of concurrent calls of `post`, `concurrency` are under way at a time.

    timeout_s bounds each try, and timeout_s x (retries + 1) all tries of a call with the pauses in between; the wait
    for its turn is not counted. The key goes into the Authorization header and nowhere else: what a server says is
    repeated in messages without it.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, concurrency: int, api_key: str = ""):
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._tries = retries + 1
        self._concurrency = concurrency
        self._key = api_key
        self._headers = {"Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._turns = asyncio.Semaphore(concurrency)
        self._client: httpx.AsyncClient | None = None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded answer.

        Raises RewardError when the answer cannot be used, ServerUnavailable when there was none after all retries,
        DeadlineExceeded when the server took too long.
        """
        address = self.url + path
        async with self._turns:
            failures: list[_TryAgainError] = []
            try:
                async with asyncio.timeout(self._timeout_s * self._tries):
                    return await self._retrying(address, body, failures)
            except TimeoutError:
                last = f"; before that: {failures[-1]}" if failures else ""
                raise DeadlineExceeded(
                    f"{address}: no answer within {self._timeout_s:g} s x {self._tries} tries{last}"
                ) from None

    async def _retrying(self, address: str, body: dict[str, Any], failures: list[_TryAgainError]) -> Any:
        while True:
            try:
                return await self._once(address, body)
            except _TryAgainError as failure:
                failures.append(failure)
            if len(failures) == self._tries:
                break
            # Jitter, so that requests that failed together do not come back together.
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (len(failures) - 1)) * random.uniform(0.5, 1.0)
            await asyncio.sleep(max(pause_s, failures[-1].pause_s))
        kind = DeadlineExceeded if failures[-1].timed_out else ServerUnavailable
        raise kind(f"{address}: {failures[-1]} (tried {len(failures)} times)")

    async def _once(self, address: str, body: dict[str, Any]) -> Any:
        import httpx

        try:
            async with asyncio.timeout(self._timeout_s):
                status, headers, text = await self._exchange(address, body)
        except TimeoutError:
            raise _TryAgainError(f"no answer within {self._timeout_s:g} s", timed_out=True) from None
        except httpx.TransportError as error:
            if is_full(error):  # this process has no file descriptor left: that says nothing about the server
                raise
            raise _TryAgainError(redacted(f"{type(error).__name__}: {error}", [self._key])) from None
        if status in RETRIED_STATUSES:
            raise _TryAgainError(
                f"HTTP {status}: {self._excerpt(text)}", _retry_after_s(headers.get("retry-after", ""))
            )
        if status != 200:
            raise RewardError(f"{address}: HTTP {status}: {self._excerpt(text)}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{address}: the answer is no JSON ({error}): {self._excerpt(text)}") from None

    async def _exchange(self, address: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and at most MAX_ANSWER_BYTES of body."""
        text = bytearray()
        async with self._connected().stream("POST", address, json=body) as response:
            async for chunk in response.aiter_bytes():
                text += chunk
                if len(text) > MAX_ANSWER_BYTES:
                    raise RewardError(f"{address}: an answer of more than {MAX_ANSWER_BYTES} bytes")
        return response.status_code, response.headers, bytes(text)

    def _excerpt(self, text: bytes) -> str:
        return " ".join(redacted(text[:2000].decode(errors="replace"), [self._key]).split())[:200]

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            import httpx

            self._client = httpx.AsyncClient(
                headers=self._headers,
                timeout=None,  # the deadlines above bound the whole exchange
                limits=httpx.Limits(max_connections=self._concurrency),
                # A proxy of the environment is for the world outside; it cannot reach this machine's loopback.
                trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
            )
        return self._client


def _retry_after_s(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0


class LoopThread:
    """An event loop in a thread of its own, which ends with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="reward-requests", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, float]) -> concurrent.futures.Future[float]:
        """Starts the work; its result, or what it raised, is in the future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)
