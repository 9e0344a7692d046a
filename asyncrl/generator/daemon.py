"""The generator daemon: takes leases, keeps the engine full, streams scored groups, follows the learner's policy.

    loop          consumes                    produces                     waits at most for
    ------------  --------------------------  ---------------------------  -----------------------------------------
    link          frames from the learner     leases, syncs, acks          the session's next deadline
    lease (many)  one lease                   one group or one failure     the lease's deadline
    beat          counters                    Beat, as often as asked      -
    engine        a welcome                   a started engine             the deadline of its start
                  progress of the engine      exit 5: wedged or dead       the deadline of the probe

Everything runs in one event loop, the beat included: a wedged loop stops beating, and the learner notices. The link
comes first. The engine, which takes many seconds to start, comes after the welcome, so that an address that does not
answer and a model that does not fit are told at once. Until the engine is up, beats say so, and the learner neither
offers weights nor grants leases.

Shutdown: after a signal, or the learner's Stop, no more leases are asked for → those in hand finish or are handed back
→ the outbox is flushed → Bye. All of it within `generator.drain_timeout_s` + 2 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from asyncrl.config import Config
from asyncrl.errors import ProtocolError
from asyncrl.generator.activities import Situation, activity_of, busy_s, idle_s
from asyncrl.generator.engines.base import RolloutEngine
from asyncrl.generator.engines.vllm.engine import VLLMEngine
from asyncrl.generator.engines.vllm.options import EngineOptions
from asyncrl.generator.engines.watch import watch_engine
from asyncrl.generator.held_leases import HeldLeases
from asyncrl.generator.learner_link import LearnerLink
from asyncrl.generator.lease_runner import LeaseFailure, LeaseRunner, no_text
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.host.cpu_time import TreeCpuTime
from asyncrl.link import messages
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.limits import BEAT_S
from asyncrl.link.rollouts import grant_to_lease, group_to_result
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import AsyncClientSocket
from asyncrl.metrics.exposition import Exposition
from asyncrl.metrics.generator_metrics import GeneratorMetrics
from asyncrl.metrics.health import DaemonState, Pulse
from asyncrl.metrics.ledger import GeneratorActivity, Ledger, in_words
from asyncrl.rewards.pool import RewardPool
from asyncrl.types import Group, Lease, LeaseKind

log = logging.getLogger(__name__)

BEAT_GATHER_S = 0.01  # leases that end together ask for the next ones together
FLUSH_TIMEOUT_S = 1.0
SYNC_CLOSE_TIMEOUT_S = 0.5  # to be quiet, not to be right: the engine's processes end next
MAX_DETAIL = 500


@dataclass(frozen=True, slots=True)
class GeneratorParts:
    """What a generator is made of. Runs that inject faults put theirs in the place of one of these."""

    engine: Callable[[EngineOptions], RolloutEngine] = VLLMEngine
    weight_sync: Callable[[RolloutEngine, Callable[[Message], None]], WeightSync] = WeightSync
    lease_runner: type[LeaseRunner] = LeaseRunner


class GeneratorDaemon:
    """One generator: an engine, its rewards, the leases in hand, and the link to the learner.

    prompt_text turns a prompt's tokens into the text that parts of the reward see.
    """

    def __init__(
        self,
        config: Config,
        session: GeneratorSession,
        socket: AsyncClientSocket,
        engine: RolloutEngine,
        rewards: RewardPool,
        *,
        prompt_text: Callable[[np.ndarray], str] = no_text,
        parts: GeneratorParts,
    ) -> None:
        self.config = config
        self.ledger = Ledger(GeneratorActivity.START)
        self.pulse = Pulse()
        self.figures = Exposition(GeneratorMetrics)
        self._cpu_time = TreeCpuTime()
        self.session = session
        self.engine = engine
        self.rewards = rewards
        self.link = LearnerLink(config, session, socket)
        self.sync = parts.weight_sync(engine, self.link.send)
        self.sync.on_change = self._account
        self.runner = parts.lease_runner(
            engine,
            rewards,
            self.sync,
            commit_timeout_s=2 * config.weights.timeout_s,
            on_sequence_end=self._sequence_ended,
            prompt_text=prompt_text,
            on_change=self._account,
        )
        self.leases = HeldLeases(self.runner, config.generator.max_sequences, self._report, self._account)
        self._announced_room = 0  # sequences, in the last beat
        self._ended_since_beat = 0  # sequences
        self._beat_at = time.monotonic()  # when the last one was due
        self._run_epoch = 0
        self._welcomed = asyncio.Event()
        self._ready = False
        self._stopping = asyncio.Event()
        self._why_stopping = ""
        self._run_finished = False
        self._progress = asyncio.Event()  # a lease ended or an acknowledgement came: `_until` looks again
        self._beat_soon = asyncio.Event()

    async def run(self) -> int:
        """Serves until the run is over or a signal comes. Returns 0; raises what ended it otherwise."""
        loops = [asyncio.create_task(loop()) for loop in (self._serve_link, self._beats, self._run_engine)]
        try:
            await self._until_stopping(loops)
            await self._drain()
        finally:
            await self._end(loops)
            await self._say_bye()
            spent = self.ledger.seconds()
            log.info("the time of this generator, %.2f s: %s", sum(spent.values()), in_words(spent))
        return 0

    def stop(self, why: str, *, run_finished: bool = False) -> None:
        """No more leases from now on; `run` drains and returns."""
        if not self._stopping.is_set():
            log.info("stopping: %s", why)
        self._why_stopping = why
        self._run_finished = run_finished or self._run_finished
        self._stopping.set()
        self._account()

    # -- what the learner says -------------------------------------------------------------------------------------

    async def _serve_link(self) -> None:
        """Handles the frames that come in, and sends whatever is due."""
        while True:
            self.link.keep_up(self.sync.held_version)
            for frame in await self.link.receive():
                try:
                    if (message := self.link.accept(frame)) is not None:
                        self._handle(message)
                except ProtocolError as error:
                    log.warning("frame from the learner dropped: %s", error)

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Welcome():
                self._welcome(message)
            case messages.LeaseGrant():
                self.leases.take(grant_to_lease(message))
            case messages.Ack():
                self._progress.set()
            case messages.Nack():
                log.warning("result %d refused (%s): %s", message.seq, message.code, message.reason)
                self._progress.set()
            case messages.Abandon():
                self.leases.give_back(message.leases, self._why_stopping or "abandoned")
            case messages.Stop():
                self._learner_stops(message)
            case messages.SyncOffer() | messages.SyncSwap() | messages.SyncCommit() | messages.SyncAbort():
                self.sync.handle(message)
        self._account()  # an acknowledgement may have made room

    def _welcome(self, welcome: messages.Welcome) -> None:
        if welcome.run_epoch != self._run_epoch:
            log.info("welcome from %s, run epoch %d, version %d", welcome.run_name, welcome.run_epoch, welcome.version)
            self._run_epoch = welcome.run_epoch
            self.leases.sequences_received = 0
        self._welcomed.set()
        self._beat_soon.set()

    def _learner_stops(self, stop: messages.Stop) -> None:
        if stop.finished:
            self.stop(stop.reason, run_finished=True)
        else:
            log.info("the learner went away (%s); keeping on until it returns", stop.reason)

    # -- what the learner is told: results and beats ---------------------------------------------------------------

    def _report(self, lease: Lease, outcome: Group | LeaseFailure) -> None:
        """A lease has ended: a group or a failure goes to the outbox, with the lease's ticket."""
        kind, ordinal, attempt = lease.key

        def result(seq: int, run_epoch: int) -> messages.GroupResult | messages.LeaseFailed:
            if isinstance(outcome, Group):
                return group_to_result(outcome, seq, run_epoch, lease.ticket)
            detail = outcome.detail[:MAX_DETAIL]
            return messages.LeaseFailed(seq, run_epoch, kind, ordinal, attempt, outcome.reason, detail, lease.ticket)

        self.link.deliver(result, self.sync.held_version)
        self._account()
        self._progress.set()
        if not self.leases or self._announced_room == 0 or isinstance(outcome, LeaseFailure):
            self._beat_soon.set()  # in all other cases its sequences asked for more when they ended

    def _sequence_ended(self) -> None:
        """Asks for the next lease when there is room for one, which may be long before a lease in hand ends."""
        self._account()
        self._ended_since_beat += 1
        if self._ended_since_beat >= self.config.sampling.group_size:
            self._beat_soon.set()

    async def _beats(self) -> None:
        """As often as the learner asks, and soon after room came up, so that the engine does not run dry.

        Once in BEAT_S at least it looks after the engine.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(BEAT_S, self._beat_at + self.session.beat_s - time.monotonic())):
                    await self._beat_soon.wait()
                    await asyncio.sleep(BEAT_GATHER_S)
            if self._ready:
                # Also without leases, when no probe is due: a learner must not go on offering weights to a dead engine.
                self.engine.check_alive()
            self._account()
            self._show_pulse()
            now = time.monotonic()
            if self._beat_soon.is_set() or now >= self._beat_at + self.session.beat_s:
                self._beat_at = now
                self._beat_soon.clear()
                if self.session.welcomed:
                    self.link.send(self._beat())

    def _show_pulse(self) -> None:
        """Shows that the loop turned, what the generator does, and its figures."""
        held = self.sync.held_version
        if self._stopping.is_set():
            self.pulse.turn(DaemonState.STOPPING, ready=False)
        elif not self._welcomed.is_set():
            self.pulse.turn(DaemonState.CONNECTING, f"the learner at {self.config.transport.address}", ready=False)
        elif not self._ready:
            self.pulse.turn(DaemonState.STARTING, "the engine", ready=False)
        elif self.sync.swapping:
            self.pulse.turn(DaemonState.SWAPPING, ready=True)
        elif held is None:
            self.pulse.turn(DaemonState.WAITING, "weights", ready=False)
        elif self.leases:
            self.pulse.turn(DaemonState.GENERATING, ready=True)
        else:
            self.pulse.turn(DaemonState.WAITING, "leases", ready=True)
        time_s = self.ledger.seconds()
        figures = GeneratorMetrics(
            tokens_generated=self.engine.tokens_generated,
            rollouts_completed=self.runner.rollouts_completed,
            generations_failed=self.runner.generations_failed,
            rewards_failed=self.runner.rewards_failed,
            time_s=time_s,
            busy_s=busy_s(time_s),
            idle_s=idle_s(time_s),
            engine_step_ms=self.engine.step_ms(),
            cpu_s=self._cpu_time.seconds(),
            leases=len(self.leases),
            outbox_bytes=self.session.outbox_bytes,
            held_version=held,
        )
        self.figures.replace(figures)

    def _beat(self) -> messages.Beat:
        time_s = self.ledger.seconds()
        self._announced_room = self._room()
        self._ended_since_beat = 0
        active = [messages.ActiveLease(*lease.key, lease.issued_version) for lease in self.leases]
        active += self.session.unacked_leases()
        return messages.Beat(
            run_epoch=self._run_epoch,
            sequences_wanted=self.leases.sequences_received + self._announced_room,
            active=active,
            tokens_generated=self.engine.tokens_generated,
            rollouts_completed=self.runner.rollouts_completed,
            rewards_failed=self.runner.rewards_failed,
            busy_s=busy_s(time_s),
            idle_s=idle_s(time_s),
            outbox_bytes=self.session.outbox_bytes,
            held_version=self.sync.held_version,
            generations_failed=self.runner.generations_failed,
            ready=self._ready,
            sequences_received=self.leases.sequences_received,
            tickets=[lease.ticket for lease in self.leases],
            time_s=time_s,
            engine_step_ms=self.engine.step_ms(),
            cpu_s=self._cpu_time.seconds(),
        )

    def _room(self) -> int:
        """Sequences that the learner may send leases for."""
        if not self._ready or self._stopping.is_set() or not self.session.has_room:
            return 0
        return self.leases.room()

    def _account(self) -> None:
        """Time goes to what the generator does now; to be called when that may have changed."""
        training, evaluating = self.leases.samples(LeaseKind.TRAIN), self.leases.samples(LeaseKind.EVAL)
        situation = Situation(
            ready=self._ready,
            swapping=self.sync.swapping,
            training=training,
            evaluating=evaluating,
            scoring=len(self.leases) > self.runner.num_unproven,
            in_hand=bool(self.leases),
            held=self.sync.held_version is not None,
            blocked=self.session.blocked,
            stopping=self._stopping.is_set(),
        )
        self.ledger.switch(activity_of(situation))

    # -- the engine ------------------------------------------------------------------------------------------------

    async def _run_engine(self) -> None:
        """Starts engine and rewards once the learner wants them, then watches.

        Ends the daemon when the engine is dead or wedged: half-alive is worse than gone.
        """
        await self._welcomed.wait()
        loop = asyncio.get_running_loop()
        started = loop.time()
        log.info("starting the engine")
        await asyncio.gather(self.rewards.start(), self.engine.start())
        log.info("engine ready after %.1f s", loop.time() - started)
        self._ready = True
        self._account()
        self._beat_soon.set()
        await watch_engine(self.engine, self.sync)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _until_stopping(self, loops: Sequence[asyncio.Task[None]]) -> None:
        """Returns once the daemon shall stop. Raises what ended one of its loops."""
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([stopped, *loops], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        for task in done:
            task.result()  # a loop only ends by an error: raise it here

    async def _drain(self) -> None:
        """Finishes what can be finished, hands back the rest, flushes the outbox."""
        if not self._run_finished:
            await self._until(lambda: not self.leases, self.config.generator.drain_timeout_s)
        await self.leases.give_back_all(self._why_stopping)
        if not self._run_finished:
            await self._until(lambda: self.session.outbox_bytes == 0, FLUSH_TIMEOUT_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._progress.clear()
                    await self._progress.wait()

    async def _end(self, loops: Sequence[asyncio.Task[None]]) -> None:
        """Ends the loops, and the work on leases where there was no time to drain."""
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await self.leases.give_back_all(self._why_stopping or "abandoned")

    async def _say_bye(self) -> None:
        self.link.send(messages.Bye(self._why_stopping or "failed"))
        await self.sync.close(SYNC_CLOSE_TIMEOUT_S)
        await self.link.close()
