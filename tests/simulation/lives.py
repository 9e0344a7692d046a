"""The processes of a simulated run, each from its start to its end: the learner with its trainer, and a generator."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asyncrl.desk.daemon import Surroundings, make_desk
from asyncrl.desk.desk import FROM_GENERATOR, FROM_TRAINER, Desk
from asyncrl.desk.opening.restoring import restore_run
from asyncrl.desk.opening.run_folder import open_run
from asyncrl.desk.opening.run_record import write_record
from asyncrl.desk.prompts import LeasedPrompts, MadeAtOnce
from asyncrl.errors import JournalError
from asyncrl.generator.assembly import _session
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.generator.identity import Identity
from asyncrl.link import messages
from asyncrl.link.codec import decode
from asyncrl.link.messages import Message
from asyncrl.storage.journal import Journal
from asyncrl.tasks.prompts import Prompt
from tests.desk.desk_parts import MetricsLog
from tests.simulation.checker import Violation
from tests.simulation.engine import Engine, Rewards
from tests.simulation.network import MAX_FRAME_BYTES, Dealer, Network, Router
from tests.simulation.trainer import ProcessDied, SimulatedProcess, TrainerPlace

if TYPE_CHECKING:
    from tests.simulation.world import World


class Prompts:
    """Prompt n is [n + 1]."""

    def train(self, ordinal: int) -> Prompt:
        return Prompt(np.array([ordinal + 1], np.int32), {"index": ordinal})


class NoSignal:
    """In the place of StopSignal: nobody sends one."""

    fd = -1
    received = None


class DeskLife:
    """One life of the desk, from its start to its death."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wake = asyncio.Event()
        self.journal: Journal | None = None
        self.process: SimulatedProcess | None = None
        self.steps_left: int | None = None
        self.syncs_left: int | None = None  # moments before or after an fsync
        self.loses_power = False
        self.desk: Desk | None = None

    def step(self) -> None:
        """A moment at which it may be killed."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left <= 0:
                raise ProcessDied

    def at_sync(self) -> None:
        """A moment just before or after an fsync."""
        if self.syncs_left is not None:
            self.syncs_left -= 1
            if self.syncs_left <= 0:
                raise ProcessDied
        self.step()

    def kill_after(self, steps: int, loses_power: bool) -> None:
        self.steps_left, self.loses_power = steps, loses_power
        self.wake.set()

    def kill_at_sync(self, syncs: int, loses_power: bool) -> None:
        self.syncs_left, self.loses_power = syncs, loses_power

    async def run(self) -> bool:
        """Serves to the end of the run (True) or of this process (False)."""
        world = self.world
        try:
            with world.running(self):
                self._start()
            desk = self.desk
            assert desk is not None
            while True:
                with world.running(self):
                    if self._turn(desk):
                        return True
                    timeout_s = desk._timeout(world.loop.time())
                if self.generators.readable or self.ranks.readable:
                    timeout_s = 0.0
                await self._sleep(timeout_s)
        except ProcessDied:
            return False
        except JournalError as error:
            if world.disk.fails:
                return False
            raise Violation(f"the desk ends: {error}") from error
        finally:
            self._end()

    def _start(self) -> None:
        world = self.world
        run_dir = Path(world.config.run.dir)
        run = open_run(world.config)
        self.journal = run.journal
        world.look_at_disk()
        run_epoch = run.begin(run_dir, world.loop.time())
        write_record(run_dir, world.config, run.record)
        self.generators = self._router(world.network, world.desk_said)
        self.ranks = self._router(world.trainer_network, world.desk_told_trainer)
        place = TrainerPlace(
            run_dir=run_dir,
            network=world.trainer_network,
            channels=world.channels,
            chance=world.chance,
            keep=world.plan.keep,
            computing=lambda: world.running(None),
            stepped=world.checker.trained,
            step_s=world.plan.step_s,
        )
        self.process = SimulatedProcess(place, world.config.learner.max_trainer_restarts)
        self.process.start()
        state = restore_run(world.config, run_epoch, run.journal, run.saved)
        evals = [Prompt(np.array([500 + n], np.int32), {"index": n}) for n in range(world.plan.num_evals)]
        prompts = LeasedPrompts(MadeAtOnce(Prompts(), evals), state.leases)
        surroundings = Surroundings(self.generators, self.ranks, self.process, MetricsLog(), NoSignal())
        self.desk = make_desk(world.config, state, prompts, surroundings)
        self.desk.boundary._fence = _not_handled

    def _router(self, network: Network, sent: Callable[[bytes, Message], None]) -> Router:
        return Router(
            network,
            self.world.chance,
            step=self.step,
            wake=self.wake.set,
            sent=sent,
            read=lambda peer, frame: self.world.trace("read", peer, frame),
        )

    def _turn(self, desk: Desk) -> bool:
        """One round of `Desk.run`."""
        now = self.world.loop.time()
        self.step()
        desk.boundary.from_generators(self.generators, FROM_GENERATOR, desk._from_generator, now)
        desk.boundary.from_ranks(self.ranks, FROM_TRAINER, desk._from_trainer, now)
        if desk._over(now):
            return True
        desk._tick(now)
        return False

    async def _sleep(self, timeout_s: float) -> None:
        self.wake.clear()
        if timeout_s <= 0:
            await asyncio.sleep(0.0005)  # a turn takes time
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.wake.wait()
        if self.world.desk_stalls_until > self.world.loop.time():
            await asyncio.sleep(self.world.desk_stalls_until - self.world.loop.time())

    def _end(self) -> None:
        """The kernel takes the trainer along and closes the files."""
        if self.process is not None:
            if self.process.trainer is not None:
                self.world.last_trainer = self.process.trainer
            self.process.die(-9)
        if self.journal is not None:
            self.journal.close()
        for router in (getattr(self, "generators", None), getattr(self, "ranks", None)):
            if router is not None:
                router.close()
        if self.loses_power:
            self.world.counts["changes by power losses"] += self.world.disk.lose_power()


class GeneratorLife:
    """One life of a generator: its incarnation."""

    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.who = name, incarnation
        self.socket = Dealer(
            world.network,
            name,
            sent=lambda frame: world.checker.generator_sent(self.who, frame),
            read=self._read,
        )
        world.who_is[id(self.socket)] = self.who
        self._world = world
        faults = world.sick_faults if name == world.sick else world.engine_faults
        self.engine = Engine(
            name,
            incarnation,
            samples=world.samples,
            channels=world.channels,
            faults=faults,
            chance=world.chance,
        )
        rewards = Rewards(faults, world.chance)
        session = _session(world.config, Identity(name, incarnation, io.StringIO()))
        self.daemon = GeneratorDaemon(world.config, session, self.socket, self.engine, rewards, parts=GeneratorParts())
        self._task = asyncio.create_task(self.daemon.run())
        self._last_swap: tuple[int, int, int] | None = None
        self._swaps_before = 0  # of the engine, when that one was read

    async def ended(self) -> BaseException | None:
        """Waits for the end of the process; what ended it, None after a kill or at the end of the run."""
        await asyncio.wait([self._task])
        self.socket.kill()
        await self.engine.close()
        return None if self._task.cancelled() else self._task.exception()

    @property
    def alive(self) -> bool:
        return not self._task.done() and self.socket.open

    def kill(self) -> None:
        """SIGKILL: nothing more leaves it; what its tasks do while they are taken down stays inside."""
        self.socket.kill()
        self._task.cancel()

    def _read(self, frame: bytes) -> None:
        self._world.checker.generator_read(self.who, frame)
        message = decode(frame, max_bytes=MAX_FRAME_BYTES)
        if isinstance(message, messages.SyncSwap):
            swap = message.run_epoch, message.version, message.attempt
            if swap != self._last_swap:
                self._last_swap, self._swaps_before = swap, self.engine.num_swaps
        elif isinstance(message, messages.SyncAbort) and message.tainted:
            # The engine has a second to obey; a later swap makes it good again.
            self._world.loop.call_later(
                1.0, self._forbid_sampling, (message.run_epoch, message.version, message.attempt)
            )

    def _forbid_sampling(self, swap: tuple[int, int, int]) -> None:
        """Its weights were found wrong a second ago, and no other ones were sent since.

        A swap of what is not staged changes nothing: the weights of before are proven, and go on being sampled from.
        """
        if swap == self._last_swap and self.engine.num_swaps > self._swaps_before:
            self.engine.must_not_sample_since = self._world.loop.time()


def _not_handled(peer: bytes, error: Exception, now: float) -> None:
    """No honest generator may be fenced because the desk could not handle what it said."""
    raise Violation(f"a message of an honest generator broke the desk: {error!r}") from error
