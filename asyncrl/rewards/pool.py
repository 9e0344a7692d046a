"""The reward pool: rewards in processes that can be killed.

Foreign code may raise, hang, exit, fork or fill memory, and costs only its own rollout. Threads cannot be stopped and
alarms reach only a main thread, hence one process per worker, each in a session of its own: past the deadline its whole
process group gets SIGKILL, and the next job starts a new one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from asyncrl.errors import DeadlineExceeded, ProtocolError, RewardError, TaskError
from asyncrl.host.guarded_process import foreign_environment, how_it_ended
from asyncrl.host.pipes import FrameBuffer, framed
from asyncrl.host.processes import END_TIMEOUT_S, kill_group
from asyncrl.rewards.gate import ServerGate
from asyncrl.rewards.pipe import (
    MAX_FRAME_BYTES,
    PipeMessage,
    RewardJob,
    Scored,
    WorkerSetup,
    decode_scored,
    decode_started,
    encode,
)
from asyncrl.rewards.servers import RewardModels
from asyncrl.types import reward_problem, weighted_sum

log = logging.getLogger(__name__)

_T = TypeVar("_T")

READ_BYTES = 64 * 1024
START_TIMEOUT_S = 60.0  # importing a task may pull in large libraries
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
        """Whether there is no reward."""
        return self.parts is None

    @property
    def reward(self) -> float:
        """Weighted sum of the parts. Raises RewardError when there are none."""
        if self.parts is None:
            raise RewardError(f"{self.reason}: {self.detail}")
        return weighted_sum(self.parts, self.weights)


class RewardPool:
    """Scores completions with the task at `task_path` in `workers` processes, one job per process at a time.

    timeout_s is the deadline of each single completion. memory_bytes is how much memory a worker can fill. parts and
    weights are further parts of the reward and what each part counts (`rewards.parts`); servers of reward models that
    are given by their folder live as long as the pool, and log to `log_prefix`.NAME.log. gate holds jobs back while a
    server is down.
    """

    def __init__(
        self,
        task_path: str,
        task_args: Mapping[str, Any],
        workers: int,
        timeout_s: float,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        *,
        parts: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
        log_prefix: str = "",
        gate: ServerGate | None = None,
    ):
        self._models = RewardModels(parts or {}, log_prefix)
        self._weights = dict(weights or {})
        setup = WorkerSetup(task_path, task_args, self._models.parts, self._weights, memory_bytes)
        self._timeout_s = timeout_s
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._gate = gate or ServerGate()

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

    async def score(
        self,
        completions: Sequence[str],
        payload: dict[str, Any],
        prompt: str = "",
        num_tokens: Sequence[int] | None = None,
        *,
        rendered_prompt: str = "",
    ) -> list[RewardOutcome]:
        """One outcome per completion, in their order.

        prompt, as text, and num_tokens, of each completion, are for the parts that need them. rendered_prompt is the
        text that the model was given, where that is another: chat messages in the model's template.

        It waits for an idle worker, and while the server of a part is down for that too (`ServerGate`): give the call a
        deadline of its own. From then on it takes at most timeout_s per completion and worker start, twice for one that
        found its worker full. Cancelling it kills the worker, because nobody knows what that was doing.
        """
        tokens = [None] * len(completions) if num_tokens is None else list(num_tokens)
        job = RewardJob(list(completions), tokens, prompt, payload, rendered_prompt or prompt)
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
        return outcomes

    async def _score_all(self, worker: _Worker, job: RewardJob) -> list[RewardOutcome]:
        outcomes: list[RewardOutcome] = []
        try:
            while (done := len(outcomes)) < len(job.completions):
                outcomes += await self._score_on(worker, job.without_first(done))
        except BaseException:  # cancelled, as a rule
            await worker.kill()
            raise
        return outcomes

    async def _score_on(self, worker: _Worker, job: RewardJob) -> list[RewardOutcome]:
        """Outcomes of the first completions: all of them, or up to the one that cost the worker.

        One that found a used worker full is not among them: it is the first that a new worker gets, and then it counts.
        """
        count = len(job.completions)
        try:
            await worker.ensure_running()
        except (DeadlineExceeded, RewardError, TaskError, ProtocolError) as error:
            return [RewardOutcome(None, "reward_error", f"no reward worker: {error}")] * count
        outcomes: list[RewardOutcome] = []
        try:
            await worker.send(job, self._timeout_s)
            while len(outcomes) < count:
                for scored in await worker.receive(decode_scored, self._timeout_s):
                    was_new = worker.note_scored()
                    if scored.worker_full:
                        await worker.kill()
                        log.warning("reward worker replaced, it was full: %s", scored.detail)
                        return [*outcomes, self._outcome(scored)] if was_new else outcomes
                    outcomes.append(self._outcome(scored))
        except DeadlineExceeded as error:
            failure = RewardOutcome(None, "reward_timeout", str(error))
        except (RewardError, ProtocolError) as error:
            failure = RewardOutcome(None, "reward_error", str(error))
        else:
            return outcomes
        await worker.kill()
        log.warning("reward worker replaced: %s", failure.detail)
        return [*outcomes, failure]

    def _outcome(self, scored: Scored) -> RewardOutcome:
        # What a worker says is not trusted: foreign code runs in there.
        if scored.parts is not None and (problem := reward_problem(weighted_sum(scored.parts, self._weights))):
            return RewardOutcome(None, "reward_error", problem)
        return RewardOutcome(scored.parts, scored.reason, scored.detail, scored.server_down, self._weights)


class _Running:
    """A worker's process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process):
        assert process.stdin is not None and process.stdout is not None, "it is started with both pipes"
        self.process = process
        self.jobs = process.stdin
        self.is_new = True  # it has scored nothing
        self.results = process.stdout


class _Worker:
    """One worker process, or none for the moment. Not for two jobs at once."""

    def __init__(self, setup: WorkerSetup):
        self._setup = setup
        self._running: _Running | None = None
        self._received = FrameBuffer(MAX_FRAME_BYTES)
        self._closed = False

    @property
    def process(self) -> asyncio.subprocess.Process | None:
        """The process, if there is one."""
        return None if self._running is None else self._running.process

    async def ensure_running(self) -> None:
        """Returns once the worker is ready for a job.

        Raises TaskError when the task or a part cannot be made, RewardError when the worker ended or was closed,
        ProtocolError when it answered nonsense, DeadlineExceeded when it was not ready in time.
        """
        if self._closed:
            raise RewardError("the reward workers were closed")
        if self.process is not None and self.process.returncode is None:
            return
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "asyncrl.rewards.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=foreign_environment(),
                start_new_session=True,
            )
            self._running = _Running(process)
            await self._set_up()
        except BaseException:
            await self.kill()
            raise

    async def _set_up(self) -> None:
        """Has a worker that was just started make the task and the parts."""
        if self._closed:
            raise RewardError("the reward workers were closed")
        await self.send(self._setup, START_TIMEOUT_S)
        (started,) = await self.receive(decode_started, START_TIMEOUT_S)
        if started.error:
            raise TaskError(started.error)

    async def close(self) -> None:
        """Ends the worker for good."""
        self._closed = True
        await self.kill()

    async def send(self, message: PipeMessage, timeout_s: float) -> None:
        """Raises DeadlineExceeded when the worker does not take it, RewardError when there is no worker (any more)."""
        running = self._alive()
        try:
            running.jobs.write(framed(encode(message)))
            async with asyncio.timeout(timeout_s):
                await running.jobs.drain()
        except TimeoutError:
            raise DeadlineExceeded(f"a reward worker took no job for {timeout_s:g} s") from None
        except ConnectionError:
            raise RewardError(await _ending(running.process)) from None

    async def receive(self, decode: Callable[[bytes], _T], timeout_s: float) -> list[_T]:
        """The messages that have come in, one at least, within timeout_s.

        Raises DeadlineExceeded, ProtocolError, or RewardError when there is no worker (any more).
        """
        running = self._alive()
        try:
            async with asyncio.timeout(timeout_s):
                while not (messages := self._received.take(decode)):
                    chunk = await running.results.read(READ_BYTES)
                    if not chunk:
                        raise RewardError(await _ending(running.process))
                    self._received.feed(chunk)
        except TimeoutError:
            raise DeadlineExceeded(f"no reward within {timeout_s:g} s; its worker was killed") from None
        return messages

    def note_scored(self) -> bool:
        """Notes that a result has come. Whether it is the first of this process."""
        was_new, self._alive().is_new = self._alive().is_new, False
        return was_new

    async def kill(self) -> None:
        """Ends the worker and everything in its process group, and waits until it is gone."""
        running, self._running = self._running, None
        self._received.clear()
        if running is None:
            return
        running.jobs.close()
        await kill_group(running.process, "reward worker")

    def _alive(self) -> _Running:
        if self._running is None:
            raise RewardError("the reward workers were closed")
        return self._running


async def _ending(process: asyncio.subprocess.Process) -> str:
    """How the process ended, for a message."""
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            code = await process.wait()
    except TimeoutError:
        return "the reward closed its worker's pipes"
    return how_it_ended(code, "the reward")
