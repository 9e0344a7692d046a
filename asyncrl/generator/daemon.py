"""The generator daemon: takes leases, keeps the engine full, streams scored groups, follows the learner's policy.

    loop          consumes                    produces                     waits at most for
    ------------  --------------------------  ---------------------------  -----------------------------------------
    link          frames from the learner     leases, syncs, acks          the session's next deadline
    lease (many)  one lease                   one group or one failure     the lease's deadline
    beat          counters                    Beat, once a second          -
    engine        a welcome                   a started engine             its start's deadline
                  progress of the engine      exit 5: wedged or dead       the probe's deadline

Everything runs in one event loop, the beat included: a wedged loop stops beating, and the learner notices.
The link comes first and the engine, which takes many seconds, after the welcome: an address that does not answer and a
model that does not fit are told at once. Until the engine is up, beats say so and nothing is offered or leased.

Shutdown: a signal (or the learner's Stop) ends the wish for leases → running ones finish or are handed back →
the outbox is flushed → Bye. All of it within `generator.drain_timeout_s` + 2 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.config import Config
from asyncrl.config.host_checks import has_gpu
from asyncrl.errors import PeerUnreachable, ProtocolError, Refused
from asyncrl.generator.engines.base import RolloutEngine
from asyncrl.generator.engines.vllm.engine import VLLMEngine
from asyncrl.generator.engines.vllm.options import EngineOptions
from asyncrl.generator.engines.watch import watch_engine
from asyncrl.generator.identity import Identity, claim_identity
from asyncrl.generator.lease_runner import LeaseFailure, LeaseRunner, no_text
from asyncrl.generator.weight_phases import WeightSync
from asyncrl.host.fingerprints import model_folder_fingerprint, tokenizer_fingerprint
from asyncrl.host.processes import StopSignal, pin_to
from asyncrl.link import messages
from asyncrl.link.codec import decode, encode
from asyncrl.link.curve_keys import client_auth
from asyncrl.link.messages import Message
from asyncrl.link.rollouts import grant_to_lease, group_to_result
from asyncrl.link.session import GeneratorSession, GeneratorState
from asyncrl.link.sockets import AsyncClientSocket
from asyncrl.rewards.parts import make_parts
from asyncrl.rewards.pool import RewardPool
from asyncrl.tasks.prompts import load_tokenizer
from asyncrl.types import Group, Lease, LeaseKey, LeaseKind

log = logging.getLogger(__name__)

FROM_DESK = frozenset(
    {
        messages.Welcome,
        messages.Refused,
        messages.LeaseGrant,
        messages.Ack,
        messages.Nack,
        messages.SyncOffer,
        messages.SyncSwap,
        messages.SyncCommit,
        messages.SyncAbort,
        messages.Stop,
        messages.Abandon,
    }
)
BEAT_S = 1.0
BEAT_GATHER_S = 0.01  # leases that end together ask for the next ones together
LINK_WAIT_S = 0.5
FLUSH_TIMEOUT_S = 1.0
SYNC_CLOSE_TIMEOUT_S = 0.5  # to be quiet, not to be right: the engine's processes end next
SAY_UNREACHABLE_EVERY_S = 10.0
MAX_DETAIL = 500
MAX_IN_HAND = 4  # sequences of all leases, finished ones included, per sequence of capacity: bounds memory
BACKLOG_SHARE = 0.25  # leases waiting behind a full engine, so that it never runs dry between two grants


class GeneratorDaemon:
    """One generator: an engine, its rewards, and the link to the learner."""

    def __init__(
        self,
        config: Config,
        session: GeneratorSession,
        socket: AsyncClientSocket,
        engine: RolloutEngine,
        rewards: RewardPool,
    ) -> None:
        self.config = config
        self.session = session
        self.socket = socket
        self.engine = engine
        self.rewards = rewards
        self.sync = WeightSync(engine, self._send)
        self.runner = LeaseRunner(
            engine,
            rewards,
            self.sync,
            commit_timeout_s=2 * config.weights.timeout_s,
            on_sequence_end=self._sequence_ended,
            prompt_text=_prompt_text(config),
        )
        self.leases: dict[LeaseKey, Lease] = {}
        self._tasks: dict[LeaseKey, asyncio.Task[None]] = {}
        self._sequences_received = 0
        self._announced_room = self._ended_since_beat = 0  # sequences
        self._run_epoch = 0
        self._welcomed = asyncio.Event()
        self._ready = False
        self._stopping = asyncio.Event()
        self._why_stopping = ""
        self._run_finished = False
        self._progress = asyncio.Event()  # a lease ended or an acknowledgement came: who drains looks again
        self._beat_soon = asyncio.Event()
        self._busy_s, self._idle_s, self._since = 0.0, 0.0, time.monotonic()

    async def run(self) -> int:
        """Serves until the run is over or a signal comes. Returns 0; raises what ended it otherwise."""
        loops = [asyncio.create_task(loop()) for loop in (self._link, self._beats, self._run_engine)]
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([stopped, *loops], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop only ends by an error: raise it here
            await self._drain()
        finally:
            tasks = [stopped, *loops, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._send(messages.Bye(self._why_stopping or "failed"))
            await self.sync.close(SYNC_CLOSE_TIMEOUT_S)
            await self.socket.close(flush_s=FLUSH_TIMEOUT_S / 2)
        return 0

    def stop(self, why: str, *, run_finished: bool = False) -> None:
        """No more leases from now on; `run` drains and returns."""
        if not self._stopping.is_set():
            log.info("stopping: %s", why)
        self._why_stopping, self._run_finished = why, run_finished or self._run_finished
        self._stopping.set()

    # -- link ------------------------------------------------------------------------------------------------------

    async def _link(self) -> None:
        """Frames in, whatever is due out."""
        said_at = time.monotonic()
        while True:
            now = time.monotonic()
            said_at = self._check_reachable(now, said_at)
            if self.session.reconnect_due(now):
                self.socket.reconnect()
                self.session.reconnected(now)
            self._pump(now)
            wait_s = max(0.0, min(self.session.next_due(now) - now, LINK_WAIT_S))
            for frame in await self.socket.receive(wait_s):
                try:
                    self._handle(frame)
                except ProtocolError as error:
                    log.warning("frame from the learner dropped: %s", error)

    def _check_reachable(self, now: float, said_at: float) -> float:
        """Says every 10 s that the learner does not answer, and gives up after the configured time."""
        silence_s = self.session.silence_s(now)
        address, limit_s = self.config.transport.address, self.config.generator.unreachable_timeout_s
        if silence_s >= limit_s:
            raise PeerUnreachable(
                f"no answer from the learner at {address} for {silence_s:.0f} s "
                f"(generator.unreachable_timeout_s={limit_s:g}); is asyncrl-learner running there?"
            )
        if silence_s >= SAY_UNREACHABLE_EVERY_S and now - said_at >= SAY_UNREACHABLE_EVERY_S:
            link = self.socket.link
            log.warning(
                "no answer from the learner at %s for %.0f s (limit %g s): %s", address, silence_s, limit_s, link
            )
            return now
        return said_at

    def _pump(self, now: float) -> None:
        self.session.held_version = self.sync.held_version
        for frame in self.session.due(now):
            self.socket.send(frame)

    def _send(self, message: Message) -> None:
        """Best effort: a full queue drops it, and whatever matters is repeated (session) or times out (sync)."""
        if not self.socket.send(encode(message, max_bytes=self.config.transport.max_frame_bytes)):
            log.debug("send queue full, %s dropped", type(message).__name__)

    def _handle(self, frame: bytes) -> None:
        message = decode(frame, max_bytes=self.config.transport.max_frame_bytes, allowed=FROM_DESK)
        if not self.session.receive(message, time.monotonic()):
            return  # of an earlier run epoch, or out of turn
        if self.session.state is GeneratorState.REFUSED:
            # Also for a welcome: the session refuses what does not fit this end.
            raise _refused(self.session.refusal)
        match message:
            case messages.Welcome():
                self._welcome(message)
            case messages.LeaseGrant():
                self._take(grant_to_lease(message))
            case messages.Ack():
                self._progress.set()
            case messages.Nack():
                log.warning("result %d refused (%s): %s", message.seq, message.code, message.reason)
                self._progress.set()
            case messages.Abandon():
                self._abandon([to_key(item) for item in message.leases])
            case messages.Stop():
                self._learner_stops(message)
            case messages.SyncOffer() | messages.SyncSwap() | messages.SyncCommit() | messages.SyncAbort():
                self.sync.handle(message)

    def _welcome(self, welcome: messages.Welcome) -> None:
        if welcome.run_epoch != self._run_epoch:
            log.info("welcome from %s, run epoch %d, version %d", welcome.run_name, welcome.run_epoch, welcome.version)
            self._run_epoch, self._sequences_received = welcome.run_epoch, 0
        self._welcomed.set()
        self._beat_soon.set()

    def _learner_stops(self, stop: messages.Stop) -> None:
        if stop.finished:
            self.stop(stop.reason, run_finished=True)
        else:
            log.info("the learner went away (%s); keeping on until it returns", stop.reason)

    # -- leases ----------------------------------------------------------------------------------------------------

    def _take(self, lease: Lease) -> None:
        self._sequences_received += lease.num_sequences
        if lease.key in self.leases:
            return
        self._clock_engine()
        self.leases[lease.key] = lease
        self._tasks[lease.key] = asyncio.create_task(self._work(lease))

    async def _work(self, lease: Lease) -> None:
        """One lease to its end: a group or a failure goes to the outbox."""
        try:
            outcome = await self.runner.run(lease)
        except asyncio.CancelledError:
            outcome = LeaseFailure("returned", self._why_stopping or "abandoned")
        except Exception as error:  # a bug in a task must not leave the lease hanging until its deadline
            log.exception("lease %s failed", lease.key)
            outcome = LeaseFailure("engine", f"{type(error).__name__}: {error}")
        self._clock_engine()
        del self.leases[lease.key], self._tasks[lease.key]
        self._report(lease.key, outcome)

    def _report(self, key: LeaseKey, outcome: Group | LeaseFailure) -> None:
        def result(seq: int, run_epoch: int) -> Message:
            if isinstance(outcome, Group):
                return group_to_result(outcome, seq, run_epoch)
            return messages.LeaseFailed(
                seq, run_epoch, key.kind, key.ordinal, key.attempt, outcome.reason, outcome.detail[:MAX_DETAIL]
            )

        self.session.put(result, time.monotonic())
        self._pump(time.monotonic())
        self._progress.set()
        if not self.leases or self._announced_room == 0 or isinstance(outcome, LeaseFailure):
            self._beat_soon.set()  # in all other cases its sequences asked for more when they ended

    def _sequence_ended(self) -> None:
        """Asks for the next lease when there is room for one, which may be long before a lease in hand ends."""
        self._ended_since_beat += 1
        if self._ended_since_beat >= self.config.sampling.group_size:
            self._beat_soon.set()

    def _abandon(self, keys: list[LeaseKey]) -> None:
        for key in keys:
            if task := self._tasks.get(key):
                task.cancel()

    def _room(self) -> int:
        """Sequences it could take now, a small backlog behind the full engine included."""
        if not self._ready or self._stopping.is_set() or not self.session.has_room:
            return 0
        capacity = math.ceil(self.config.generator.max_sequences * (1 + BACKLOG_SHARE))
        # A group ends with its longest sequence. Room counted by whole leases would leave the others' slots empty.
        left = sum(self.runner.sequences_left(lease) for lease in self.leases.values())
        in_hand = sum(lease.num_sequences for lease in self.leases.values())
        return max(0, min(capacity - left, MAX_IN_HAND * capacity - in_hand))

    # -- beats and probes ------------------------------------------------------------------------------------------

    async def _beats(self) -> None:
        """Once a second, and soon after room came up, so that the next lease comes before the engine runs dry."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._beat_soon.wait()
                    await asyncio.sleep(BEAT_GATHER_S)
            self._beat_soon.clear()
            if self._ready:
                # Also without leases, when no probe is due: a learner must not go on offering weights to a dead engine.
                self.engine.check_alive()
            if self.session.welcomed:
                self._send(self._beat())

    def _beat(self) -> messages.Beat:
        self._clock_engine()
        self._announced_room, self._ended_since_beat = self._room(), 0
        active = [[*key, lease.issued_version] for key, lease in self.leases.items()]
        active += self.session.unacked_leases()
        return messages.Beat(
            run_epoch=self._run_epoch,
            sequences_wanted=self._sequences_received + self._announced_room,
            active=active,
            tokens_generated=self.engine.tokens_generated,
            rollouts_completed=self.runner.rollouts_completed,
            rewards_failed=self.runner.rewards_failed,
            busy_s=self._busy_s,
            idle_s=self._idle_s,
            outbox_bytes=self.session.outbox_bytes,
            held_version=self.sync.held_version,
            generations_failed=self.runner.generations_failed,
            ready=self._ready,
            sequences_received=self._sequences_received,
        )

    def _clock_engine(self) -> None:
        """Adds the time since the last call to busy or idle, by what the engine had to do in it."""
        now = time.monotonic()
        if not self._ready:
            pass  # starting is neither
        elif self.leases:
            self._busy_s += now - self._since
        else:
            self._idle_s += now - self._since
        self._since = now

    async def _run_engine(self) -> None:
        """Starts engine and rewards once the learner wants them, then watches.

        Ends the daemon when the engine is dead or wedged: half-alive is worse than gone.
        """
        await self._welcomed.wait()
        started = time.monotonic()
        log.info("starting the engine")
        await asyncio.gather(self.rewards.start(), self.engine.start())
        log.info("engine ready after %.1f s", time.monotonic() - started)
        self._clock_engine()
        self._ready = True
        self._beat_soon.set()
        await watch_engine(self.engine, self.sync)

    # -- end -------------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Finishes what can be finished, hands back the rest, flushes the outbox."""
        if not self._run_finished:
            await self._until(lambda: not self._tasks, self.config.generator.drain_timeout_s)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if not self._run_finished:
            await self._until(lambda: self.session.outbox_bytes == 0, FLUSH_TIMEOUT_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._progress.clear()
                    await self._progress.wait()


def _refused(refusal: messages.Refused | None) -> Refused:
    assert refusal is not None, "the session is refused and does not say why"
    return Refused(
        f"learner and generator do not fit ({refusal.code}): {refusal.reason}; "
        f"the learner has {refusal.expected!r}, here is {refusal.got!r}"
    )


def to_key(item: list[Any]) -> LeaseKey:
    """LeaseKey of a [kind, ordinal, attempt] from the wire. Raises ProtocolError when it is none."""
    try:
        kind, ordinal, attempt = item
        return LeaseKey(LeaseKind(kind), int(ordinal), int(attempt))
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{item!r} is not [kind, ordinal, attempt]: {error}") from None


def run_generator(config: Config) -> int:
    """Runs one generator daemon to its end. Returns its exit code; raises AsyncRLError for what ended it."""
    pin_to(config.generator.cpus, "generator.cpus")
    identity = claim_identity(Path(config.run.dir) / "generators", config.generator.id)
    log.info("generator %s, incarnation %d", identity.generator_id, identity.incarnation)
    return asyncio.run(_serve(config, identity, StopSignal()))


async def _serve(config: Config, identity: Identity, stop: StopSignal) -> int:
    """Builds the parts, runs the daemon, takes the parts down again."""
    daemon = build_generator(config, identity)
    asyncio.get_running_loop().add_reader(stop.fd, daemon.stop, "signal")
    try:
        return await daemon.run()
    finally:
        asyncio.get_running_loop().remove_reader(stop.fd)
        await daemon.rewards.close()
        await daemon.engine.close()


def build_generator(config: Config, identity: Identity) -> GeneratorDaemon:
    """A generator and its parts, none of them started; inside a running event loop.

    The caller runs it, and afterwards closes its `rewards` and its `engine`.
    """
    engine = VLLMEngine(_engine_options(config, identity))
    rewards = RewardPool(
        config.task.path,
        config.task.args,
        config.generator.reward_workers,
        config.generator.reward_timeout_s,
        parts=config.reward.parts,
        weights=config.reward.weights,
        log_prefix=str(Path(config.run.dir) / "generators" / identity.generator_id),
    )
    return GeneratorDaemon(config, _session(config, identity), _connect(config), engine, rewards)


def _prompt_text(config: Config) -> Callable[[np.ndarray], str]:
    """How parts of the reward get to see a prompt; a tokenizer is loaded only when one of them wants to."""
    if not any(part.needs_prompt for part in make_parts(config.reward.parts).values()):
        return no_text
    tokenizer = load_tokenizer(config.model.path)
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)


def _engine_options(config: Config, identity: Identity) -> EngineOptions:
    generator = config.generator
    on_gpu = generator.device == "cuda" or (generator.device == "auto" and has_gpu())
    return EngineOptions(
        model_path=config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_length,
        max_sequences=generator.max_sequences,
        tensor_parallel_size=generator.tensor_parallel_size,
        kv_cache_bytes=None if on_gpu else int(generator.kv_cache_gib * 2**30),
        gpu_memory_fraction=generator.gpu_memory_fraction,
        device="cuda" if on_gpu else "cpu",
        enforce_eager=generator.compile == "never" or (generator.compile == "auto" and not on_gpu),
        threads=generator.threads,
        weights_timeout_s=config.weights.timeout_s,
        # Another stream for each generator and each of its lives, and for each run.seed.
        seed=zlib.crc32(f"{config.run.seed}/{identity.generator_id}/{identity.incarnation}".encode()),
        log_path=str(Path(config.run.dir) / "generators" / f"{identity.generator_id}.vllm.log"),
    )


def _connect(config: Config) -> AsyncClientSocket:
    transport = config.transport
    return AsyncClientSocket(transport.address, max_frame_bytes=transport.max_frame_bytes, auth=client_auth(transport))


def _session(config: Config, identity: Identity) -> GeneratorSession:
    hello = messages.Hello(
        protocol=messages.PROTOCOL_VERSION,
        generator_id=identity.generator_id,
        incarnation=identity.incarnation,
        max_run_epoch=0,
        model_fingerprint=model_folder_fingerprint(config.model.path),
        tokenizer_fingerprint=tokenizer_fingerprint(Path(config.model.path)),
        task=config.task.path,
        num_workers=config.generator.tensor_parallel_size,
        first_unacked_seq=1,
    )
    return GeneratorSession(
        hello,
        run_name=config.run.name,
        outbox_bytes=config.generator.outbox_bytes,
        max_frame_bytes=config.transport.max_frame_bytes,
        now=time.monotonic(),
    )
