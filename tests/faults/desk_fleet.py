"""A desk's deciding parts and a fleet of stub generators in virtual time: no sockets, no engine, no clock."""

from __future__ import annotations

import heapq
import itertools
from pathlib import Path

from asyncrl.desk.generators import Generators
from asyncrl.desk.versions import Versions
from asyncrl.link import messages
from asyncrl.link.codec import decode, encode
from asyncrl.link.wire_types import FailureReason
from asyncrl.types import LeaseKind
from asyncrl.weights.plan.planner import SyncPlanner
from tests.desk.desk_parts import MEBIBYTE, beat, hello, make_parts, small_config, train_group

TICK_S = 0.02
CATCH_UP_S = 0.5  # until a generator that holds nothing has proved the newest version


class VirtualWire:
    """Stands for the ROUTER: keeps what was sent, by peer."""

    max_frame_bytes = MEBIBYTE
    handshakes_refused = 0
    malformed_messages = 0
    keys = None

    def __init__(self):
        self.sent = []

    def send_message(self, peer, message):
        self.sent.append((peer.decode(), decode(encode(message, max_bytes=MEBIBYTE), max_bytes=MEBIBYTE)))
        return True

    def reaches(self, peer, message):
        return True


class Stub:
    """A generator of `room` leases at a time. `answer(grant)` is what becomes of a lease: "group", or a reason."""

    def __init__(self, name, room, work_s, answer=lambda grant: "group", fail_s=None):
        self.name, self.room, self.work_s, self.answer = name, room, work_s, answer
        self.fail_s = work_s if fail_s is None else fail_s
        self.session = None
        self.seqs = itertools.count(1)
        self.held = {}
        self.received = 0


class Fleet:
    """Runs until `steps` versions are made, or for `limit_s` of virtual time."""

    def __init__(self, folder: Path, stubs, *, steps=40, groups_per_step=8, max_age=3, lease_timeout_s=20.0):
        config = small_config(
            run__steps=steps,
            learner__groups_per_step=groups_per_step,
            staleness__max_age=max_age,
            generator__lease_timeout_s=lease_timeout_s,
        )
        self.parts = make_parts(folder, config, flush=lambda fd: None)
        self.wire = VirtualWire()
        self.planner = SyncPlanner(run_epoch=1, run_name="run", timeout_s=10.0, tolerance=1e-4, cell_size=8)
        versions = Versions(
            planner=self.planner,
            socket=None,
            state=self.parts.state,
            proofs=None,
            evaluator=None,
            metrics=None,
            on_first_proof=lambda now: None,
        )
        self.generators = Generators(
            config,
            socket=self.wire,
            state=self.parts.state,
            prompts=self.parts.prompts,
            acknowledgements=self.parts.acknowledgements,
            versions=versions,
        )
        self.stubs = {stub.name: stub for stub in stubs}
        self.now = 0.0
        self.events = []  # (time, number, stub, grant)
        self._numbers = itertools.count()
        self._nothing_since = {}  # name -> since when it holds no version
        self._beat_at = 0.0
        self.version = 0
        self.steps = steps
        for stub in stubs:
            self.generators.hello(stub.name.encode(), hello(stub.name), 0.0)
            stub.session = self.generators.session_of(stub.name.encode(), 0.0)
            self._beat(stub)

    def run(self, limit_s):
        """Returns the virtual seconds that it took."""
        while self.version < self.steps and self.now < limit_s:
            self.now += TICK_S
            self._take_ended()
            if self.now >= self._beat_at:
                self._beat_at = self.now + 1.0
                for stub in self.stubs.values():
                    self._beat(stub)
            self._tick()
        return self.now

    def close(self):
        self.parts.journal.close()

    def _tick(self):
        self.parts.intake.note_given_up(self.now)
        self.generators.judge()
        self.parts.make_durable()
        self.generators.expire(self.now)
        self._prove()
        buffer, leases = self.parts.buffer, self.parts.leases
        for group in buffer.drop_over_age(self.version):
            leases.drop(group.key, self.now)
        if self.version < self.steps and buffer.can_take(self.version, leases.running_by_version):
            leases.train(group.key for group in buffer.take(self.version))
            self.version += 1
            self.parts.state.policy.step_made(self.version)
            self.parts.state.policy.published(self.version)
            for stub in self.stubs.values():
                if self.planner.held_version(stub.name) is not None:
                    self._proved(stub.name)
        self.generators.grant(self.now)
        self._deliver()

    def _prove(self):
        for name in self.stubs:
            if self.planner.held_version(name) is not None:
                self._nothing_since.pop(name, None)
            elif self.now - self._nothing_since.setdefault(name, self.now) >= CATCH_UP_S:
                self._proved(name)

    def _proved(self, name):
        self.planner.receivers[name].held_version = self.version
        self.parts.proofs.add(name, 1, self.version)

    def _deliver(self):
        sent, self.wire.sent = self.wire.sent, []
        for name, message in sent:
            stub = self.stubs[name]
            if isinstance(message, messages.LeaseGrant):
                stub.received += message.num_rollouts
                stub.held[message.key] = message
                answer = stub.answer(message)
                if answer != "silence":
                    after_s = stub.work_s if answer == "group" else stub.fail_s
                    event = (self.now + after_s, next(self._numbers), stub, message, answer)
                    heapq.heappush(self.events, event)
            elif isinstance(message, messages.Abandon):
                for key in message.leases:
                    stub.held.pop(key, None)

    def _take_ended(self):
        changed = {}
        while self.events and self.events[0][0] <= self.now:
            _, _, stub, grant, answer = heapq.heappop(self.events)
            if stub.held.pop(grant.key, None) is None:
                continue  # abandoned
            changed[stub.name] = stub
            seq = next(stub.seqs)
            if answer in ("group", "invalid"):
                group = train_group(grant.ordinal, grant.attempt, version=grant.issued_version)
                if answer == "invalid":
                    group.rollouts[0].token_ids[0] = 10**6
                self.parts.deliver(stub.session, group, seq, self.now)
            else:
                failed = messages.LeaseFailed(
                    seq, 1, LeaseKind.TRAIN, grant.ordinal, grant.attempt, FailureReason(answer), f"stub: {answer}"
                )
                self.parts.failed(stub.session, failed, self.now)
        for stub in changed.values():
            self._beat(stub)

    def _beat(self, stub):
        room = max(0, stub.room - len(stub.held)) * 4
        self.parts.sessions.of(stub.name.encode(), self.now)
        self.generators.beat(
            stub.session,
            beat(
                sequences_wanted=stub.received + room,
                sequences_received=stub.received,
                active=[messages.ActiveLease(*grant.key, grant.issued_version) for grant in stub.held.values()],
                tokens_generated=int(self.now * 1000),
                held_version=self.planner.held_version(stub.name),
            ),
            self.now,
        )
