"""A generator, a desk and a bad network between them, in one process: what the session tests drive.

The network loses, repeats and reorders; both ends may crash at any moment, and the desk restores only what it had
made durable. `check` holds at every step, `heal` at the end of every run.
"""

from __future__ import annotations

import random

from asyncrl.link import codec, limits
from asyncrl.link.desk_session import DeskSessions, Expected, Seen
from asyncrl.link.generator_session import GeneratorSession, GeneratorState
from asyncrl.link.messages import PROTOCOL_VERSION, Beat, Hello, LeaseFailed
from asyncrl.link.schema.message_base import Message
from asyncrl.link.wire_types import FailureReason, NackCode
from asyncrl.types import LeaseKind

MAX_BYTES = 1 << 16
CREDIT_BYTES = 200
OUTBOX_BYTES = 400
MAX_IN_FLIGHT = 60


def refused_by_rule(ordinal: int) -> bool:
    """Validation is a function of the result: the same one is always refused."""
    return ordinal % 7 == 3


class Disk:
    """What survives a crash of the desk."""

    def __init__(self) -> None:
        self.state: dict = {}  # of the last checkpoint
        self.journal: list[tuple[str, int, int]] = []  # since then: id, incarnation, seq
        self.accepted: list[int] = []  # ordinals, in the order of arrival


class Desk:
    """A desk around DeskSessions that writes in groups: accept, write, sync, acknowledge."""

    def __init__(self, disk: Disk, outgoing: Queue, run_epoch: int, now: float) -> None:
        self.disk, self.outgoing = disk, outgoing
        self.sessions = DeskSessions(
            run_epoch=run_epoch,
            run_name="run",
            expected=Expected("m", "t", "k"),
            credit_bytes=CREDIT_BYTES,
            max_frame_bytes=MAX_BYTES,
        )
        self.unsynced: list[tuple] = []  # session, seq, ordinal
        self.restore(now)

    def restore(self, now: float) -> None:
        self.sessions.restore(self.disk.state, now)
        for generator_id, incarnation, seq in self.disk.journal:
            self.sessions.replay(generator_id, incarnation, seq, now)

    def receive(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self.outgoing.put(peer, self.sessions.hello(peer, message, version=0, now=now).reply)
            return
        session = self.sessions.of(peer, now)
        if session is None:
            self.outgoing.put(peer, self.sessions.unknown_peer())
        elif isinstance(message, Beat):
            session.on_beat(message, now)
            self.outgoing.put(peer, self.sessions.ack(session))
        else:
            self.result(peer, session, message)

    def result(self, peer: bytes, session, message: LeaseFailed) -> None:
        seen = self.sessions.see(session, message.seq, 70)
        if seen is Seen.DUPLICATE:
            self.outgoing.put(peer, self.sessions.answer_duplicate(session, message.seq))
        elif seen is Seen.NEW and refused_by_rule(message.ordinal):
            self.outgoing.put(peer, self.sessions.reject(session, message.seq, NackCode.INVALID, "by rule"))
        elif seen is Seen.NEW:
            self.unsynced.append((session, message.seq, message.ordinal))

    def sync(self) -> None:
        for session, seq, ordinal in self.unsynced:
            self.disk.journal.append((session.generator_id, session.incarnation, seq))
            self.disk.accepted.append(ordinal)
        for session, seq, _ in self.unsynced:
            self.sessions.mark_durable(session, seq)
            if session.peer is not None:
                self.outgoing.put(session.peer, self.sessions.ack(session))
        self.unsynced.clear()

    def checkpoint(self) -> None:
        self.disk.state = self.sessions.state()
        self.disk.journal.clear()


class Queue:
    """Frames in flight in one direction, each with the peer it comes from or goes to."""

    def __init__(self) -> None:
        self.items: list[tuple[bytes, bytes]] = []

    def put(self, peer: bytes, message: Message | bytes) -> None:
        if len(self.items) < MAX_IN_FLIGHT:
            frame = message if isinstance(message, bytes) else codec.encode(message, max_bytes=MAX_BYTES)
            self.items.append((peer, frame))


class World:
    """Everything, with one method for each thing that can happen."""

    desk_class: type[Desk] = Desk

    def __init__(self) -> None:
        self.to_desk, self.to_generator, self.disk = Queue(), Queue(), Disk()
        self.now, self.run_epoch, self.incarnation, self.ordinals, self.sockets = 0.0, 0, 0, 0, 0
        self.desk_restarts()
        self.generator_restarts()

    # -- the generator

    def generator_restarts(self) -> None:
        self.incarnation += 1
        self.mine: list[int] = []  # ordinals of this incarnation
        self.new_socket()
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            generator_id="g",
            incarnation=self.incarnation,
            max_run_epoch=0,
            model_fingerprint="m",
            tokenizer_fingerprint="t",
            task="k",
            num_workers=1,
            first_unacked_seq=1,
            instance=str(self.incarnation),
        )
        self.session = GeneratorSession(
            hello, run_name="run", outbox_bytes=OUTBOX_BYTES, max_frame_bytes=MAX_BYTES, now=self.now
        )

    def new_socket(self) -> None:
        self.sockets += 1
        self.peer = b"peer-%d" % self.sockets

    def reconnect(self) -> None:
        self.new_socket()
        self.session.reconnected(self.now)

    def finish_a_lease(self) -> None:
        if self.session.has_room:
            self.ordinals += 1
            key = (LeaseKind.TRAIN, self.ordinals, 0)
            self.session.put(lambda seq, epoch: LeaseFailed(seq, epoch, *key, FailureReason.ENGINE, ""), self.now)
            self.mine.append(self.ordinals)

    def generator_turn(self, passed_s: float) -> None:
        self.now += passed_s
        if self.session.reconnect_due(self.now):
            self.reconnect()
        for frame in self.session.due(self.now):
            self.to_desk.put(self.peer, frame)
        if self.session.welcomed:
            self.to_desk.put(self.peer, Beat(self.session.run_epoch, 0, [], 0, 0, 0, 0, 0, self.session.outbox_bytes))

    # -- the network

    def deliver(self, queue: Queue, index: int, repeat: bool = False) -> None:
        peer, frame = queue.items[index] if repeat else queue.items.pop(index)
        message = codec.decode(frame, max_bytes=MAX_BYTES)
        if queue is self.to_desk:
            self.desk.receive(peer, message, self.now)
        elif peer == self.peer:
            self.session.receive(message, self.now)

    def calm(self) -> None:
        """A moment in which all goes well, up to the sync."""
        self.generator_turn(1.0)
        for queue in (self.to_desk, self.to_generator, self.to_desk):
            while queue.items:
                self.deliver(queue, 0)
            self.generator_turn(0.0)

    # -- the desk

    def desk_restarts(self) -> None:
        self.run_epoch += 1
        self.desk = self.desk_class(self.disk, self.to_generator, self.run_epoch, self.now)

    # -- what must hold

    def check(self) -> None:
        accepted, unacked = self.disk.accepted, {lease.ordinal for lease in self.session.unacked_leases()}
        lost = [n for n in self.mine if n not in unacked and n not in accepted and not refused_by_rule(n)]
        assert not lost, f"acknowledged but not on disk: {lost}"
        assert len(accepted) == len(set(accepted)), f"accepted twice: {accepted}"
        assert not any(map(refused_by_rule, accepted))
        assert self.session.state is not GeneratorState.REFUSED
        assert self.session.outbox_bytes <= OUTBOX_BYTES + 100
        for session in self.desk.sessions:
            assert session.seqs.pending_bytes <= CREDIT_BYTES
            assert max(len(session.seqs.beyond), len(session.nacks)) <= limits.SEQ_WINDOW

    def heal(self) -> None:
        """With a good network everything of this incarnation is settled within seconds."""
        for _ in range(60):
            self.calm()
            self.desk.sync()
            self.check()
        assert self.session.unacked_leases() == []
        assert {n for n in self.mine if not refused_by_rule(n)} <= set(self.disk.accepted)


def simulate(world: World, seed: int, steps: int) -> None:
    """A run of `steps` random events. The same seed gives the same run."""
    chance = random.Random(seed)

    def in_some_queue(act) -> None:
        queue = chance.choice((world.to_desk, world.to_generator))
        if queue.items:
            act(queue, chance.randrange(len(queue.items)))

    def desk_syncs() -> None:  # the desk of that moment: a restart replaces it
        world.desk.sync()

    def desk_checkpoints() -> None:
        world.desk.checkpoint()

    events = {
        world.finish_a_lease: 10,
        lambda: world.generator_turn(chance.choice((0.0, 0.1, 0.6, 1.0, 5.0))): 6,
        lambda: in_some_queue(world.deliver): 20,
        lambda: in_some_queue(lambda queue, index: world.deliver(queue, index, repeat=True)): 4,
        lambda: in_some_queue(lambda queue, index: queue.items.pop(index)): 4,
        world.calm: 3,
        desk_syncs: 4,
        desk_checkpoints: 2,
        world.reconnect: 1,
        world.desk_restarts: 1,
        world.generator_restarts: 0.3,
    }
    for event in chance.choices(list(events), list(events.values()), k=steps):
        event()
        world.check()
    world.heal()
