"""The generator's part in a weight sync: stage while generating, swap, show the canary, wait for the commit.

The learner drives (`weights.plan.planner`); the generator answers each phase and keeps one promise: **no token leaves
before the version it was sampled under is proven.** After the swap the engine goes on decoding, so a group may be
complete before the commit arrives. `wait_proven` holds it back until then; if the version is tainted instead, the
group is lost work.

Versions stay proven for the life of the process: a group begun under version 3 and finished under 5 needs both. A
version number may come again, after a taint or from a learner that resumed; the proof of its new weights says nothing
about the old ones. So a proof counts for groups that began after the number's last load, see `num_loads`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import numpy as np

from asyncrl.errors import AsyncRLError, EngineError
from asyncrl.generator.engines.base import RolloutEngine, nothing
from asyncrl.link.messages import SyncAbort, SyncCommit, SyncOffer, SyncReply, SyncSwap
from asyncrl.link.schema.message_base import Message
from asyncrl.link.wire_types import SyncPhase
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE

log = logging.getLogger(__name__)


class WeightSync:
    """Answers the phases of weight syncs, one sync at a time. The newest offer wins.

    on_change is called whenever `swapping` or `held_version` is another than before.
    """

    def __init__(self, engine: RolloutEngine, send: Callable[[Message], None]) -> None:
        self.on_change: Callable[[], None] = nothing
        self._engine = engine
        self._send = send
        self._task: asyncio.Task[None] | None = None
        self._channel: str | None = None  # prefix of the channel joined; unlike its epoch unique over all learners
        self._wanted: SyncOffer | None = None  # what the learner still waits to see staged
        self._staging: asyncio.Task[None] | None = None  # the task that stages, once it does
        self._proven: set[int] = set()
        self._num_loads = 0
        self._numbers: set[int] = set()  # versions that were ever loaded
        self._came_again: dict[int, int] = {}  # version → its last load, if that was not its first
        self._held: int | None = None
        self._loaded: SyncSwap | None = None  # in the engine, not proven yet
        self._swapping = False
        self._changed = asyncio.Condition()

    @property
    def held_version(self) -> int | None:
        """The version this generator proved and still holds; None while it is loading or tainted."""
        return self._held

    @property
    def num_loads(self) -> int:
        """Loads of weights so far. To be noted down when sampling begins, for `wait_proven`."""
        return self._num_loads

    @property
    def swapping(self) -> bool:
        """The engine stands still for a swap."""
        return self._swapping

    def handle(self, message: SyncOffer | SyncSwap | SyncCommit | SyncAbort) -> None:
        """Starts the work of a phase. Never blocks."""
        match message:
            case SyncOffer():
                self._end_stage()
                self._wanted = message
                self._replace_task(self._stage(message))
            case SyncSwap():
                self._replace_task(self._swap(message))
            case SyncCommit():
                self._replace_task(self._commit(message))
            case SyncAbort():
                self._end_stage()
                self._replace_task(self._abort(message))

    async def wait_proven(self, versions: Iterable[int], timeout_s: float, *, since: int) -> None:
        """Returns when all `versions` are proven for tokens sampled after the first `since` loads.

        Raises EngineError when one of them can no longer be: it is neither proven nor the one being checked, or its
        number came again with a later load. The learner resolves every swap within its own deadline; `timeout_s`
        covers its death in between.
        """
        needed = set(versions)
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._resolved(needed))
            except TimeoutError:
                raise EngineError(
                    f"versions {sorted(needed - self._proven)} were not proven within {timeout_s:.0f} s"
                ) from None
        if not needed <= self._proven:
            raise EngineError(f"tokens of versions {sorted(needed - self._proven)}, which were never proven")
        if again := sorted(version for version in needed if self._came_again.get(version, 0) > since):
            raise EngineError(f"tokens of versions {again} from before these were loaded again, and proven")

    async def close(self, timeout_s: float) -> None:
        """Stops the work in hand. The weight channel goes with the engine's processes."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=timeout_s)

    def _resolved(self, needed: set[int]) -> bool:
        missing = needed - self._proven
        return not missing or self._loaded is None or missing != {self._loaded.version}

    def _end_stage(self) -> None:
        """The learner gave up the stage under way: members may be gone, so that it could take until its deadline.

        A stage that is still waiting for its turn will not begin. No other phase is broken off: an abort has to be
        carried out, and a swap would leave the engine between two versions.
        """
        self._wanted = None
        if self._staging is not None:
            self._staging.cancel()
            self._staging = None  # cancelled once, not again while it leaves its channel

    def _replace_task(self, work: Coroutine[Any, Any, None]) -> None:
        previous, self._task = self._task, None

        async def in_order() -> None:
            # A phase that is still running belongs to a sync the learner has given up: it ends by its own deadline,
            # and two phases must never touch the engine's staging buffer at once.
            if previous is not None:
                await asyncio.gather(previous, return_exceptions=True)
            await work

        self._task = asyncio.create_task(in_order())
        self._task.add_done_callback(_report_crash)

    async def _stage(self, offer: SyncOffer) -> None:
        if offer is not self._wanted:
            return  # the learner gave it up while it waited for its turn
        # One deadline for joining and staging, which is the learner's: an error that comes later is heard by nobody.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + offer.timeout_s
        try:
            self._staging = asyncio.current_task()
            joined, self._channel = self._channel, None
            spec = offer.channel.spec(offer.timeout_s)
            if spec.prefix != joined:
                await self._engine.leave_channel()
                await self._engine.join_channel(spec, deadline - loop.time())
            report = await self._engine.stage_weights(offer.manifest, deadline - loop.time())
        except (AsyncRLError, TimeoutError) as error:
            self._reply(offer, SyncPhase.STAGE, error=_text(error))
            return
        finally:
            self._staging = None
        self._channel = spec.prefix
        self._reply(offer, SyncPhase.STAGE, digests=report.digests, timings_ms=report.timings_ms)

    async def _swap(self, swap: SyncSwap) -> None:
        sequences = [np.frombuffer(tokens, TOKEN_DTYPE).tolist() for tokens in swap.canary]
        self._held, self._loaded = None, swap
        # The number may have been proven before, with the weights of an earlier learner.
        self._proven.discard(swap.version)
        try:
            self._swapping = True
            self.on_change()
            report = await self._engine.swap_weights(swap.version, swap.timeout_s)
        except (AsyncRLError, TimeoutError) as error:
            await self._settle(None)
            self._reply(swap, SyncPhase.SWAP, error=_text(error))
            return
        finally:
            self._swapping = False
            self.on_change()
            self._count_load(swap.version)
        try:
            loop = asyncio.get_running_loop()
            started = loop.time()
            logprobs = await self._engine.score(sequences, swap.timeout_s)
            canary_ms = (loop.time() - started) * 1e3
            check = await self._engine.check_weights(swap.version, swap.timeout_s)
        except (AsyncRLError, TimeoutError) as error:
            await self._taint(f"version {swap.version} could not be proven: {error}")
            why = f"canary and bits in use: {_text(error)}; the engine is tainted until a full sync"
            self._reply(swap, SyncPhase.SWAP, error=why)
            return
        self._reply(
            swap,
            SyncPhase.SWAP,
            canary_logprobs=[row.astype(LOGPROB_DTYPE).tobytes() for row in logprobs],
            timings_ms={**report.timings_ms, "canary_ms": canary_ms, **check.timings_ms},
            in_use=check.in_use,
        )

    def _count_load(self, version: int) -> None:
        """To be called after the load: a sequence that begins during it may still be sampled under the old weights."""
        self._num_loads += 1
        if version in self._numbers:
            self._came_again[version] = self._num_loads
        self._numbers.add(version)

    async def _commit(self, commit: SyncCommit) -> None:
        # The attempt counts: the commit of an earlier load proves nothing about this one.
        if self._loaded is None or _which(commit) != _which(self._loaded):
            loaded = None if self._loaded is None else _which(self._loaded)
            log.warning("commit of %s ignored: (run epoch, version, attempt) %s is loaded", _which(commit), loaded)
            return
        self._proven.add(commit.version)
        log.debug("version %d is proven", commit.version)
        await self._settle(commit.version)

    async def _abort(self, abort: SyncAbort) -> None:
        log.warning("sync to version %d aborted: %s", abort.version, abort.reason)
        self._channel = None
        if abort.tainted:
            await self._taint(f"version {abort.version} was not proven: {abort.reason}")

    async def _taint(self, why: str) -> None:
        """The loaded weights must not be sampled from, and what was sampled must not pass as sampled from good ones."""
        if self._loaded is not None:
            self._engine.taint(why)
        await self._settle(None)

    async def _settle(self, held: int | None) -> None:
        async with self._changed:
            self._held, self._loaded = held, None
            self._changed.notify_all()
        self.on_change()

    def _reply(self, request: SyncOffer | SyncSwap, phase: SyncPhase, *, error: str = "", **fields: Any) -> None:
        if error:
            log.warning("sync to version %d failed in phase %s: %s", request.version, phase, error)
        self._send(SyncReply(request.run_epoch, request.version, request.attempt, phase, error, **fields))


def _which(phase: SyncSwap | SyncCommit) -> tuple[int, int, int]:
    """(run epoch, version, attempt): what tells one load from all others."""
    return phase.run_epoch, phase.version, phase.attempt


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("weight sync task crashed", exc_info=error)
