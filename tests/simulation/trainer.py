"""A trainer for the simulation: one rank and its publisher, without torch.

Its policy is a chain of hashes: version v + 1 is the hash of version v and of the groups of its batch, in their order.
Two trainers that trained the same batches hold the same policy, and any difference shows in every later version. The
history of what was trained is part of the state, as the weights of a real one are, and goes into its checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.errors import CheckpointError
from asyncrl.link import trainer_messages
from asyncrl.link.codec import decode, decode_body
from asyncrl.link.messages import GroupResult, Message
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.checkpoint_files import find_latest, load_desk_state, write_checkpoint
from tests.simulation.engine import WeightChannel, canary_row, digests_of, weights_of
from tests.simulation.network import Dealer, Network
from tests.weights.manifests import manifest_of

FIGURES = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0}
ASK_AGAIN_S = 5.0
CANARY = [3, 1, 4, 1, 5]
STATE_FILE = "policy.json"


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """One group of one step: the version of the policy that it was trained on, and what it was."""

    version: int
    ordinal: int
    attempt: int
    samples: tuple[int, ...]  # the number of each completion
    labels: tuple[tuple[int, ...], ...]  # of each completion: the version that each token bears


@dataclass(slots=True)
class Policy:
    """The state of a trainer."""

    version: int = 0
    chain: bytes = b"initial"
    history: list[TrainedGroup] = field(default_factory=list)

    def train(self, bodies: list[bytes]) -> None:
        """One step."""
        groups = [result_to_group(decode_body(GroupResult, body)) for body in bodies]
        for group in groups:
            samples = tuple(int(rollout.token_ids[0]) for rollout in group.rollouts)
            labels = tuple(tuple(map(int, rollout.token_versions())) for rollout in group.rollouts)
            self.history.append(TrainedGroup(self.version, group.key.ordinal, group.key.attempt, samples, labels))
        self.chain = hashlib.sha256(self.chain + b"".join(bodies)).digest()
        self.version += 1

    def to_json(self) -> str:
        groups = [[g.version, g.ordinal, g.attempt, g.samples, g.labels] for g in self.history]
        return json.dumps({"version": self.version, "chain": self.chain.hex(), "history": groups})

    @classmethod
    def from_json(cls, text: str) -> Policy:
        saved = json.loads(text)
        history = [
            TrainedGroup(version, ordinal, attempt, tuple(samples), tuple(map(tuple, labels)))
            for version, ordinal, attempt, samples, labels in saved["history"]
        ]
        return cls(saved["version"], bytes.fromhex(saved["chain"]), history)


@dataclass(slots=True)
class TrainerPlace:
    """What a trainer needs of the world around it."""

    run_dir: Path
    network: Network
    channels: dict[str, WeightChannel]
    chance: random.Random
    keep: int
    computing: Callable[[], contextlib.AbstractContextManager[None]]  # while it lasts, fsyncs are the trainer's
    stepped: Callable[[Policy], None]
    step_s: float = 0.8


class Trainer:
    """One life of a trainer. `main` is its process."""

    def __init__(self, place: TrainerPlace) -> None:
        self.place = place
        self.policy = Policy()
        self.desk_state = b""
        self.run_epoch = 0
        self.published: Policy | None = None
        self.link = Dealer(place.network, "trainer", sent=_nothing, read=_nothing)
        self.publisher = Publisher(self)

    async def main(self) -> int:
        """Its exit code."""
        await asyncio.sleep(self.place.chance.uniform(0.05, 1.0))
        self._load()
        hello = trainer_messages.TrainerHello(0, 1, self.policy.version, 1)
        welcome = await self._ask(hello)
        assert isinstance(welcome, trainer_messages.TrainerWelcome), welcome
        self.run_epoch = welcome.run_epoch
        publishing = asyncio.create_task(self.publisher.main())
        if self.policy.version >= welcome.replay_to:
            self.publisher.publish(self.policy)
        try:
            while True:
                answer = await self._ask(trainer_messages.BatchRequest(0, self.policy.version))
                if isinstance(answer, trainer_messages.TrainerStop):
                    return self._finish(answer)
                if isinstance(answer, trainer_messages.Batch) and answer.version == self.policy.version:
                    await self._train(answer)
        finally:
            publishing.cancel()

    def kill(self) -> None:
        self.link.kill()
        self.publisher.kill()

    def _load(self) -> None:
        with self.place.computing():
            manifest = find_latest(self.place.run_dir / "checkpoints")
            if manifest is not None:
                self.policy = Policy.from_json((manifest.path / STATE_FILE).read_text())
                self.desk_state = load_desk_state(manifest)

    async def _train(self, batch: trainer_messages.Batch) -> None:
        await asyncio.sleep(self.place.chance.uniform(0.2, 1.0) * self.place.step_s)
        self.policy.train(batch.groups)
        self.desk_state = batch.desk_state
        self.place.stepped(self.policy)
        if batch.publish:
            self.publisher.publish(self.policy)
        self.link.send_message(trainer_messages.StepDone(self.policy.version, FIGURES, 0.1, {}))
        if batch.checkpoint:
            await asyncio.sleep(self.place.chance.uniform(0.0, 0.3))
            self._save()

    def _write_state(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(self.policy.to_json())

    def _save(self) -> None:
        path = error = ""
        try:
            with self.place.computing():
                path = str(
                    write_checkpoint(
                        self.place.run_dir / "checkpoints",
                        self.policy.version,
                        self._write_state,
                        run_epoch=self.run_epoch,
                        desk_state=self.desk_state,
                        keep=self.place.keep,
                    ).path
                )
        except CheckpointError as failure:
            if not isinstance(failure.__cause__, OSError):
                raise  # no disk does that: the test would go on without any checkpoint
            error = str(failure)
        self.link.send_message(trainer_messages.CheckpointDone(self.policy.version, path, error, 0.1))

    def _finish(self, stop: trainer_messages.TrainerStop) -> int:
        if stop.checkpoint and self.desk_state:
            self._save()
        return 0

    async def _ask(self, request: Message) -> Message:
        while True:
            self.link.send_message(request)
            for frame in await self.link.receive(ASK_AGAIN_S):
                return decode(frame, max_bytes=self.link.max_frame_bytes)


class Publisher:
    """Offers snapshots and broadcasts them, as `weights.publisher` does; every version whole."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._link = Dealer(trainer.place.network, "publisher", sent=_nothing, read=_nothing)
        self._fresh: tuple[int, bytes] | None = None
        self._offered: tuple[int, bytes] | None = None
        self._offer: trainer_messages.SnapshotReady | None = None
        self._wanted = True
        self._heard = False
        self._channels: dict[int, tuple[WeightChannel, tuple[int, bytes]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def publish(self, policy: Policy) -> None:
        self._fresh = policy.version, policy.chain
        self._offer_fresh()

    def kill(self) -> None:
        self._link.kill()
        for channel, _ in self._channels.values():
            channel.close("the trainer died")
        for task in self._tasks:
            task.cancel()

    async def main(self) -> None:
        try:
            while True:
                frames = await self._link.receive(1.0)
                for frame in frames:
                    self._heard = True
                    self._handle(decode(frame, max_bytes=self._link.max_frame_bytes))
                if not self._heard and self._offer is not None:
                    self._link.send_message(self._offer)
        finally:
            self.kill()

    def _offer_fresh(self) -> None:
        if not self._wanted or self._fresh is None:
            return
        self._offered, self._fresh, self._wanted = self._fresh, None, False
        version, chain = self._offered
        weights = weights_of(chain)
        row = canary_row(weights, CANARY).tobytes()
        canary = [np.array(CANARY, "<i4").tobytes()]
        self._offer = trainer_messages.SnapshotReady(
            version, manifest_of(version, digests_of(weights)), canary, [row], 1.0
        )
        self._link.send_message(self._offer)

    def _handle(self, message: Message) -> None:
        match message:
            case trainer_messages.SnapshotWanted():
                if self._offered is not None and message.version == self._offered[0]:
                    self._wanted = True
                    self._offer_fresh()
                elif self._offer is not None and message.version < self._offer.version:
                    self._link.send_message(self._offer)
                if message.open_channels is not None:
                    for epoch in self._channels.keys() - set(message.open_channels):
                        self._close(epoch)
            case trainer_messages.OpenChannel():
                assert self._offered is not None
                channel = self._trainer.place.channels[message.prefix] = WeightChannel(message.world_size)
                self._channels[message.channel_epoch] = channel, self._offered
                version = self._offered[0]
                self._link.send_message(
                    trainer_messages.ChannelReady(message.channel_epoch, "host", 1, "", "gloo", version)
                )
            case trainer_messages.Broadcast():
                task = asyncio.create_task(self._broadcast(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case trainer_messages.CloseChannel():
                self._close(message.channel_epoch)

    async def _broadcast(self, order: trainer_messages.Broadcast) -> None:
        error = self._cannot(order)
        if not error:
            channel, kept = self._channels[order.channel_epoch]
            try:
                async with asyncio.timeout(order.timeout_s):
                    while len(channel.waiting) < channel.world_size - 1 and not channel.closed:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(self._trainer.place.chance.uniform(0.01, 0.2))
            except TimeoutError:
                channel.close("not all members came")
            if channel.closed:
                error = "the channel broke"
            else:
                for future in channel.waiting.values():
                    if not future.done():
                        future.set_result(weights_of(kept[1]))
                channel.waiting.clear()
        self._link.send_message(
            trainer_messages.BroadcastDone(order.version, order.attempt, order.channel_epoch, error, 1.0, 192, 192)
        )

    def _cannot(self, order: trainer_messages.Broadcast) -> str:
        found = self._channels.get(order.channel_epoch)
        if found is None:
            return f"channel {order.channel_epoch} is not open"
        channel, kept = found
        if kept[0] != order.version:
            # A channel is kept from one broadcast to the next: it takes what is offered now.
            if self._offered is None or self._offered[0] != order.version:
                return f"version {order.version} was replaced"
            self._channels[order.channel_epoch] = channel, self._offered
        return ""

    def _close(self, channel_epoch: int) -> None:
        if (found := self._channels.pop(channel_epoch, None)) is not None:
            found[0].close("closed")


class SimulatedProcess(TrainerProcess):
    """The real watch over the trainer's process, and a task in the place of the process."""

    def __init__(self, place: TrainerPlace, max_restarts: int) -> None:
        super().__init__(
            place.run_dir / "config.yaml",
            "ipc",
            place.run_dir / "trainer.log",
            threads=1,
            max_restarts=max_restarts,
            weights_timeout_s=5.0,
            signal_group=lambda pid, number: self.die(-number),
        )
        self._place = place
        self.trainer: Trainer | None = None

    def start(self) -> None:
        self.trainer = Trainer(self._place)
        child: Any = _TaskAsProcess(self.trainer)
        self.ranks._children = [child]
        self._watched, self._restart_at = True, None

    def die(self, code: int) -> None:
        """The trainer's process ends at once."""
        child: Any
        for child in self.ranks._children:
            child.die(code)


class _TaskAsProcess:
    """What `TrainerProcess` uses of subprocess.Popen."""

    pid = 1

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._task = asyncio.create_task(trainer.main())
        self._killed: int | None = None

    def poll(self) -> int | None:
        if self._killed is not None:
            return self._killed
        if not self._task.done():
            return None
        if self._task.cancelled():
            return -int(signal.SIGKILL)
        if isinstance(error := self._task.exception(), ProcessDied):
            return -int(signal.SIGKILL)
        if error is not None:
            raise error
        return self._task.result()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("trainer", timeout_s or 0.0)
        return code

    def die(self, code: int) -> None:
        if self.poll() is None:
            self._killed = code
            self._task.cancel()
            self._trainer.kill()


class ProcessDied(BaseException):
    """SIGKILL, in the middle of a call. Nothing of the product may catch it."""


def _nothing(*_: object) -> None:
    """Nobody listens."""
