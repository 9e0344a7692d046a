"""Servers of reward models: started with the generator, started again when they die, ended with it.

The socket that a server listens on is this process's, so its address outlives it: while a server is down, requests
wait in the socket's queue until their own deadline. What a server was scoring when it died fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from asyncrl.errors import DeadlineExceeded, ModelError
from asyncrl.host.processes import child_environment, kill_group
from asyncrl.rewards.kinds.reward_model import RewardModel
from asyncrl.rewards.model_server import READY
from asyncrl.rewards.parts import make_parts

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # a large model from a slow disk
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
CALM_S = 60.0  # after this long without a death, earlier ones count no more
SERVER_ARGUMENTS = ("path", "device", "threads", "batch_size")  # of a part: the server's, and not the requests'


@dataclass(frozen=True, slots=True)
class Probing:
    """How a server that no longer answers is found: probes in a row that go unanswered, and how they are timed."""

    every_s: float = 5.0
    timeout_s: float = 5.0
    max_missed: int = 6


DEFAULT_PROBING = Probing()


class RewardModels:
    """The servers of all parts that give a model's folder. `parts` has their addresses in place of the folders."""

    def __init__(self, parts: Mapping[str, Any], log_prefix: str = "", *, probing: Probing = DEFAULT_PROBING):
        self.parts = dict(parts)
        self._servers: list[RewardModelServer] = []
        for name, part in make_parts(parts).items():
            if isinstance(part, RewardModel) and part.path:
                server = RewardModelServer(name, part, f"{log_prefix}.{name}.log" if log_prefix else "", probing)
                self._servers.append(server)
                kept = {key: value for key, value in asdict(part).items() if key not in SERVER_ARGUMENTS}
                self.parts[name] = {**kept, "kind": part.kind, "url": server.url}

    async def start(self) -> None:
        """Returns when all models are loaded. Raises ModelError or DeadlineExceeded."""
        await asyncio.gather(*(server.start() for server in self._servers))

    async def close(self) -> None:
        """Ends the servers. Idempotent."""
        await asyncio.gather(*(server.close() for server in self._servers))


class RewardModelServer:
    """One server process, and a task that keeps it alive."""

    def __init__(self, name: str, part: RewardModel, log_path: str, probing: Probing):
        self._name = name
        self._part = part
        self._log_path = log_path
        self._probing = probing
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server that is up or coming up; None between two of them."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Loads the model, and from then on keeps it there. Raises ModelError or DeadlineExceeded."""
        try:
            await self._launch()
        except BaseException:  # cancelled, too: a server that nobody keeps must not stay
            await self._kill()
            raise
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends the server for good. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._kill()
        self._listening.close()

    async def _launch(self) -> None:
        started = time.monotonic()
        fd = self._listening.fileno()
        options = {
            "fd": fd,
            "device": self._part.device,
            "threads": self._part.threads,
            "batch-size": self._part.batch_size,
        }
        with self._log_file() as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "asyncrl.rewards.model_server",
                self._part.path,
                *(f"--{name}={value}" for name, value in options.items()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env=child_environment(self._part.threads),
                pass_fds=[fd],
                start_new_session=True,  # Ctrl-C is for the daemon, which ends the server when its rewards are in
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await self._process.stdout.readline()
                if line != READY:
                    code = await self._process.wait()
                    raise ModelError(f"{self._place}: its server ended with exit code {code}: {self._last_words()}")
        except TimeoutError:
            raise DeadlineExceeded(f"{self._place}: its server was not ready within {START_TIMEOUT_S:g} s") from None
        log.info("reward model %s is at %s after %.1f s", self._name, self.url, time.monotonic() - started)

    async def _keep(self) -> None:
        """Starts the server again whenever it is gone, with growing pauses."""
        pause_s = FIRST_PAUSE_S
        up_since = time.monotonic()
        while True:
            why = await self._until_bad()
            await self._kill()
            if time.monotonic() - up_since > CALM_S:
                pause_s = FIRST_PAUSE_S
            log.error("reward model %s %s; starting it again in %g s", self._name, why, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
            up_since = time.monotonic()
            if (error := await self._try_to_launch()) is not None:
                log.error("reward model %s does not start: %s", self._name, error)

    async def _try_to_launch(self) -> Exception | None:
        """Starts the server; returns what kept it from starting, None when it is up."""
        try:
            await self._launch()
        except (ModelError, DeadlineExceeded, OSError) as error:
            return error
        return None

    async def _until_bad(self) -> str:
        """Returns when the server has ended, or has not answered for a while; says which."""
        missed = 0
        process = self._process
        while process is not None and missed < self._probing.max_missed:
            try:
                async with asyncio.timeout(self._probing.every_s):
                    code = await process.wait()
                return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
            except TimeoutError:
                missed = 0 if await self._answers() else missed + 1
        return "is not running" if process is None else f"did not answer {missed} probes"

    async def _answers(self) -> bool:
        """Whether `/health` is 200."""
        writer = None
        try:
            async with asyncio.timeout(self._probing.timeout_s):
                reader, writer = await asyncio.open_connection(*self._listening.getsockname())
                writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                return b" 200 " in await reader.readline()
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.close()

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await kill_group(process, "reward model server")

    @property
    def _place(self) -> str:
        return f"reward.parts.{self._name}.path={self._part.path}"

    def _log_file(self) -> contextlib.AbstractContextManager[IO[bytes] | None]:
        return open(self._log_path, "ab") if self._log_path else contextlib.nullcontext()

    def _last_words(self) -> str:
        if not self._log_path:
            return "the reason is above"
        lines = Path(self._log_path).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it said nothing'} (log: {self._log_path})"
