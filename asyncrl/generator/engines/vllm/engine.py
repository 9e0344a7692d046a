"""The rollout engine over vLLM's AsyncLLM.

Weights move in two phases: staging beside generation, then a swap in a short pause. The swap itself is a state of the
engine: from the pause to the resume `version` is None, and if anything fails in between it stays None (*tainted*).

Prefix cache. Blocks computed under one version must not serve a prompt that starts under another. While sequences run,
vLLM cannot clear the cache without throwing their KV away, so each swap has a cache of its own: every request carries
the version and the number of the swap as the cache's salt (the number, because a version that was found wrong may come
again). One case is left: a sequence submitted before the pause whose prompt has not been computed yet. It has no tokens
to lose, and is submitted again under the new version.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np

from asyncrl.errors import AsyncRLError, ChannelError, DeadlineExceeded, EngineError
from asyncrl.generator.engines.base import CheckReport, Completion, GenerationRequest, StageReport, SwapReport
from asyncrl.generator.engines.step_times import StepTimes
from asyncrl.generator.engines.vllm.forking import forked_engine, in_thread, may_fork
from asyncrl.generator.engines.vllm.jobs import progress, slowest_ms
from asyncrl.generator.engines.vllm.options import (
    SPARE_SEQUENCES,
    EngineOptions,
    engine_arguments,
    prepare_environment,
    stop_token_ids,
)
from asyncrl.generator.engines.vllm.outputs import completion_from, scores_from, time_steps
from asyncrl.host.garbage import no_collections
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import BitsInUse, ChannelSpec, WeightManifest

_T = TypeVar("_T")

# Workers keep the deadline themselves; this is for their answer to arrive, before the learner stops listening too.
REPORT_SLACK_S = 0.7
POLL_FIRST_S, POLL_MAX_S = 0.002, 0.05
GPU_POLL_S = 0.05  # on GPUs vLLM prepares a step while the one before runs, and each question to workers stops that
RPC_TIMEOUT_S = 5.0
STOP_BUILDING_TIMEOUT_S = 1.0
UNTOUCHED = "nothing is staged, the weights in use are untouched"
TAINTED = "the engine is tainted: what it sampled is lost, and it samples nothing until a full sync"
SHUTDOWN_TIMEOUT_S = 0.5  # the engine's processes hold nothing that a kill could damage


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One sequence in flight. `engine_id` is its name inside vLLM, where every try has a new one."""

    task: asyncio.Task[Completion] | None = None
    engine_id: str = ""
    restart: bool = False


class VLLMEngine:
    """A `RolloutEngine` over vLLM. All methods belong to the event loop that called `start`.

    worker_extension: import path of the class whose methods vLLM's workers get, where it is not the plug-in's own.
    """

    def __init__(self, options: EngineOptions, *, worker_extension: str | None = None) -> None:
        self._options = options
        self._worker_extension = worker_extension
        self._llm: Any = None
        self._building: asyncio.Future[Any] | None = None
        self._given_up = False  # nobody waits for what `_building` brings
        self._version: int | None = None
        self._tainted = False
        self._dead: str | None = None
        self._tokens_generated = 0
        self._step_times = StepTimes()
        self._ids = itertools.count()
        self._requests: dict[str, list[_Sequence]] = {}
        self._slots = asyncio.Semaphore(options.max_sequences)
        self._spare_slots = asyncio.Semaphore(SPARE_SEQUENCES - 1)  # the last one is the probe's
        self._weights_lock = asyncio.Lock()
        self._swapping = False
        self._num_swaps = 0
        self._open = asyncio.Event()  # closed from a pause to its resume: nothing is submitted in between

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int | None:
        """See `RolloutEngine.version`."""
        return self._version

    @property
    def tainted(self) -> bool:
        """See `RolloutEngine.tainted`."""
        return self._tainted

    @property
    def num_running(self) -> int:
        """See `RolloutEngine.num_running`."""
        sequences = itertools.chain.from_iterable(self._requests.values())
        return sum(sequence.task is None or not sequence.task.done() for sequence in sequences)

    @property
    def tokens_generated(self) -> int:
        """See `RolloutEngine.tokens_generated`."""
        return self._tokens_generated

    def step_ms(self) -> dict[str, float]:
        """See `RolloutEngine.step_ms`."""
        return self._step_times.fit_ms()

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start vLLM, sample and score once, so that what is compiled or allocated late is in place.

        Raises:
            EngineError, ModelError: the engine did not start.
        """
        prepare_environment(self._options)
        fork = may_fork(self._options)
        timeout_s = self._options.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                # In a thread: importing vllm and starting its processes takes seconds, and the loop must go on.
                self._building = in_thread(lambda: self._build(fork))
                self._llm = await asyncio.shield(self._building)
                await self.probe(timeout_s)
                # The first canary has a sync's deadline, and the first scoring takes seconds more than all others.
                await self._run([self._stop_ids[0]] * 2, self._scoring_params(), "warm-up", salt="warm-up")
        except TimeoutError as error:
            await self.close()
            raise EngineError(f"the engine was not ready within {timeout_s:g} s; see its log") from error

    def _build(self, fork: bool) -> Any:
        """Imports what is heavy here, in a thread: until then the daemon is up within a second."""
        with no_collections():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.exceptions import VLLMClientError
            from vllm.sampling_params import RequestOutputKind, SamplingParams
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

            from asyncrl.generator.engines.vllm.plugin import BACKEND, EXTENSION

        self._sampling_params, self._final_only = SamplingParams, RequestOutputKind.FINAL_ONLY
        self._dead_error, self._request_errors = EngineDeadError, (VLLMClientError, EngineGenerateError)

        class Engine(AsyncLLM):
            def __del__(self) -> None:
                """`close` shuts it down. AsyncLLM would do so here, which fails while Python exits."""

        self._tokenizer = load_tokenizer(self._options.model_path)
        self._stop_ids = stop_token_ids(self._options.model_path, self._tokenizer)
        arguments = engine_arguments(self._options, BACKEND, self._worker_extension or EXTENSION)
        if self._dead:
            raise EngineError(f"the engine was {self._dead} before it started")
        try:
            config = AsyncEngineArgs(**arguments).create_engine_config()
            with forked_engine() if fork else contextlib.nullcontext():
                llm = Engine.from_vllm_config(config, disable_log_stats=True)
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}; its log tells why") from error
        if self._given_up:
            llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            raise EngineError("the engine was closed before it had started")
        time_steps(llm, self._step_times)
        return llm

    async def close(self) -> None:
        """End the engine's processes. Idempotent."""
        self._dead = self._dead or "closed"
        self._version = None
        self._fail_running("the engine was closed")
        await self._stop_building()
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # else it reports the end of the engine as a failure
        await asyncio.to_thread(llm.shutdown, timeout=SHUTDOWN_TIMEOUT_S)

    async def _stop_building(self) -> None:
        """Ends a start under way by the end of its process, and gives up waiting for one that has none yet.

        Its thread cannot be cancelled: `_build` ends what that may still start, and a command leaves (`work_goes_on`).
        """
        building, self._building = self._building, None
        if building is None:
            return
        deadline = time.monotonic() + STOP_BUILDING_TIMEOUT_S
        while not building.done() and time.monotonic() < deadline:
            for child in multiprocessing.active_children():
                child.kill()
            await asyncio.wait([building], timeout=POLL_MAX_S)
        self._given_up = not building.done()
        if building.done() and building.exception() is None:
            self._llm = building.result()

    # -- sampling ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """See `RolloutEngine.generate`. A request id that is running already, or too few seeds, are an EngineError."""
        self._check_usable()
        if request.seeds is not None and len(request.seeds) != request.num_rollouts:
            raise EngineError(f"request {request.request_id}: {len(request.seeds)} seeds for {request.num_rollouts}")
        if request.request_id in self._requests:
            raise EngineError(f"request {request.request_id} is already running")
        sequences = [_Sequence() for _ in range(request.num_rollouts)]
        self._requests[request.request_id] = sequences
        try:
            for index, sequence in enumerate(sequences):
                sequence.task = asyncio.create_task(self._sample(request, index, sequence))
                sequence.task.add_done_callback(lambda _: request.on_sequence_end())
            return await asyncio.gather(*(sequence.task for sequence in sequences if sequence.task))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller was cancelled, and not the sequences
            raise EngineError(self._why_stopped(request.request_id)) from None
        finally:
            del self._requests[request.request_id]
            for sequence in sequences:
                if sequence.task is not None:
                    sequence.task.cancel()  # one failed: the others of the group are of no use

    async def abort(self, request_id: str) -> None:
        """See `RolloutEngine.abort`."""
        for sequence in self._requests.get(request_id, ()):
            if sequence.task is not None:
                sequence.task.cancel()

    def _why_stopped(self, request_id: str) -> str:
        if self._dead:
            return f"request {request_id}: {self._dead}"
        return f"request {request_id}: " + ("the engine is tainted" if self._tainted else "aborted")

    async def _sample(self, request: GenerationRequest, index: int, sequence: _Sequence) -> Completion:
        seed = None if request.seeds is None else request.seeds[index]
        params = self._sampling_params(
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            seed=None if seed is None else seed % 2**63,
            stop_token_ids=self._stop_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._final_only,
        )
        prompt = list(request.prompt_token_ids)
        async with self._slots:
            while True:
                await self._open.wait()
                self._check_usable()
                sequence.restart = False
                sequence.engine_id = f"{request.request_id}/{index}/{next(self._ids)}"
                output = await self._run(prompt, params, sequence.engine_id, salt=f"v{self._version}/{self._num_swaps}")
                if not (sequence.restart and output.outputs[0].finish_reason == "abort"):
                    completion = completion_from(output.outputs[0], self._tokenizer, request.request_id)
                    self._tokens_generated += len(completion.token_ids)
                    return completion

    async def _run(self, prompt: list[int], params: Any, engine_id: str, salt: str) -> Any:
        tokens = {"type": "token", "prompt_token_ids": prompt, "cache_salt": salt}
        output = None
        try:
            async for output in self._llm.generate(tokens, params, engine_id):  # noqa: B007 - the last one counts
                pass
        except self._dead_error as error:
            self._dead = "the engine died; its log tells why"
            self._version = None
            raise EngineError(self._dead) from error
        except self._request_errors as error:  # a prompt that is too long, an unknown token, ...
            raise EngineError(f"{engine_id}: vLLM refuses the request: {error}") from error
        if output is None:
            raise EngineError(f"{engine_id}: the engine returned nothing")
        return output

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        """See `RolloutEngine.score`."""
        self._check_usable()
        scores = asyncio.gather(*(self._score_sequence(sequence) for sequence in sequences))
        return await self._within(timeout_s, f"scoring {len(sequences)} sequences", scores)

    def _scoring_params(self) -> Any:
        return self._sampling_params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=self._final_only,
        )  # fmt: skip

    async def _score_sequence(self, token_ids: list[int]) -> np.ndarray:
        engine_id = f"score/{next(self._ids)}"
        async with self._spare_slots:
            # vLLM reads no cached prefix when prompt log-probs are asked for; the salt keeps it from leaving one.
            output = await self._run(list(token_ids), self._scoring_params(), engine_id, salt=engine_id)
        return scores_from(output, len(token_ids))

    def check_alive(self) -> None:
        """See `RolloutEngine.check_alive`."""
        if self._llm is not None and self._llm.errored:
            self._dead, self._version = self._dead or "the engine died; its log tells why", None
        self._check_alive()

    async def probe(self, timeout_s: float) -> None:
        """See `RolloutEngine.probe`."""
        self._check_alive()
        if self._tainted or self._swapping:
            await self._rpc("asyncrl_poll", timeout_s)  # paused: it cannot sample, but it must answer
            return
        params = self._sampling_params(max_tokens=1, detokenize=False, output_kind=self._final_only)
        engine_id = f"probe/{next(self._ids)}"
        run = self._run([self._stop_ids[0]], params, engine_id, salt=engine_id)
        await self._within(timeout_s, "the engine's probe", run)

    # -- weights -----------------------------------------------------------------------------------------------------

    async def join_channel(self, spec: ChannelSpec, timeout_s: float) -> None:
        """See `RolloutEngine.join_channel`."""
        spec = dataclasses.replace(spec, timeout_s=timeout_s)
        async with self._weights_lock:
            await self._job(f"joining weight channel {spec.prefix!r}", timeout_s, "asyncrl_join", to_plain(spec))

    async def stage_weights(self, manifest: WeightManifest, timeout_s: float) -> StageReport:
        """See `RolloutEngine.stage_weights`."""
        async with self._weights_lock:
            what = f"staging version {manifest.version}"
            jobs = await self._job(what, timeout_s, "asyncrl_stage", to_plain(manifest), timeout_s, self._tainted)
        return StageReport([job["digests"] for job in jobs], slowest_ms(jobs))

    async def leave_channel(self) -> None:
        """See `RolloutEngine.leave_channel`."""
        if self._llm is not None and not self._dead:
            await self._rpc("asyncrl_leave", RPC_TIMEOUT_S)

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        """See `RolloutEngine.swap_weights`."""
        async with self._weights_lock:
            staged = await self._rpc("asyncrl_staged_version", timeout_s)
            if any(held != version for held in staged):
                raise EngineError(f"version {version} is not staged (workers hold {staged}); stage it first")
            # What tainted weights rest on is not known, so that nothing of them may stay: no copying in place.
            swap = self._swap(version, timeout_s, reload=self._tainted)
            self._version, self._swapping = None, True
            self._open.clear()
            try:
                report = await self._within(timeout_s, f"swapping to version {version}", swap)
            except DeadlineExceeded as error:
                self._tainted = True
                self._fail_running(str(error))
                raise DeadlineExceeded(f"{error}; {TAINTED}") from None
            except BaseException as error:
                # Also on cancellation: nobody knows how far the workers came.
                self._tainted = True
                self._fail_running(f"swap to version {version} failed: {error}")
                raise
            finally:
                self._swapping = False
            self._version, self._tainted = version, False
            self._num_swaps += 1
            self._open.set()
            return report

    def taint(self, why: str) -> None:
        """See `RolloutEngine.taint`."""
        self._version, self._tainted = None, True
        self._fail_running(why)

    async def _swap(self, version: int, timeout_s: float, reload: bool) -> SwapReport:
        core = self._llm.engine_core
        # Not AsyncLLM.pause_generation: it sleeps 20 ms for the order of outputs, which does not matter here.
        await core.pause_scheduler_async("keep", False)
        paused = time.monotonic()
        await self._restart_unstarted()
        results = await self._rpc("asyncrl_swap", timeout_s, version, reload)
        for rank, result in enumerate(results):
            if result["error"]:
                raise EngineError(f"worker {rank} could not load version {version}: {result['error']}; {TAINTED}")
        self._step_times.interrupted()
        await core.set_weight_version_async(str(version))
        await core.resume_scheduler_async()
        pause_ms = (time.monotonic() - paused) * 1e3
        apply_ms = max(result["apply_ms"] for result in results)
        apply = "direct" if all(result["apply"] == "direct" for result in results) else "reload"
        # Under the name of its kind too: times are all of this report that reaches the learner's counters.
        times = {"pause_ms": pause_ms, "apply_ms": apply_ms, f"{apply}_ms": apply_ms}
        return SwapReport(version, times, apply)

    async def check_weights(self, version: int, timeout_s: float) -> CheckReport:
        """See `RolloutEngine.check_weights`."""
        async with self._weights_lock:
            jobs = await self._results(timeout_s)
        found = [job["in_use"] for job in jobs]
        if any(each is None or each["version"] != version for each in found):
            raise EngineError(f"the workers compared {found}, and not version {version}; swap to it first")
        return CheckReport([from_plain(BitsInUse, each) for each in found], slowest_ms(jobs, "check_ms"))

    async def _restart_unstarted(self) -> None:
        by_id = {sequence.engine_id: sequence for group in self._requests.values() for sequence in group}
        unstarted = []
        for state in self._llm.output_processor.request_states.values():
            if state.is_prefilling and state.external_req_id in by_id:
                by_id[state.external_req_id].restart = True
                unstarted.append(state.external_req_id)
        if unstarted:
            await self._llm.abort(unstarted)

    async def _job(self, what: str, timeout_s: float, method: str, *args: Any) -> list[dict[str, Any]]:
        """Runs a job in every worker and returns the results. After a failure the channel, which is broken, is left."""
        try:
            await self._rpc(method, timeout_s, *args)
            return await self._results(timeout_s)
        except (EngineError, DeadlineExceeded, ChannelError) as error:
            raise type(error)(f"{what}: {error}; {await self._try_to_leave()}, {UNTOUCHED}") from None
        except BaseException:  # cancelled: the workers go on with a job that nobody waits for
            await self._try_to_leave()
            raise

    async def _results(self, timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s + REPORT_SLACK_S
        pause_s = POLL_FIRST_S if self._options.device == "cpu" else GPU_POLL_S
        jobs: list[dict[str, Any]] = []
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"not done within {timeout_s:g} s: {progress(jobs)}")
            try:
                jobs = await self._rpc("asyncrl_poll", remaining)
            except DeadlineExceeded as error:
                raise DeadlineExceeded(f"{error}; last heard: {progress(jobs)}") from None
            for rank, job in enumerate(jobs):
                if job["state"] == "failed":
                    raise ChannelError(f"{progress([job], rank)}: {job['error']}")
            if all(job["state"] == "done" for job in jobs):
                return jobs
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MAX_S)

    async def _try_to_leave(self) -> str:
        """How leaving the weight channel went, for the error that is the reason for it."""
        try:
            await self.leave_channel()
        except (EngineError, DeadlineExceeded) as error:
            return f"nor can the weight channel be left ({error})"
        return "the weight channel is left"

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        if self._dead or self._llm is None:
            raise EngineError(self._dead or "the engine was not started")

    def _check_usable(self) -> None:
        self._check_alive()
        if self._tainted:
            raise EngineError("the engine is tainted: its weights could not be proven; it needs a full sync")
        if self._version is None and not self._swapping:
            raise EngineError("the engine has no policy version yet: its weights come by sync")

    def _fail_running(self, why: str) -> None:
        for sequences in self._requests.values():
            for sequence in sequences:
                if sequence.task is not None:
                    sequence.task.cancel(why)

    async def _rpc(self, method: str, timeout_s: float, *args: Any) -> list[Any]:
        self._check_alive()
        call = self._llm.collective_rpc(method, args=args)
        try:
            return await self._within(timeout_s, f"the workers' answer to {method}", call)
        except AsyncRLError:
            raise
        except Exception as error:  # vLLM passes on a worker's error as text, without its type
            raise EngineError(f"{method} failed in a worker: {error}") from error

    async def _within(self, timeout_s: float, what: str, work: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: nothing within {timeout_s:g} s from the engine") from None
        except self._dead_error as error:
            self._dead = "the engine died; its log tells why"
            self._version = None
            raise EngineError(self._dead) from error
