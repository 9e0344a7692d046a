"""Rewards in processes that can be killed: foreign code may raise, hang, exit, fork or fill memory, and costs only
its own rollout.

Threads cannot be stopped and alarms reach only a main thread, hence one process per worker, each in a session of its
own: past the deadline its whole process group gets SIGKILL, and the next job starts a new one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from asyncrl.errors import DeadlineExceeded, ProtocolError, RewardError, TaskError
from asyncrl.host.processes import END_TIMEOUT_S, kill_group
from asyncrl.rewards.gate import ServerGate
from asyncrl.rewards.parts import weighted_sum
from asyncrl.rewards.servers import RewardModels
from asyncrl.rewards.worker import LENGTH

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
MAX_RESULT_BYTES = 1024 * 1024
START_TIMEOUT_S = 60.0  # importing a task may pull in large libraries
BREAKER_WINDOW = 500  # completions the timeout share is taken over
DEFAULT_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class RewardOutcome:
    """One completion's reward, or why there is none: a failure is a state, never a number."""

    parts: dict[str, float] | None  # None when failed
    reason: str = ""  # "reward_error" or "reward_timeout" when failed
    detail: str = ""
    server_down: bool = False  # the server of a part did not answer, which says nothing about the completion
    weights: Mapping[str, float] = field(default_factory=dict)  # 1 for a part that is not in it

    @property
    def failed(self) -> bool:
        return self.parts is None

    @property
    def reward(self) -> float:
        """Weighted sum of the parts. Raises RewardError when there are none."""
        if self.parts is None:
            raise RewardError(f"{self.reason}: {self.detail}")
        return weighted_sum(self.parts, self.weights)


class RewardPool:
    """Scores completions with the task at `task_path` in `workers` processes, one job per process at a time.

    timeout_s is the deadline of each single completion. memory_bytes limits the address space of each worker.
    parts and weights are further parts of the reward and what each part counts (`rewards.parts`); servers of
    reward models that are given by their folder live as long as the pool.
    """

    def __init__(
        self,
        task_path: str,
        task_args: dict[str, Any],
        workers: int,
        timeout_s: float,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        *,
        parts: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
        log_prefix: str = "",
    ):
        self._models = RewardModels(parts or {}, log_prefix)
        self._weights = dict(weights or {})
        self._setup = {
            "path": task_path,
            "args": task_args,
            "parts": self._models.parts,
            "weights": self._weights,
            "memory_bytes": memory_bytes,
        }
        self._timeout_s = timeout_s
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers = [_Worker(self._setup) for _ in range(workers)]
        self._gate = ServerGate()
        self._recent_timeouts: deque[bool] = deque(maxlen=BREAKER_WINDOW)
        self.outcomes: Counter[str] = Counter()  # "ok", "reward_error", "reward_timeout"
        self.workers_killed = 0

    async def start(self) -> None:
        """Starts all workers, and before them the servers of reward models.

        Raises TaskError when the task or a part cannot be made, ModelError when a reward model cannot be served,
        DeadlineExceeded when that takes long.
        """
        await self._models.start()
        await asyncio.gather(*(worker.ensure_running() for worker in self._workers))
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """Kills all workers, busy or not, and the servers of reward models. What was being scored fails."""
        await asyncio.gather(self._models.close(), *(worker.close() for worker in self._workers))

    @property
    def timeout_share(self) -> float:
        """Share of the last 500 completions that ran into the deadline: above 0.05, something is wrong."""
        return sum(self._recent_timeouts) / len(self._recent_timeouts) if self._recent_timeouts else 0.0

    async def score(
        self,
        completions: Sequence[str],
        payload: dict[str, Any],
        prompt: str = "",
        num_tokens: Sequence[int] | None = None,
    ) -> list[RewardOutcome]:
        """One outcome per completion, in their order. Takes at most timeout_s per completion and worker start.

        While the server of a part is down it waits for that too (`ServerGate`): give the call a deadline of its own.
        prompt, as text, and num_tokens, of each completion, are for the parts that need them.
        Waits for an idle worker first. Cancelling kills the worker: what it was doing is unknown.
        """
        job = {
            "completions": completions,
            "num_tokens": [None] * len(completions) if num_tokens is None else num_tokens,
            "prompt": prompt,
            "payload": payload,
        }
        worker = await self._idle.get()
        try:
            # In this order: jobs that wait for a worker when a server dies must not be sent after it.
            async with self._gate.passing() as passage:
                outcomes = await self._score_all(worker, job)
                if not all(outcome.failed for outcome in outcomes):
                    passage.answered()
                elif down := [outcome for outcome in outcomes if outcome.server_down]:
                    passage.unanswered(down[0].detail)
        finally:
            self._idle.put_nowait(worker)
        self._count(outcomes)
        return outcomes

    async def _score_all(self, worker: _Worker, job: dict[str, Any]) -> list[RewardOutcome]:
        outcomes: list[RewardOutcome] = []
        try:
            while (done := len(outcomes)) < len(job["completions"]):
                rest = {name: job[name][done:] for name in ("completions", "num_tokens")}
                outcomes += await self._score_on(worker, job | rest)
        except BaseException:
            await worker.kill()
            raise
        return outcomes

    async def _score_on(self, worker: _Worker, job: dict[str, Any]) -> list[RewardOutcome]:
        """Outcomes of the first completions, one at least: all of them, or up to the one that cost the worker."""
        count = len(job["completions"])
        try:
            await worker.ensure_running()
        except (DeadlineExceeded, RewardError, TaskError, ProtocolError) as error:
            return [RewardOutcome(None, "reward_error", f"no reward worker: {error}")] * count
        outcomes: list[RewardOutcome] = []
        try:
            await worker.send(job, self._timeout_s)
            while len(outcomes) < count:
                outcomes += [self._outcome(result) for result in await worker.receive(self._timeout_s)]
            return outcomes
        except DeadlineExceeded as error:
            failure = RewardOutcome(None, "reward_timeout", str(error))
        except (RewardError, ProtocolError) as error:
            failure = RewardOutcome(None, "reward_error", str(error))
        await worker.kill()
        self.workers_killed += 1
        log.warning("reward worker replaced: %s", failure.detail)
        return [*outcomes, failure]

    def _outcome(self, result: object) -> RewardOutcome:
        match result:
            case [dict() as parts, "", "", False]:
                return RewardOutcome(parts, weights=self._weights)
            case [None, "reward_error" | "reward_timeout" as reason, str() as detail, bool() as server_down]:
                return RewardOutcome(None, reason, detail, server_down)
        raise ProtocolError(
            "the reward worker's pipe carries something that is not a result; does the reward write to it?"
        )

    def _count(self, outcomes: list[RewardOutcome]) -> None:
        self.outcomes.update(outcome.reason or "ok" for outcome in outcomes)
        self._recent_timeouts.extend(outcome.reason == "reward_timeout" for outcome in outcomes)


class _Worker:
    """One worker process, or none for the moment. Not for two jobs at once."""

    def __init__(self, setup: dict[str, Any]):
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None
        self._buffer = bytearray()
        self._closed = False

    async def ensure_running(self) -> None:
        if self._closed:
            raise RewardError("the reward workers were closed")
        if self._process is not None and self._process.returncode is None:
            return
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "asyncrl.rewards.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
            if self._closed:
                raise RewardError("the reward workers were closed")
            await self.send(self._setup, START_TIMEOUT_S)
            (answer,) = await self.receive(START_TIMEOUT_S)
            if "error" in answer:
                raise TaskError(answer["error"])
        except BaseException:
            await self.kill()
            raise

    async def close(self) -> None:
        """Ends the worker for good."""
        self._closed = True
        await self.kill()

    async def send(self, message: Any, timeout_s: float) -> None:
        body = msgpack.packb(message)
        process = self._running()
        try:
            process.stdin.write(LENGTH.pack(len(body)) + body)
            async with asyncio.timeout(timeout_s):
                await process.stdin.drain()
        except TimeoutError:
            raise DeadlineExceeded(f"a reward worker took no job for {timeout_s:g} s") from None
        except ConnectionError:
            raise RewardError(await _ending(process)) from None

    async def receive(self, timeout_s: float) -> list[Any]:
        """The results that have come in, one at least, within timeout_s."""
        process = self._running()
        try:
            async with asyncio.timeout(timeout_s):
                while not (messages := self._take_messages()):
                    chunk = await process.stdout.read(READ_BYTES)
                    if not chunk:
                        raise RewardError(await _ending(process))
                    self._buffer += chunk
        except TimeoutError:
            raise DeadlineExceeded(f"no reward within {timeout_s:g} s; its worker was killed") from None
        return messages

    async def kill(self) -> None:
        """Ends the worker and everything in its process group, and waits until it is gone."""
        process, self._process = self._process, None
        self._buffer.clear()
        if process is None:
            return
        process.stdin.close()
        await kill_group(process, "reward worker")

    def _take_messages(self) -> list[Any]:
        """Whole messages in the buffer. Raises ProtocolError for what is none, after those before it were taken."""
        messages, start = [], 0
        while len(self._buffer) - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, start)
            if size > MAX_RESULT_BYTES and messages:
                break
            if size > MAX_RESULT_BYTES:
                raise ProtocolError(f"a result in the pipe has {size} bytes, over the limit of {MAX_RESULT_BYTES}")
            end = start + LENGTH.size + size
            if end > len(self._buffer):
                break
            try:
                messages.append(msgpack.unpackb(self._buffer[start + LENGTH.size : end]))
            except ValueError as error:
                if messages:
                    break
                raise ProtocolError(f"a result of a reward worker cannot be read: {error}") from None
            start = end
        del self._buffer[:start]
        return messages

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RewardError("the reward workers were closed")
        return self._process


async def _ending(process: asyncio.subprocess.Process) -> str:
    """How the process ended, for a message."""
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            code = await process.wait()
    except TimeoutError:
        return "the reward closed its worker's pipes"
    if code < 0:
        return f"the reward's process was ended by {signal.Signals(-code).name}"
    return f"the reward ended its process with exit code {code}"


def _environment() -> dict[str, str]:
    """The worker finds what this process finds, also a task beside the configuration, and starts no thread pools."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
