"""The whole of asyncrl in one thread and in virtual time: a desk, its trainer, generators, and everything that fails.

Real: the desk with all its parts, its journal and checkpoint files; the generator daemon with its session, leases and
weight phases; every frame is encoded and decoded. Simulated: the network, the disk's cache, the engine, the rewards,
the trainer's arithmetic, and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from asyncrl.desk.opening import run_record
from asyncrl.errors import AsyncRLError
from asyncrl.link import trainer_messages
from asyncrl.link.messages import Message
from asyncrl.storage.journal import Journal
from tests.simulation.checker import Checker, Violation, records_in
from tests.simulation.clock import START_S, VirtualLoop, virtual_time
from tests.simulation.disk import Disk
from tests.simulation.engine import VOCAB, EngineFaults, Samples, WeightChannel
from tests.simulation.forger import Forger
from tests.simulation.lives import DeskLife, GeneratorLife
from tests.simulation.network import Network, Weather
from tests.simulation.plan import FAULT_KINDS, Plan, make_config
from tests.simulation.trainer import Policy, ProcessDied

HEALED_WITHIN_S = 400.0  # from the last fault to the end of the run; penalties in the weight sync take up to 120 s
MAX_FRAMES = 40_000  # of one run; the longest has a tenth of it
FOLDERS = "/dev/shm" if Path("/dev/shm").is_dir() else None


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
        self.sick = "g0" if plan.sick and plan.num_generators > 1 else ""
        if self.sick:
            plan.engine.reward_error = plan.engine.generate_error = 0.0
        self.sick_faults = replace(plan.engine, reward_error=1.0)
        self.forger: Forger | None = None
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
            with virtual_time() as loop, self.disk.attached(), self._journals(), self._config_texts():
                self.loop: VirtualLoop = loop
                loop.run_until_complete(self._main())
        finally:
            logging.disable(level)

    @contextlib.contextmanager
    def _journals(self) -> Iterator[None]:
        """While it lasts, journals are opened with small segments and on the simulated disk."""
        real, opened = vars(Journal)["open"], Journal.open

        def on_the_simulated_disk(folder: Path, *_: object, **options: object) -> Journal:
            options |= {"segment_bytes": self.plan.segment_bytes, "flush": self.disk.sync}
            return opened(folder, **options)

        Journal.open = on_the_simulated_disk
        try:
            yield
        finally:
            Journal.open = real

    @contextlib.contextmanager
    def _config_texts(self) -> Iterator[None]:
        """While it lasts, all starts of the desk write one text of `config.yaml`, made once: it is slow to make."""
        real, text = run_record.config_text, run_record.config_text(self.config)
        run_record.config_text = lambda _: text
        try:
            yield
        finally:
            run_record.config_text = real

    async def _main(self) -> None:
        self.network = Network(self.loop, self.chance)
        self.network.weather = self.plan.weather
        self.trainer_network = Network(self.loop, self.chance)
        keepers = [self._keep_desk(), *(self._keep_generator(f"g{n}") for n in range(self.plan.num_generators))]
        tasks = [asyncio.create_task(keeper) for keeper in keepers]
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
        self.look_at_disk()
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
            raise Violation(
                f"{life.who} sampled under weights that were found wrong: {life.engine.sampled_while_forbidden}"
            )

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
        self.sick_faults.reward_error = 0.0
        for faults in (self.engine_faults, self.sick_faults):
            self._heal_engines(faults)

    @staticmethod
    def _heal_engines(faults: EngineFaults) -> None:
        faults.stage_error = faults.flip_bit = faults.stale_swap = faults.swap_error = faults.swap_hang = 0.0
        faults.generate_error = faults.reward_error = 0.0

    def kill_desk(self) -> None:
        self._kill_desk(loses_power=False)

    def lose_power(self) -> None:
        self._kill_desk(loses_power=True)

    def kill_desk_then_lose_power(self) -> None:
        """What a killed desk had written and not synced is there for the next one, until the power goes."""
        if self.life is not None:
            self.life.kill_at_sync(self.chance.randint(1, 4), loses_power=False)
            self.loop.call_later(self.chance.uniform(1.0, 8.0), self.lose_power)

    def _kill_desk(self, loses_power: bool) -> None:
        if self.life is None:
            return
        if self.chance.random() < 0.4:
            self.life.kill_at_sync(self.chance.randint(1, 6), loses_power)
        else:
            self.life.kill_after(self.chance.choice((1, self.chance.randint(1, 80))), loses_power)

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
            self.loop.call_later(self.chance.choice((3.0, 18.0, 30.0)), self.network.cut_off.discard, name)

    def stall_desk(self) -> None:
        self.desk_stalls_until = self.loop.time() + self.chance.choice((0.5, 4.0, 16.0))

    def break_disk(self) -> None:
        self.disk.fails = True
        self.loop.call_later(self.chance.uniform(0.1, 2.0), setattr, self.disk, "fails", False)

    def forge(self) -> None:
        """Somebody who is admitted answers leases that others hold."""
        if self.forger is None:
            self.forger = Forger(self.network, self.config)
        self.loop.create_task(self.forger.forge(self.chance, self.checker))

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
            self._running.at_sync()
        elif when == "before" and self.chance.random() < 0.02 and self.life is not None:
            # In the middle of a checkpoint; the desk goes too, because only then the disk may forget.
            self.life.kill_after(1, loses_power=True)
            raise ProcessDied
        if when == "after":
            self.look_at_disk()

    def look_at_disk(self) -> None:
        """Tells the checker which records are durable by now."""
        self.checker.on_disk(records_in(self.disk.durable(Path(self.config.run.dir) / "journal", ".segment")))

    def desk_said(self, peer: bytes, message: Message) -> None:
        self.trace(type(message).__name__, peer, b"")
        if self.network.num_carried > MAX_FRAMES:
            raise Violation(f"{MAX_FRAMES} frames, and no end: the run goes round in circles")
        who = self.who_is.get(id(self.network.owners.get(peer)))  # None: the forger
        if who is None:
            return
        if peer in self.network.dealers:
            self.checker.desk_said(who, message)
        else:
            self.checker.desk_said_in_vain(who, message)

    def desk_told_trainer(self, peer: bytes, message: Message) -> None:
        if isinstance(message, trainer_messages.Batch):
            self.checker.batch_dealt(message)

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
    "desk, then power": World.kill_desk_then_lose_power,
    "trainer": World.kill_trainer,
    "generator": World.kill_generator,
    "leave": World.leave,
    "replace": World.replace_generator,
    "partition": World.partition,
    "stall": World.stall_desk,
    "disk": World.break_disk,
    "forge": World.forge,
}
assert tuple(FAULTS) == FAULT_KINDS


def simulate(seed: int, change: Callable[[Plan], None] = lambda plan: None) -> World:
    """Runs one seed in a folder of its own. What it raises says how to repeat it."""
    plan = Plan.of(seed)
    change(plan)
    folder = Path(tempfile.mkdtemp(prefix="simulated-run-", dir=FOLDERS))
    world = World(plan, folder)
    try:
        world.run()
    except BaseException as error:
        error.add_note(f"repeat: python -m tests.simulation.run --seed {seed}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return world
