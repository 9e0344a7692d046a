"""Sessions over a network that loses, repeats and reorders, with both ends crashing at any moment.

The desk restores only what it had made durable. Held at every step: nothing acknowledged is missing from its disk,
nothing is on it twice, and memory is bounded. At the end of every run the network heals, and everything arrives.
Mutants below check that the machine would notice.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from asyncrl.transport import codec, limits
from asyncrl.transport.messages import PROTOCOL_VERSION, Beat, Hello, LeaseFailed, Message
from asyncrl.transport.session import DeskSessions, Expected, GeneratorSession, GeneratorState, Offer

MAX_BYTES = 1 << 16
CREDIT_BYTES = 200
OUTBOX_BYTES = 400
MAX_IN_FLIGHT = 60


def refused_by_rule(ordinal: int) -> bool:
    """Validation is a function of the result: the same one is always refused."""
    return ordinal % 7 == 3


class Network:
    """Frames in flight, in any order."""

    def __init__(self) -> None:
        self.to_desk: list[tuple[bytes, bytes]] = []  # (from peer, frame)
        self.to_generator: list[tuple[bytes, bytes]] = []  # (to peer, frame)

    def send(self, queue: list[tuple[bytes, bytes]], peer: bytes, message: Message | bytes) -> None:
        if len(queue) < MAX_IN_FLIGHT:
            frame = message if isinstance(message, bytes) else codec.encode(message, max_bytes=MAX_BYTES)
            queue.append((peer, frame))


class Disk:
    """What survives a crash of the desk."""

    def __init__(self) -> None:
        self.state: dict = {}  # of the last checkpoint
        self.journal: list[tuple[str, int, int, int]] = []  # since then: id, incarnation, seq, ordinal
        self.accepted: list[int] = []  # ordinals, in the order of arrival


class Desk:
    """A desk around DeskSessions that writes in groups: accept, write, sync, acknowledge."""

    def __init__(self, disk: Disk, network: Network, run_epoch: int, now: float) -> None:
        self.disk, self.network = disk, network
        self.sessions = DeskSessions(
            run_epoch=run_epoch,
            run_name="run",
            expected=Expected("m", "t", "k"),
            credit_bytes=CREDIT_BYTES,
            max_frame_bytes=MAX_BYTES,
        )
        self.unsynced: list[tuple] = []
        self.rejected: set[int] = set()
        self.restore(now)

    def restore(self, now: float) -> None:
        self.sessions.restore(self.disk.state, now)
        for generator_id, incarnation, seq, _ in self.disk.journal:
            self.sessions.replay(generator_id, incarnation, seq, now)

    def receive(self, peer: bytes, message: Message, now: float) -> None:
        if isinstance(message, Hello):
            self.reply(peer, self.sessions.hello(peer, message, version=0, now=now).reply)
            return
        session = self.sessions.of(peer, now)
        if session is None:
            self.reply(peer, self.sessions.unknown_peer())
        elif isinstance(message, Beat):
            session.on_beat(message, now)
            self.reply(peer, self.sessions.ack(session))
        else:
            self.result(peer, session, message)

    def result(self, peer: bytes, session, message: LeaseFailed) -> None:
        offer = self.sessions.offer(session, message.seq, 70)
        if offer is Offer.DUPLICATE:
            self.reply(peer, self.sessions.answer_duplicate(session, message.seq))
        elif offer is Offer.NEW and refused_by_rule(message.ordinal):
            self.reply(peer, self.sessions.reject(session, message.seq, "invalid", "by rule"))
        elif offer is Offer.NEW:
            self.unsynced.append((session, message.seq, message.ordinal))

    def sync(self) -> None:
        for session, seq, ordinal in self.unsynced:
            self.disk.journal.append((session.generator_id, session.incarnation, seq, ordinal))
            self.disk.accepted.append(ordinal)
        for session, seq, _ in self.unsynced:
            self.sessions.mark_durable(session, seq)
            if session.peer is not None:
                self.reply(session.peer, self.sessions.ack(session))
        self.unsynced.clear()

    def checkpoint(self) -> None:
        self.disk.state = self.sessions.state()
        self.disk.journal.clear()

    def reply(self, peer: bytes, message: Message) -> None:
        self.network.send(self.network.to_generator, peer, message)


class Link(RuleBasedStateMachine):
    desk_class: type[Desk] = Desk

    def __init__(self) -> None:
        super().__init__()
        self.network, self.disk = Network(), Disk()
        self.now, self.run_epoch, self.incarnation, self.ordinals, self.sockets = 0.0, 1, 0, 0, 0
        self.desk = self.desk_class(self.disk, self.network, self.run_epoch, self.now)
        self.start_generator()

    def start_generator(self) -> None:
        self.incarnation += 1
        self.new_socket()
        self.mine: list[int] = []  # ordinals of this incarnation
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

    # -- what the generator does

    @precondition(lambda self: self.session.has_room)
    @rule()
    def finish_a_lease(self) -> None:
        self.ordinals += 1
        ordinal = self.ordinals
        self.session.put(lambda seq, epoch: LeaseFailed(seq, epoch, "train", ordinal, 0, "engine", ""), self.now)
        self.mine.append(ordinal)

    @rule(passed_s=st.sampled_from([0.0, 0.1, 0.6, 1.0, 5.0]))
    def generator_turn(self, passed_s: float) -> None:
        self.now += passed_s
        if self.session.reconnect_due(self.now):
            self.reconnect()
        for frame in self.session.due(self.now):
            self.network.send(self.network.to_desk, self.peer, frame)
        if self.session.welcomed:
            epoch = self.session.run_epoch
            beat = Beat(epoch, 0, [], 0, 0, 0, 0.0, 0.0, self.session.outbox_bytes)
            self.network.send(self.network.to_desk, self.peer, beat)
        assert self.session.state is not GeneratorState.REFUSED

    @rule()
    def reconnect(self) -> None:
        self.new_socket()
        self.session.reconnected(self.now)

    @rule()
    def generator_crashes(self) -> None:
        self.start_generator()

    # -- what the network does

    @precondition(lambda self: self.network.to_desk)
    @rule(data=st.data(), repeat=st.booleans())
    def deliver_to_desk(self, data, repeat: bool) -> None:
        self.take(data, self.network.to_desk, repeat)

    @precondition(lambda self: self.network.to_generator)
    @rule(data=st.data(), repeat=st.booleans())
    def deliver_to_generator(self, data, repeat: bool) -> None:
        self.take(data, self.network.to_generator, repeat)

    def take(self, data, queue: list[tuple[bytes, bytes]], repeat: bool) -> None:
        index = data.draw(st.integers(0, len(queue) - 1))
        peer, frame = queue[index] if repeat else queue.pop(index)
        self.deliver(queue, peer, frame)

    def deliver(self, queue: list[tuple[bytes, bytes]], peer: bytes, frame: bytes) -> None:
        message = codec.decode(frame, max_bytes=MAX_BYTES)
        if queue is self.network.to_desk:
            self.desk.receive(peer, message, self.now)
        elif peer == self.peer:
            self.session.receive(message, self.now)

    @precondition(lambda self: self.network.to_desk or self.network.to_generator)
    @rule(data=st.data())
    def lose(self, data) -> None:
        queue = data.draw(st.sampled_from([q for q in (self.network.to_desk, self.network.to_generator) if q]))
        queue.pop(data.draw(st.integers(0, len(queue) - 1)))

    # -- what the desk does

    @rule()
    def desk_syncs(self) -> None:
        self.desk.sync()

    @rule()
    def desk_saves_a_checkpoint(self) -> None:
        self.desk.checkpoint()

    @rule()
    def desk_crashes(self) -> None:
        self.run_epoch += 1
        self.desk = self.desk_class(self.disk, self.network, self.run_epoch, self.now)

    # -- what must hold

    def settled_ordinals(self) -> set[int]:
        return set(self.mine) - {lease[1] for lease in self.session.unacked_leases()}

    @invariant()
    def what_is_acknowledged_is_on_disk(self) -> None:
        lost = self.settled_ordinals() - set(self.disk.accepted)
        assert all(refused_by_rule(ordinal) for ordinal in lost), f"acknowledged but not on disk: {lost}"

    @invariant()
    def nothing_is_accepted_twice_and_nothing_bad(self) -> None:
        assert len(self.disk.accepted) == len(set(self.disk.accepted))
        assert not any(refused_by_rule(ordinal) for ordinal in self.disk.accepted)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.session.outbox_bytes <= OUTBOX_BYTES + 100
        for session in self.desk.sessions:
            seqs = session.seqs
            assert seqs.pending_bytes <= CREDIT_BYTES
            assert len(seqs.beyond) <= limits.SEQ_WINDOW and len(session.nacks) <= limits.SEQ_WINDOW

    def teardown(self) -> None:
        """The network heals: within some seconds everything of this incarnation is settled."""
        self.network.to_desk.clear()
        self.network.to_generator.clear()
        for _ in range(100):
            self.generator_turn(0.5)
            for queue in (self.network.to_desk, self.network.to_generator):
                while queue:
                    self.deliver(queue, *queue.pop(0))
                self.desk.sync()
            if self.session.welcomed and not self.session.unacked_leases():
                break
        assert self.session.unacked_leases() == []
        expected = {ordinal for ordinal in self.mine if not refused_by_rule(ordinal)}
        assert expected <= set(self.disk.accepted)


TestLink = Link.TestCase
TestLink.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


# -- mutants: each breaks one rule, and the machine must say so


class AcksBeforeTheSync(Desk):
    def result(self, peer, session, message) -> None:
        super().result(peer, session, message)
        self.sessions.mark_durable(session, message.seq)
        self.reply(peer, self.sessions.ack(session))


class ForgetsTheJournal(Desk):
    def restore(self, now) -> None:
        self.sessions.restore(self.disk.state, now)


class AcceptsDuplicates(Desk):
    def result(self, peer, session, message) -> None:
        if not refused_by_rule(message.ordinal):
            self.unsynced.append((session, message.seq, message.ordinal))


class SavesWhatIsNotWritten(Desk):
    def checkpoint(self) -> None:
        super().checkpoint()
        for session, seq, _ in self.unsynced:
            saved = self.disk.state[session.generator_id]
            saved["watermark"] = max(saved["watermark"], seq)


class GeneratorThatForgetsOnReconnect(Link):
    def reconnect(self) -> None:
        super().reconnect()
        for seq in list(self.session._unacked):
            self.session._drop(seq)


class GeneratorThatReusesItsIncarnation(Link):
    def start_generator(self) -> None:
        self.incarnation = 0
        super().start_generator()


MUTANTS = [
    type(desk.__name__, (Link,), {"desk_class": desk})
    for desk in (AcksBeforeTheSync, ForgetsTheJournal, AcceptsDuplicates, SavesWhatIsNotWritten)
] + [GeneratorThatForgetsOnReconnect, GeneratorThatReusesItsIncarnation]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_machine_notices(mutant):
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            mutant,
            settings=settings(
                max_examples=2000,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
