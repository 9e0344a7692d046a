"""Generators and a trainer that only talk: real sockets and messages, no engine, no model, no task.

`python -m benchmarks.faults.stub_fleet ROLLOUT_ADDRESS TRAINER_ADDRESS OPTIONS` runs them in one process of one thread,
so that what is measured in the desk's process is the desk alone. `make_stub_desk` makes the real desk around them.
OPTIONS is a JSON object: {"generators", "room" (leases each), "work_s", "bad" (of the last generator: a reason, or
"invalid", "silence"), "trains"}.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from asyncrl.config import Config
from asyncrl.desk.counters import Counters
from asyncrl.desk.daemon import Surroundings, make_desk
from asyncrl.desk.desk import Desk
from asyncrl.desk.prompts import LeasedPrompts, MadeAtOnce
from asyncrl.desk.run_state import PolicyVersions, RunState
from asyncrl.link import messages, trainer_messages
from asyncrl.link.codec import decode, encode
from asyncrl.link.desk_session import DeskSessions, Expected
from asyncrl.link.messages import BitsInUse
from asyncrl.link.rollouts import group_to_result
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.weight_records import ALIGNMENT, WeightLayout, WeightManifest
from asyncrl.link.wire_types import FailureReason, SyncPhase
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.tickets import Tickets
from asyncrl.storage.journal import Journal
from asyncrl.tasks.prompts import Prompt
from asyncrl.types import FinishReason, Group, LeaseKey, Rollout, VersionSpan

MAX_FRAME_BYTES = 2**24
GROUP_SIZE = 4
NUM_TOKENS = 32
CANARY = np.zeros(2, dtype="<i4").tobytes()
LOGPROBS = np.zeros(1, dtype="<f4").tobytes()
FIGURES = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0}


class StubPrompts:
    """Prompt n is [n % 50, 1]."""

    def train(self, ordinal: int) -> Prompt:
        return Prompt(np.array([ordinal % 50, 1], dtype=np.int32), {"index": ordinal})


class NoMetrics:
    """Takes what would go to metrics.jsonl."""

    def log_step(self, figures: object) -> None: ...

    log_eval = log_sync = log_step


class NoProcess:
    """Stands for the trainer's process: it runs elsewhere, and ends when it is told to stop."""

    def __init__(self) -> None:
        self.running, self.exit_code, self.failures = True, 0, 0

    def poll(self, now: float) -> bool:
        return False

    def stepped(self) -> None: ...

    def check_end(self) -> None: ...

    def kill(self) -> None:
        self.running = False


class NoStop:
    """No signal comes."""

    def __init__(self) -> None:
        import os

        self.fd, self.received = os.eventfd(0), None


def make_stub_desk(folder: Path, config: Config, run_epoch: int = 1, *, version: int = 0) -> Desk:
    """The real desk with its own journal and sockets, around the state of a run that stands at `version`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    config.model.path = config.run.dir = str(folder)
    config.sampling.group_size, config.sampling.max_new_tokens = GROUP_SIZE, NUM_TOKENS
    config.eval.prompts = 0
    pacing = Pacing(config.learner.groups_per_step, config.staleness.max_age, config.run.steps)
    state = RunState(
        run_epoch=run_epoch,
        policy=PolicyVersions.at_start(version, version, run_epoch),
        leases=LeaseBook(pacing, config.generator.lease_timeout_s, run_epoch),
        buffer=ReplayBuffer(pacing, config.staleness.over_age),
        journal=Journal.open(folder / "journal"),
        sessions=DeskSessions(
            run_epoch=run_epoch,
            run_name="stub",
            expected=Expected("model", "tokenizer", "stub:Task"),
            credit_bytes=2**26,
            max_frame_bytes=MAX_FRAME_BYTES,
        ),
        counters=Counters(),
        evals_done=set(),
        tickets=Tickets.of_run(folder, "stub"),
    )
    if hasattr(state.journal, "begin_writing"):
        state.journal.begin_writing()
    sockets = [ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_FRAME_BYTES) for _ in range(2)]
    surroundings: Any = Surroundings(*sockets, NoProcess(), NoMetrics(), NoStop())  # type: ignore[arg-type]
    return make_desk(config, state, LeasedPrompts(MadeAtOnce(StubPrompts()), state.leases), surroundings)


class StubGenerator:
    """One generator: beats, takes leases, ends each after `work_s` as `outcome` says, cheats in weight syncs."""

    def __init__(self, name: str, socket: Any, room: int, work_s: float, outcome: str) -> None:
        self.name, self.socket, self.room, self.work_s, self.outcome = name, socket, room, work_s, outcome
        self.run_epoch, self.held, self.received, self.tokens = 0, None, 0, 0
        self.beat_s = 1.0
        self.leases: dict[LeaseKey, messages.LeaseGrant] = {}
        self.unacked: dict[int, tuple[messages.Message, float]] = {}
        self.seqs = itertools.count(1)
        self.offered: messages.SyncOffer | None = None

    def send(self, message: messages.Message) -> None:
        try:
            self.socket.send(encode(message, max_bytes=MAX_FRAME_BYTES), zmq.NOBLOCK)
        except zmq.Again:
            return

    def hello(self) -> None:
        first = min(self.unacked, default=1)
        self.send(
            messages.Hello(
                messages.PROTOCOL_VERSION, self.name, 1, self.run_epoch, "model", "tokenizer", "stub:Task", 1, first,
                self.held, self.name,
            )
        )  # fmt: skip

    def beat(self) -> None:
        self.tokens += 1
        room = max(0, self.room - len(self.leases)) * GROUP_SIZE
        active = [messages.ActiveLease(*key, grant.issued_version) for key, grant in self.leases.items()]
        active += [messages.ActiveLease(*message.key) for message, _ in self.unacked.values()]
        self.send(
            messages.Beat(
                self.run_epoch, self.received + room, active, self.tokens, 0, 0, 0.0, 0.0, 0, self.held, 0, True,
                self.received, [grant.ticket for grant in self.leases.values()],
            )
        )  # fmt: skip

    def handle(self, message: messages.Message) -> None:
        match message:
            case messages.Welcome():
                if message.run_epoch != self.run_epoch:
                    self.run_epoch, self.received = message.run_epoch, 0
                self.beat_s = message.beat_s
                self.beat()
            case messages.Nack() if message.seq == 0:
                self.hello()
            case messages.Nack():
                self.unacked.pop(message.seq, None)
            case messages.Ack():
                self.beat_s = message.beat_s
                for seq in [seq for seq in self.unacked if seq <= message.acked_seq or seq in message.beyond]:
                    del self.unacked[seq]
            case messages.Abandon():
                for key in message.leases:
                    self.leases.pop(key, None)
            case messages.SyncOffer():
                self.offered = message
                digests = [list(message.manifest.digests)]
                self.send(
                    messages.SyncReply(self.run_epoch, message.version, message.attempt, SyncPhase.STAGE, "", digests)
                )
            case messages.SyncSwap():
                in_use = [BitsInUse(message.version, 9, [], [])]
                self.send(
                    messages.SyncReply(
                        self.run_epoch, message.version, message.attempt, SyncPhase.SWAP, "",
                        canary_logprobs=[LOGPROBS], in_use=in_use,
                    )
                )  # fmt: skip
            case messages.SyncCommit():
                self.held = message.version

    def end(self, key: LeaseKey, now: float) -> bool:
        """A lease has ended: hands its outcome in. False when it was abandoned before."""
        grant = self.leases.pop(key, None)
        if grant is None:
            return False
        seq = next(self.seqs)
        message: messages.GroupResult | messages.LeaseFailed
        if self.outcome in ("group", "invalid"):
            group = stub_group(grant)
            message = group_to_result(group, seq, self.run_epoch, grant.ticket)
            if self.outcome == "invalid":
                message = replace(message, prompt=message.prompt + bytes(4))
        else:
            message = messages.LeaseFailed(seq, self.run_epoch, *key, FailureReason(self.outcome), "stub", grant.ticket)
        self.unacked[seq] = (message, now)
        self.send(message)
        return True


def stub_group(grant: messages.LeaseGrant) -> Group:
    """A group that fits its lease; every token is of the version of the lease."""
    rollouts = [
        Rollout(
            np.full(NUM_TOKENS, number, dtype=np.int32),
            np.full(NUM_TOKENS, -1.0, dtype=np.float32),
            (VersionSpan(0, NUM_TOKENS, grant.issued_version),),
            FinishReason.STOP,
            float(number),
            {"exact": float(number)},
        )
        for number in range(grant.num_rollouts)
    ]
    return Group(grant.key, np.frombuffer(grant.prompt, dtype="<i4"), rollouts)


class StubTrainer:
    """Steps as fast as batches come, and offers every version; its weights are one word."""

    def __init__(self, socket: Any, version: int) -> None:
        self.socket, self.version, self.offered = socket, version, -1
        self.wanted = False  # the desk takes a newer version than the offered one

    def send(self, message: messages.Message) -> None:
        self.socket.send(encode(message, max_bytes=MAX_FRAME_BYTES))

    def start(self) -> None:
        self.send(trainer_messages.TrainerHello(0, 1, self.version, 1))

    def offer(self) -> None:
        self.offered, self.wanted = self.version, False
        layout = WeightLayout(ALIGNMENT, (), ((0, ALIGNMENT),))
        manifest = WeightManifest(self.version, layout, (self.version,))
        self.send(trainer_messages.SnapshotReady(self.version, manifest, [CANARY], [LOGPROBS], 1.0))

    def handle(self, message: messages.Message) -> bool:
        """True when the run is over."""
        match message:
            case trainer_messages.TrainerWelcome():
                self.offer()
                self.send(trainer_messages.BatchRequest(0, self.version))
            case trainer_messages.Batch() if message.version == self.version:
                self.version += 1
                self.send(trainer_messages.StepDone(self.version, FIGURES, 0.0, {}))
                if self.wanted:
                    self.offer()
                self.send(trainer_messages.BatchRequest(0, self.version))
            case trainer_messages.SnapshotWanted():
                self.wanted = True
                if self.version > message.version:
                    self.offer()
            case trainer_messages.OpenChannel():
                epoch = message.channel_epoch
                self.send(trainer_messages.ChannelReady(epoch, "127.0.0.1", 9, "", "gloo", self.offered))
            case trainer_messages.Broadcast():
                done = (message.version, message.attempt, message.channel_epoch)
                self.send(trainer_messages.BroadcastDone(*done, "", 1.0, ALIGNMENT))
            case trainer_messages.TrainerStop():
                return True
        return False


def connect(context: Any, address: str, name: str) -> Any:
    """A DEALER of this routing id."""
    socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.LINGER, 0), (zmq.SNDHWM, 100_000), (zmq.RCVHWM, 100_000), (zmq.RECONNECT_IVL, 100)):
        socket.set(option, value)
    socket.set(zmq.ROUTING_ID, f"a{name}".encode())
    socket.connect(address)
    return socket


def run_fleet(rollout_address: str, trainer_address: str, options: dict[str, Any]) -> None:
    """Serves until the trainer is told to stop, or for ever."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 8192)
    poller, rng = zmq.Poller(), random.Random(0)
    by_socket: dict[Any, StubGenerator] = {}
    count = options["generators"]
    for number in range(count):
        socket = connect(context, rollout_address, f"g{number}")
        outcome = options.get("bad", "group") if number == count - 1 else "group"
        by_socket[socket] = StubGenerator(f"g{number}", socket, options["room"], options["work_s"], outcome)
        poller.register(socket, zmq.POLLIN)
    trainer_socket = connect(context, trainer_address, "trainer")
    poller.register(trainer_socket, zmq.POLLIN)
    trainer = StubTrainer(trainer_socket, options.get("version", 0))
    trainer.start()
    now, numbers = time.monotonic(), itertools.count()
    due: list[tuple[float, int, StubGenerator, LeaseKey | None]] = []  # None: a beat
    for generator in by_socket.values():
        generator.hello()
        heapq.heappush(due, (now + rng.random(), next(numbers), generator, None))
    while True:
        ready = poller.poll(max(1, int(1e3 * (due[0][0] - time.monotonic()))) if due else 100)
        now = time.monotonic()
        for socket, _ in ready:
            while True:
                try:
                    frame = socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                message = decode(frame, max_bytes=MAX_FRAME_BYTES)
                if socket is trainer_socket:
                    if trainer.handle(message):
                        return
                    continue
                generator = by_socket[socket]
                if isinstance(message, messages.LeaseGrant):
                    generator.received += message.num_rollouts
                    generator.leases[message.key] = message
                    after_s = min(generator.work_s if generator.outcome != "deadline" else 1e9, message.deadline_s)
                    if generator.outcome != "silence" and after_s < 1e8:
                        heapq.heappush(due, (now + after_s, next(numbers), generator, message.key))
                    continue
                generator.handle(message)
        wants = {}
        while due and due[0][0] <= now:
            _, _, generator, key = heapq.heappop(due)
            if key is None:
                if generator.run_epoch:
                    for unacked, sent_at in generator.unacked.values():
                        if now - sent_at > 2.0:
                            generator.send(unacked)
                    generator.beat()
                else:
                    generator.hello()
                heapq.heappush(due, (now + generator.beat_s, next(numbers), generator, None))
            elif generator.end(key, now):
                wants[generator.name] = generator
        for generator in wants.values():
            generator.beat()


if __name__ == "__main__":
    run_fleet(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
