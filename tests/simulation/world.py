"""The whole of asyncrl in one thread and in virtual time: a desk, its trainer, generators, and everything that fails.

Real: the desk with all its parts, its journal and checkpoint files; the generator daemon with its session, leases and
weight phases; every frame is encoded and decoded. Simulated: the network, the disk's cache, the engine, the rewards,
the trainer's arithmetic, and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from asyncrl.config import Config
from asyncrl.desk.daemon import Surroundings, make_desk
from asyncrl.desk.desk import FROM_GENERATOR, FROM_TRAINER, Desk
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.restoring import restore_run
from asyncrl.errors import AsyncRLError, JournalError, Refused
from asyncrl.generator.assembly import _session
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.generator.identity import Identity
from asyncrl.link import messages
from asyncrl.link.codec import decode
from asyncrl.link.messages import Message
from asyncrl.storage.journal import Journal, next_run_epoch
from asyncrl.tasks.prompts import Prompt
from tests.desk.desk_parts import MetricsLog
from tests.simulation.checker import Checker, Violation, records_in
from tests.simulation.clock import START_S, VirtualLoop, virtual_time
from tests.simulation.disk import Disk
from tests.simulation.engine import VOCAB, Engine, EngineFaults, Rewards, Samples, WeightChannel
from tests.simulation.network import MAX_FRAME_BYTES, Dealer, Network, Router, Weather
from tests.simulation.trainer import Policy, ProcessDied, SimulatedProcess, TrainerPlace

HEALED_WITHIN_S = 400.0  # from the last fault to the end of the run; penalties in the weight sync take up to 120 s
FOLDERS = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(slots=True)
class Plan:
    """What happens in one run; drawn from its seed."""

    seed: int
    steps: int
    groups_per_step: int
    max_age: int
    num_generators: int
    keep: int
    checkpoint_every: int
    segment_bytes: int
    dynamic_sampling: bool
    num_evals: int
    weather: Weather
    engine: EngineFaults
    kinds: dict[str, float]  # fault -> weight
    faults_for_s: float
    pause_s: float  # mean between two faults

    @classmethod
    def of(cls, seed: int) -> Plan:
        chance = random.Random(f"plan {seed}")
        wild = chance.random() < 0.5
        weather = Weather(
            loss=chance.choice((0.0, 0.02, 0.1)),
            repeat=chance.choice((0.0, 0.05, 0.2)) if wild else 0.0,
            reorder=wild,
            delay_s=chance.choice((0.001, 0.02, 0.1)),
            spike=chance.choice((0.0, 0.02)),
        )
        engine = EngineFaults(
            stage_error=chance.choice((0.0, 0.1)),
            flip_bit=chance.choice((0.0, 0.0, 0.15)),
            stale_swap=chance.choice((0.0, 0.0, 0.15)),
            swap_error=chance.choice((0.0, 0.05)),
            swap_hang=chance.choice((0.0, 0.0, 0.03)),
            generate_error=chance.choice((0.0, 0.01)),
            reward_error=chance.choice((0.0, 0.03)),
        )
        kinds = {name: chance.choice((0.0, 1.0, 2.0)) for name in FAULTS}
        if not any(kinds.values()):
            kinds["desk"] = 1.0
        return cls(
            seed=seed,
            steps=chance.randint(4, 8),
            groups_per_step=chance.randint(1, 3),
            max_age=chance.randint(0, 2),
            num_generators=chance.randint(1, 3),
            keep=chance.randint(1, 2),
            checkpoint_every=chance.randint(1, 3),
            segment_bytes=chance.choice((1500, 4000, 1 << 20)),
            dynamic_sampling=chance.random() < 0.4,
            num_evals=chance.choice((0, 2)),
            weather=weather,
            engine=engine,
            kinds=kinds,
            faults_for_s=60.0,
            pause_s=chance.choice((0.5, 2.0, 5.0)),
        )


class Prompts:
    """Prompt n is [n + 1]."""

    def train(self, ordinal: int) -> Prompt:
        return Prompt(np.array([ordinal + 1], np.int32), {"index": ordinal})


class NoSignal:
    """In the place of StopSignal: nobody sends one."""

    fd = -1
    received = None


def make_config(plan: Plan, folder: Path) -> Config:
    config = Config()
    config.run.dir, config.run.steps, config.run.name = str(folder / "run"), plan.steps, "sim"
    config.model.path = str(folder / "model")
    config.learner.groups_per_step = plan.groups_per_step
    config.learner.max_trainer_restarts = 10_000
    config.sampling.group_size, config.sampling.max_new_tokens = 2, 4
    config.staleness.max_age = plan.max_age
    config.algorithm.dynamic_sampling = plan.dynamic_sampling
    config.generator.lease_timeout_s, config.generator.max_sequences = 20.0, 4
    config.generator.outbox_bytes = 4000
    config.transport.max_frame_bytes = MAX_FRAME_BYTES
    config.transport.credit_bytes = 4096
    config.weights.timeout_s, config.weights.cell_size = 3.0, 2
    config.checkpoint.every, config.checkpoint.keep = plan.checkpoint_every, plan.keep
    config.eval.prompts, config.eval.every = plan.num_evals, 3
    return config


class DeskLife:
    """One life of the desk, from its start to its death."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wake = asyncio.Event()
        self.journal: Journal | None = None
        self.process: SimulatedProcess | None = None
        self.steps_left: int | None = None
        self.loses_power = False
        self.desk: Desk | None = None

    def step(self) -> None:
        """A moment at which it may be killed."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left <= 0:
                raise ProcessDied

    def kill_after(self, steps: int, loses_power: bool) -> None:
        self.steps_left, self.loses_power = steps, loses_power
        self.wake.set()

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
        self.journal = Journal.open(run_dir / "journal", world.plan.segment_bytes, flush=world.disk.sync)
        run_epoch = next_run_epoch(run_dir)
        world.checker.on_disk(records_in(run_dir / "journal"))
        self.generators = self._router(world.network, world.desk_said)
        self.ranks = self._router(world.trainer_network, lambda peer, message: None)
        place = TrainerPlace(
            run_dir=run_dir,
            network=world.trainer_network,
            channels=world.channels,
            chance=world.chance,
            keep=world.plan.keep,
            computing=lambda: world.running(None),
            stepped=world.checker.trained,
        )
        self.process = SimulatedProcess(place, world.config.learner.max_trainer_restarts)
        self.process.start()
        state = restore_run(world.config, run_epoch, self.journal)
        evals = [Prompt(np.array([500 + n], np.int32), {"index": n}) for n in range(world.plan.num_evals)]
        prompts = LeasedPrompts(Prompts(), evals, state.leases)
        surroundings = Surroundings(self.generators, self.ranks, self.process, MetricsLog(), NoSignal())
        self.desk = make_desk(world.config, state, prompts, surroundings)

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
        desk._receive(self.generators, FROM_GENERATOR, desk._from_generator, now)
        desk._receive(self.ranks, FROM_TRAINER, desk._from_trainer, now)
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
        self.engine = Engine(
            name,
            incarnation,
            samples=world.samples,
            channels=world.channels,
            faults=world.engine_faults,
            chance=world.chance,
        )
        rewards = Rewards(world.engine_faults, world.chance)
        session = _session(world.config, Identity(name, incarnation, io.StringIO()))
        self.daemon = GeneratorDaemon(
            world.config, session, self.socket, self.engine, rewards, parts=GeneratorParts()
        )
        self._task = asyncio.create_task(self.daemon.run())
        self._last_swap: tuple[int, int, int] | None = None

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
            self._last_swap = message.run_epoch, message.version, message.attempt
        elif isinstance(message, messages.SyncAbort) and message.tainted:
            if (message.run_epoch, message.version, message.attempt) == self._last_swap:
                self._world.loop.call_later(1.0, self._forbid_sampling, self._last_swap)

    def _forbid_sampling(self, swap: tuple[int, int, int]) -> None:
        """Its weights were found wrong a second ago, and no other ones were sent since."""
        if swap == self._last_swap and self.engine.num_running >= 0:
            self.engine.must_not_sample_since = self._world.loop.time()


class World:
    """One run, from its seed. `run` raises Violation, or whatever the code under test raised that it must not."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.chance = random.Random(f"run {plan.seed}")
        self.folder = folder
        self.config = make_config(plan, folder)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "architectures": ["Sim"]}))
        (folder / "model" / "tokenizer.json").write_text("{}")
        (folder / "model" / "model.safetensors").touch()
        (folder / "run").mkdir(mode=0o700)
        self.samples = Samples()
        self.checker = Checker(self.samples, plan.max_age)
        self.disk = Disk(folder / "run", random.Random(f"disk {plan.seed}"), self._at_sync)
        self.channels: dict[str, WeightChannel] = {}
        self.engine_faults = plan.engine
        self.who_is: dict[int, tuple[str, int]] = {}
        self.generators: dict[str, list[GeneratorLife]] = {}
        self.incarnations: dict[str, int] = {}
        self.life: DeskLife | None = None
        self.last_trainer = None
        self.finished = False
        self.desk_stalls_until = 0.0
        self.counts: dict[str, int] = {"changes by power losses": 0, "desk lives": 0, "generator lives": 0}
        self.events: list[str] = []
        self._running: DeskLife | None = None
        self._digest = hashlib.sha256()

    # -- the run

    def run(self) -> None:
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with virtual_time() as loop, self.disk.attached():
                self.loop: VirtualLoop = loop
                loop.run_until_complete(self._main())
        finally:
            logging.disable(level)

    async def _main(self) -> None:
        self.network = Network(self.loop, self.chance)
        self.network.weather = self.plan.weather
        self.trainer_network = Network(self.loop, self.chance)
        tasks = [asyncio.create_task(self._keep_desk())]
        for number in range(self.plan.num_generators):
            tasks.append(asyncio.create_task(self._keep_generator(f"g{number}")))
        faults = asyncio.create_task(self._disturb())
        try:
            async with asyncio.timeout(self.plan.faults_for_s + HEALED_WITHIN_S):
                pending = {*tasks, faults}
                while not tasks[0].done():
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
        except TimeoutError:
            raise Violation(f"not finished {HEALED_WITHIN_S:.0f} s after the last fault; {self._describe()}") from None
        self._judge()

    def _judge(self) -> None:
        self.checker.on_disk(records_in(Path(self.config.run.dir) / "journal"))
        assert self.last_trainer is not None
        final: Policy = self.last_trainer.policy
        self.checker.end(final, self.plan.steps, self.plan.groups_per_step)

    async def _keep_desk(self) -> None:
        while True:
            self.life = DeskLife(self)
            self.counts["desk lives"] += 1
            self.trace("desk", b"", b"")
            if await self.life.run():
                self.finished = True
                return
            self.life = None
            self.network.router = self.trainer_network.router = None
            await asyncio.sleep(self.chance.choice((0.1, 1.0, 6.0)))

    async def _keep_generator(self, name: str) -> None:
        await asyncio.sleep(self.chance.uniform(0, 1.0))
        while not self.finished:
            life = self._start_generator(name)
            error = await life.ended()
            self._check_engine(life)
            if isinstance(error, AsyncRLError | None):
                await asyncio.sleep(self.chance.uniform(0.5, 3.0))
            else:
                raise error

    def _start_generator(self, name: str) -> GeneratorLife:
        self.incarnations[name] = self.incarnations.get(name, 0) + 1
        self.counts["generator lives"] += 1
        life = GeneratorLife(self, name, self.incarnations[name])
        self.generators.setdefault(name, []).append(life)
        return life

    def _check_engine(self, life: GeneratorLife) -> None:
        if life.engine.sampled_while_forbidden:
            raise Violation(f"{life.who} sampled under weights that were found wrong: {life.engine.sampled_while_forbidden}")

    # -- faults

    async def _disturb(self) -> None:
        until = self.loop.time() + self.plan.faults_for_s
        kinds = {name: weight for name, weight in self.plan.kinds.items() if weight}
        while self.loop.time() < until and not self.finished:
            await asyncio.sleep(self.chance.expovariate(1 / self.plan.pause_s))
            kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
            self.events.append(f"{self.loop.time() - START_S:.2f} {kind}")
            FAULTS[kind](self)
        self._heal()

    def _heal(self) -> None:
        self.events.append(f"{self.loop.time() - START_S:.2f} healed")
        self.network.weather = Weather()
        self.network.cut_off.clear()
        self.disk.fails = False
        faults = self.engine_faults
        faults.stage_error = faults.flip_bit = faults.stale_swap = faults.swap_error = faults.swap_hang = 0.0
        faults.generate_error = faults.reward_error = 0.0

    def kill_desk(self) -> None:
        if self.life is not None:
            self.life.kill_after(self.chance.choice((1, self.chance.randint(1, 80))), loses_power=False)

    def lose_power(self) -> None:
        if self.life is not None:
            self.life.kill_after(self.chance.choice((1, self.chance.randint(1, 80))), loses_power=True)

    def kill_trainer(self) -> None:
        if self.life is not None and self.life.process is not None:
            self.life.process.die(-9)

    def kill_generator(self) -> None:
        if life := self._some_generator():
            life.kill()

    def leave(self) -> None:
        """SIGTERM to a generator."""
        if life := self._some_generator():
            life.daemon.stop("signal")

    def replace_generator(self) -> None:
        """A second process comes under the name of one that lives on: nobody knew that it does."""
        if life := self._some_generator():
            self.loop.create_task(self._second_life(life.who[0]))

    async def _second_life(self, name: str) -> None:
        life = self._start_generator(name)
        await life.ended()
        self._check_engine(life)

    def partition(self) -> None:
        if life := self._some_generator():
            name = life.who[0]
            self.network.cut_off.add(name)
            self.loop.call_later(self.chance.choice((2.0, 8.0, 20.0)), self.network.cut_off.discard, name)

    def stall_desk(self) -> None:
        self.desk_stalls_until = self.loop.time() + self.chance.choice((0.5, 4.0, 16.0))

    def break_disk(self) -> None:
        self.disk.fails = True
        self.loop.call_later(self.chance.uniform(0.1, 2.0), setattr, self.disk, "fails", False)

    def _some_generator(self) -> GeneratorLife | None:
        alive = [life for lives in self.generators.values() for life in lives if life.alive]
        return self.chance.choice(alive) if alive else None

    # -- what happens where

    @contextlib.contextmanager
    def running(self, life: DeskLife | None) -> Iterator[None]:
        """While it lasts, the code of the desk runs; None: that of the trainer."""
        before, self._running = self._running, life
        try:
            yield
        finally:
            self._running = before

    def _at_sync(self, when: str) -> None:
        if self._running is not None:
            self._running.step()
        elif when == "before" and self.chance.random() < 0.02 and self.life is not None:
            # In the middle of a checkpoint; the desk goes too, because only then the disk may forget.
            self.life.kill_after(1, loses_power=True)
            raise ProcessDied
        if when == "after":
            self.checker.on_disk(records_in(Path(self.config.run.dir) / "journal"))

    def desk_said(self, peer: bytes, message: Message) -> None:
        self.trace(type(message).__name__, peer, b"")
        dealer = self.network.dealers.get(peer)
        if dealer is not None:
            self.checker.desk_said(self.who_is[id(dealer)], message)

    def trace(self, what: str, peer: bytes, frame: bytes) -> None:
        self._digest.update(f"{self.loop.time():.6f} {what} {peer!r} {len(frame)}\n".encode())

    @property
    def digest(self) -> str:
        """Of all that happened: two runs of one seed have the same."""
        return self._digest.hexdigest()[:16]

    def _describe(self) -> str:
        said = [f"version {self.checker.policies and max(self.checker.policies)}"]
        if self.life is not None and self.life.desk is not None:
            desk = self.life.desk
            said.append(desk.generators.describe())
            version = desk.ranks.waiting_version
            if version is not None:
                said.append(desk.state.buffer.waiting_for(version, desk.state.leases.running()))
        return "; ".join(said)


FAULTS: dict[str, Callable[[World], None]] = {
    "desk": World.kill_desk,
    "power": World.lose_power,
    "trainer": World.kill_trainer,
    "generator": World.kill_generator,
    "leave": World.leave,
    "replace": World.replace_generator,
    "partition": World.partition,
    "stall": World.stall_desk,
    "disk": World.break_disk,
}


def simulate(seed: int, change: Callable[[Plan], None] = lambda plan: None) -> World:
    """Runs one seed in a folder of its own. What it raises says how to repeat it."""
    plan = Plan.of(seed)
    change(plan)
    folder = Path(tempfile.mkdtemp(prefix="asyncrl-sim-", dir=FOLDERS))
    world = World(plan, folder)
    try:
        world.run()
    except BaseException as error:
        error.add_note(f"repeat: python -m tests.simulation.run --seed {seed}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return world
