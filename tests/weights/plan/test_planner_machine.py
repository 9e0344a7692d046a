"""The sync planner under random schedules: peers that answer, err, lie, fall silent, die and come back."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncrl.link.messages import SyncOffer, SyncReply, SyncSwap
from asyncrl.link.trainer_messages import (
    Broadcast,
    BroadcastDone,
    ChannelReady,
    CloseChannel,
    OpenChannel,
    SnapshotReady,
    SnapshotWanted,
)
from asyncrl.link.weight_records import BitsInUse, Placement
from asyncrl.link.wire_types import SyncPhase
from asyncrl.weights.plan.planner import SyncPlanner
from asyncrl.weights.plan.records import Committed, RoundEnded, ToGenerator, ToPublisher, Unreachable
from asyncrl.weights.plan.round import GRACE_S, MAX_PENALTY_S
from tests.weights.manifests import manifest_of

NAMES = tuple("abcde")
TIMEOUT_S = 10.0
CELL_SIZE = 2
CANARY = [np.array([-1.0, -2.0], np.float32).tobytes()]
LEARNER = Placement("host", "1@1", ("gpu-0",))
# CPUs; the learner's own card; others, of which two generators may want the same; one that has the learner's besides
CARDS = [(), ("gpu-0",), ("gpu-1",), ("gpu-2",), ("gpu-1", "gpu-2"), ("gpu-0", "gpu-1")]
WRONG_CANARY = [np.array([-1.0, -2.5], np.float32).tobytes()]


class Planner(RuleBasedStateMachine):
    """`orders` and `broadcasts` are what peers were told and have not answered yet."""

    def __init__(self):
        super().__init__()
        self.planner = SyncPlanner(run_epoch=1, run_name="r", timeout_s=TIMEOUT_S, tolerance=1e-4, cell_size=CELL_SIZE)
        self.planner.trainer_joined(LEARNER)
        self.now = 100.0
        self.incarnations = dict.fromkeys(NAMES, 0)
        self.version = -1
        self.may_offer = True
        self.orders: list[tuple[str, int, SyncOffer | SyncSwap]] = []
        self.openings: list[OpenChannel] = []
        self.broadcasts: list[Broadcast] = []
        self.honest: set[tuple[str, int, int, str]] = set()  # (name, incarnation, version, phase) answered well
        self.opened: set[int] = set()
        self.closed: set[int] = set()
        self.kept: dict[int, int] = {}  # channel epoch -> version whose memory the publisher keeps for it
        self.prefixes: set[str] = set()
        self.offer: SnapshotReady | None = None  # the publisher's last
        self.to_lose: set[type] = set()  # the next message of this kind does not arrive

    # -- what happens --------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), num_workers=st.integers(1, 2), gpus=st.sampled_from(CARDS))
    def join(self, name, num_workers, gpus):
        self.incarnations[name] += 1
        self.planner.joined(name, self.incarnations[name], num_workers, self.now, Placement("host", "1@1", gpus))
        self.settle()
        assert (name in self.planner.receivers) == (len(set(gpus) & set(LEARNER.gpus)) in (0, len(gpus)))

    @rule(mishap=st.sampled_from(["death", "death", "evaluation", "trainer"]), names=st.sets(st.sampled_from(NAMES)))
    def something_comes_between(self, mishap, names):
        match mishap:
            case "death":
                for name in sorted(names)[:1]:
                    self.planner.left(name, self.now, "is dead")
            case "evaluation":
                self.planner.set_busy(names)
            case "trainer":
                self.planner.publisher_lost(self.now)
                self.openings.clear()
                self.broadcasts.clear()
                self.opened.clear()
                self.kept.clear()
                self.offer, self.may_offer = None, True
        self.settle()

    @rule()
    def go_on(self):
        """Openings and all that was asked until now is answered as it should be."""
        self.answer_all()

    @precondition(lambda self: self.may_offer and self.planner.receivers)
    @rule()
    def train_and_sync(self):
        self.train()
        while self.openings or self.orders or self.broadcasts:
            self.answer_all()

    @precondition(lambda self: self.may_offer)
    @rule()
    def train(self):
        self.version += 1
        self.may_offer = False
        self.offer = SnapshotReady(self.version, manifest_of(self.version, [self.version]), [b""], CANARY, 1.0)
        if not self.is_lost(self.offer):
            self.planner.snapshot_ready(self.offer, self.now)
        self.settle()

    @rule(kind=st.sampled_from([SnapshotReady, SnapshotWanted, CloseChannel]))
    def lose_the_next(self, kind):
        self.to_lose.add(kind)

    def is_lost(self, message):
        lost = type(message) in self.to_lose
        self.to_lose.discard(type(message))
        return lost

    @precondition(lambda self: self.openings)
    @rule(error=st.sampled_from(["", "", "no port"]))
    def open(self, error):
        opening = self.openings.pop(0)
        self.opens(opening, error)
        self.settle()

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), how=st.sampled_from(["well", "well", "well", "error", "lie", "silence"]))
    def answer(self, data, how):
        index = data.draw(st.integers(0, len(self.orders) - 1))
        name, incarnation, order = self.orders.pop(index)
        if how == "silence" or incarnation != self.incarnations[name]:
            return
        phase = "stage" if isinstance(order, SyncOffer) else "swap"
        receiver = self.planner.receivers.get(name)
        workers = receiver.num_workers if receiver else 1
        fields = {}
        if phase == "stage" and how != "error":
            fields = {"digests": [[order.version if how == "well" else -1]] * workers}
        elif how != "error":
            in_use = [BitsInUse(order.version, 9, [], [])] * workers
            fields = {"canary_logprobs": CANARY if how == "well" else WRONG_CANARY, "in_use": in_use}
        if how == "well":
            self.honest.add((name, incarnation, order.version, phase))
        error = "it failed" if how == "error" else ""
        reply = SyncReply(1, order.version, order.attempt, SyncPhase(phase), error, **fields)
        self.planner.reply(name, reply, self.now)
        self.settle()

    @precondition(lambda self: self.broadcasts)
    @rule(error=st.sampled_from(["", "", "a member left"]))
    def sent(self, error):
        order = self.broadcasts.pop(0)
        self.kept.pop(order.channel_epoch, None)
        done = BroadcastDone(order.version, order.attempt, order.channel_epoch, error, 1.0, 10)
        self.planner.broadcast_done(done, self.now)
        self.settle()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    def wait(self, seconds):
        self.pass_time(seconds)

    def pass_time(self, seconds):
        self.now += seconds
        # As a publisher does that has heard nothing yet.
        if self.planner.snapshot is None and self.offer is not None and not self.is_lost(self.offer):
            self.planner.snapshot_ready(self.offer, self.now)
        self.settle()

    def settle(self):
        self.planner.advance(self.now)
        for output in self.planner.take_outputs():
            match output:
                case ToPublisher(message):
                    self.to_publisher(message)
                case ToGenerator(name, message) if isinstance(message, (SyncOffer, SyncSwap)):
                    self.orders.append((name, self.incarnations[name], message))
                case Committed(name, _, version):
                    for phase in ("stage", "swap"):
                        assert (name, self.incarnations[name], version, phase) in self.honest, "committed unproven"
                case Unreachable(name):
                    self.planner.left(name, self.now, "is sent away")
                case RoundEnded():
                    pass

    def opens(self, opening, error):
        if not error:
            self.kept[opening.channel_epoch] = self.version
        ready = ChannelReady(opening.channel_epoch, "127.0.0.1", 9, error, version=None if error else self.version)
        self.planner.channel_ready(ready, self.now)

    def to_publisher(self, message):
        if self.is_lost(message):
            return
        match message:
            case OpenChannel():
                assert message.prefix not in self.prefixes, "a prefix is used twice"
                self.prefixes.add(message.prefix)
                self.opened.add(message.channel_epoch)
                self.openings.append(message)
            case Broadcast():
                assert message.channel_epoch not in self.closed, "a closed channel is used"
                kept = self.kept.get(message.channel_epoch)
                assert kept == message.version or (kept is None and not self.may_offer), "its memory may be replaced"
                self.broadcasts.append(message)
            case CloseChannel():
                self.close(message.channel_epoch)
            case SnapshotWanted():
                for channel_epoch in self.opened - self.closed - set(message.open_channels):
                    self.close(channel_epoch)
                if message.version == self.version:
                    self.may_offer = True
                elif self.offer is not None and not self.is_lost(self.offer):
                    self.planner.snapshot_ready(self.offer, self.now)

    def close(self, channel_epoch):
        self.closed.add(channel_epoch)
        self.kept.pop(channel_epoch, None)

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def nobody_is_in_two_rounds(self):
        names = [name for current in self.planner.rounds.values() for name in current.members]
        assert len(names) == len(set(names))

    @invariant()
    def nobody_is_in_two_cells_and_no_cell_is_too_large(self):
        names = [name for cell in self.planner.cells for name in cell.names]
        assert len(names) == len(set(names)) and set(names) <= set(self.planner.receivers)
        assert all(1 <= len(cell.names) <= CELL_SIZE for cell in self.planner.cells)
        assert all(len(current.members) <= CELL_SIZE for current in self.planner.rounds.values())

    @invariant()
    def a_channel_has_one_backend_and_nccl_no_card_twice(self):
        for current in self.planner.rounds.values():
            members = [member.receiver for member in current.members.values()]
            assert {receiver.backend for receiver in members} <= {current.backend}
            cards = [gpu for receiver in members for gpu in receiver.placement.gpus]
            assert current.backend != "nccl" or len(set(cards)) == len(cards)

    @invariant()
    def every_wait_has_a_deadline(self):
        deadline = self.planner.next_deadline(self.now)
        if self.planner.rounds:
            assert deadline is not None
        assert deadline is None or self.now < deadline <= self.now + max(TIMEOUT_S + GRACE_S, MAX_PENALTY_S)

    @invariant()
    def nobody_holds_what_is_not_proven(self):
        for name, receiver in self.planner.receivers.items():
            if (version := receiver.held_version) is not None:
                assert (name, receiver.incarnation, version, "swap") in self.honest

    def teardown(self):
        """From any state: peers that answer from now on hold the newest version within the penalties' time."""
        self.planner.set_busy(set())
        self.to_lose.clear()
        if self.may_offer:
            self.train()
        for _ in range(400):
            for name, receiver in list(self.planner.receivers.items()):
                receiver.taints = min(receiver.taints, 1)
                assert name in self.incarnations
            self.pass_time(1.0)
            while self.openings or self.orders or self.broadcasts:
                self.answer_all()
            if self.may_offer and any(r.held_version != self.version for r in self.planner.receivers.values()):
                self.train()
            elif not self.planner.rounds and all(
                r.held_version == self.version for r in self.planner.receivers.values()
            ):
                in_use = {cell.channel.epoch for cell in self.planner.cells if cell.channel is not None}
                if self.opened - self.closed == in_use:
                    return
        left_open = self.opened - self.closed
        raise AssertionError(
            f"not settled: {self.planner.receivers} {self.planner.rounds}, channels {left_open} are open"
        )

    def answer_all(self):
        while self.openings:
            opening = self.openings.pop(0)
            self.opens(opening, "")
        self.settle()
        while self.broadcasts:
            order = self.broadcasts.pop(0)
            self.kept.pop(order.channel_epoch, None)
            done = BroadcastDone(order.version, order.attempt, order.channel_epoch, "", 1.0, 10)
            self.planner.broadcast_done(done, self.now)
        self.settle()
        while self.orders:
            name, incarnation, order = self.orders.pop(0)
            receiver = self.planner.receivers.get(name)
            if receiver is None or incarnation != self.incarnations[name]:
                continue
            phase = "stage" if isinstance(order, SyncOffer) else "swap"
            self.honest.add((name, incarnation, order.version, phase))
            fields = {"digests": [[order.version]] * receiver.num_workers} if phase == "stage" else {}
            if phase == "swap":
                in_use = [BitsInUse(order.version, 9, [], [])] * receiver.num_workers
                fields = {"canary_logprobs": CANARY, "in_use": in_use}
            self.planner.reply(
                name, SyncReply(1, order.version, order.attempt, SyncPhase(phase), "", **fields), self.now
            )
        self.settle()


TestPlanner = Planner.TestCase
TestPlanner.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
