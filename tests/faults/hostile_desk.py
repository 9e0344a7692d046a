"""The whole desk under well-formed messages with hostile values and in hostile orders, in virtual time.

    python -m tests.faults.hostile_desk --messages 50000 --seeds 20

One honest generator, an honest trainer, and peers that answer as a generator would and then change what they say: any
number, text, list or byte string of a message becomes another one, out of its range or just strange. The desk may
refuse and drop; it must not raise, and the honest generator must go on bringing groups.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

import msgpack
import numpy as np

from asyncrl.desk.daemon import Surroundings, make_desk
from asyncrl.desk.desk import FROM_GENERATOR, FROM_TRAINER
from asyncrl.errors import FrameError
from asyncrl.link import messages, trainer_messages
from asyncrl.link.codec import encode, encode_body, frame_with_body
from asyncrl.link.messages import ActiveLease
from asyncrl.link.weight_records import BitsInUse
from asyncrl.link.wire_types import FailureReason, SyncPhase
from asyncrl.types import LOGPROB_DTYPE
from tests.desk.desk_parts import MEBIBYTE, VOCAB, MetricsLog, beat, hello, make_parts, small_config
from tests.weights.manifests import manifest_of

HONEST = b"honest"
NUM_HOSTILE = 5
MESSAGES_A_TURN = 16
CANARY = [np.arange(4, dtype="<i4").tobytes()]
CANARY_LOGPROBS = [np.full(3, -1.5, dtype=LOGPROB_DTYPE).tobytes()]
FIGURES = {"reward_mean": 0.5, "reward_std": 0.1, "policy_age_mean": 0.0, "policy_age_max": 0.0}
NUMBERS = (0, 1, 2, 3, -1, 255, 1000, 1024, 1025, 2**31, 2**32, 2**53 - 1, 2**53, 2**61, 2**62 - 1, 2**62, 2**63 - 1)
NUMBERS += (2**63, 2**64 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e38, -1e38, 1.7e308, 5e-324, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    " ",
    "x" * 5000,
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "🙂" * 40,
    "train",
    "eval",
    "stage",
    "swap",
    "engine",
    "evil-1",
    "honest",
)


class Keys:
    """Stands for PeerKeys: the honest generator's id is listed for its key, and nobody else's is."""

    def refusal(self, peer, generator_id):
        return "" if (peer == HONEST) == (generator_id == HONEST.decode()) else "another key speaks for it"

    def revoked(self, now):
        return []


class Wire:
    """Stands for a ROUTER: frames come from a queue, messages go to the inbox of their peer."""

    max_frame_bytes = 4 * MEBIBYTE
    handshakes_refused = 0
    malformed_messages = 0
    keys = Keys()
    address = "inproc://wire"

    def __init__(self):
        self.frames = deque()
        self.inboxes = {}

    def receive(self):
        taken = list(self.frames)
        self.frames.clear()
        return taken

    def send_message(self, peer, message):
        encode(message, max_bytes=self.max_frame_bytes)  # raises what it would raise
        inbox = self.inboxes.get(peer)
        if inbox is not None:
            inbox.append(message)
        return inbox is not None

    def reaches(self, peer, message):
        return self.send_message(peer, message)


class Process:
    """Stands for the trainer's process, which lives."""

    running, exit_code = True, None

    def poll(self, now):
        return False

    def stepped(self):
        pass


class Stop:
    """Stands for StopSignal: nobody sends one."""

    fd, received = -1, None


class Trainer:
    """One rank and the publisher: trains each batch at once, and publishes when it is asked to."""

    def __init__(self, wire):
        self.wire = wire
        self.inbox = wire.inboxes[b"trainer"] = deque(maxlen=1000)
        self.version = self.published = 0
        self.say(trainer_messages.TrainerHello(0, 1, 0, 1))
        self.say(trainer_messages.BatchRequest(0, 0))
        self.publish()

    def say(self, message):
        self.wire.frames.append((b"trainer", encode(message, max_bytes=self.wire.max_frame_bytes)))

    def publish(self):
        manifest = manifest_of(self.version, [self.version, 7])
        self.published = self.version
        self.say(trainer_messages.SnapshotReady(self.version, manifest, CANARY, CANARY_LOGPROBS, 1.0))

    def turn(self):
        while self.inbox:
            match self.inbox.popleft():
                case trainer_messages.Batch(version) if version == self.version:
                    self.version += 1
                    self.say(trainer_messages.StepDone(self.version, FIGURES, 0.1, {}))
                    self.say(trainer_messages.BatchRequest(0, self.version))
                case trainer_messages.OpenChannel(epoch):
                    self.say(trainer_messages.ChannelReady(epoch, "127.0.0.1", 1234, "", "gloo", self.published))
                case trainer_messages.Broadcast(version, attempt, epoch):
                    self.say(trainer_messages.BroadcastDone(version, attempt, epoch, "", 1.0, 10))
                case trainer_messages.SnapshotWanted(version) if version < self.version or version == self.published:
                    self.publish()


class Peer:
    """A generator as the desk sees it: `answer` makes the next message that an honest one might send."""

    def __init__(self, wire, routing_id, chance):
        self.wire = wire
        self.chance = chance
        self.routing_id = routing_id
        self.name = routing_id.decode()
        self.inbox = wire.inboxes[routing_id] = deque(maxlen=1000)
        self.incarnation = 0
        self.restart()

    def restart(self):
        self.incarnation += 1
        self.seqs = itertools.count(1)
        self.leases, self.todo = [], deque()
        self.said_hello = False
        self.wanted = self.received = 0
        self.held = None
        self.acked = 0

    def hello(self):
        self.said_hello = True
        return dataclasses.replace(hello(self.name, self.incarnation), first_unacked_seq=self.acked + 1)

    def beat(self):
        self.wanted = self.received + 4 * max(0, 3 - len(self.leases))
        active = [ActiveLease(*grant.key, grant.issued_version) for grant in self.leases]
        tickets = [grant.ticket for grant in self.leases]
        progress = self.chance.randrange(2**40)
        changes = {"sequences_wanted": self.wanted, "sequences_received": self.received, "tokens_generated": progress}
        time_s = {"decode": 1.0 * self.received, "other": 0.5}
        return beat(active=active, tickets=tickets, held_version=self.held, time_s=time_s, **changes)

    def result(self):
        grant = self.leases.pop(0)
        tokens = np.arange(3, dtype="<i4") % VOCAB
        logprobs = np.full(3, -1.0, dtype=LOGPROB_DTYPE)
        version = self.held or 0
        spans = np.array([0, 3, version], dtype="<i8")
        rollouts = [
            messages.WireRollout(
                tokens.tobytes(), logprobs.tobytes(), spans.tobytes(), "stop", float(n), {"exact": float(n)}
            )
            for n in range(grant.num_rollouts)
        ]
        key = grant.key
        return messages.GroupResult(next(self.seqs), 1, *key, grant.prompt, rollouts, ticket=grant.ticket)

    def failure(self):
        grant = self.leases.pop(0)
        reason = self.chance.choice(list(FailureReason))
        return messages.LeaseFailed(next(self.seqs), 1, *grant.key, reason, "it failed", ticket=grant.ticket)

    def read(self):
        """Takes in what the desk said; what must be answered goes to `todo`."""
        while self.inbox:
            match message := self.inbox.popleft():
                case messages.LeaseGrant():
                    self.leases.append(message)
                    self.received += message.num_rollouts
                case messages.Abandon():
                    self.leases = [grant for grant in self.leases if grant.key not in message.leases]
                case messages.SyncOffer():
                    digests = [list(message.manifest.digests)]
                    self.todo.append(
                        messages.SyncReply(1, message.version, message.attempt, SyncPhase.STAGE, "", digests)
                    )
                case messages.SyncSwap():
                    self.todo.append(self.swapped(message))
                case messages.SyncCommit():
                    self.held = message.version
                case messages.Ack():
                    self.acked = max(self.acked, message.acked_seq)
                case messages.Nack(_, 0):
                    self.said_hello = False
                case messages.Refusal():
                    self.restart()

    def swapped(self, swap):
        in_use = [BitsInUse(swap.version, 5, [], [])]
        reply = messages.SyncReply(1, swap.version, swap.attempt, SyncPhase.SWAP, "", [], CANARY_LOGPROBS)
        return dataclasses.replace(reply, in_use=in_use)

    def answer(self):
        """One message of an honest generator, out of what is due."""
        self.read()
        if not self.said_hello:
            return self.hello()
        if self.todo:
            return self.todo.popleft()
        if self.leases and self.chance.random() < 0.6:
            return self.result()
        return self.beat()

    def any_message(self):
        """One message of any kind, due or not."""
        self.read()
        kinds = [self.hello, self.beat, self.beat, lambda: messages.Bye("tired")]
        if self.leases:
            kinds += [self.result, self.failure, self.result]
        else:
            kinds += [self.forged_result, self.forged_failure]
        if self.todo:
            kinds += [self.todo.popleft, lambda: self.todo[0]]
        return self.chance.choice(kinds)()

    def forged_result(self):
        return messages.GroupResult(
            self.chance.choice(NUMBERS[:8]) % 9, 1, "train", self.chance.randrange(40), 0, b"", []
        )

    def forged_failure(self):
        ordinal = self.chance.randrange(40)
        return messages.LeaseFailed(next(self.seqs), 1, "train", ordinal, 0, FailureReason.ENGINE, "")


class Hostile:
    """Changes the bodies of messages. Values come from a pool of strange ones and from what it has seen."""

    def __init__(self, chance):
        self.chance = chance

    def frame(self, message):
        plain = msgpack.unpackb(encode_body(message))
        for _ in range(self.chance.choice((0, 1, 1, 1, 2, 4))):
            plain = self.changed(plain)
        return frame_with_body(type(message), msgpack.packb(plain), max_bytes=4 * MEBIBYTE)

    def changed(self, value):
        chance = self.chance
        if isinstance(value, list):
            if value and chance.random() < 0.85:
                place = chance.randrange(len(value))
                return [*value[:place], self.changed(value[place]), *value[place + 1 :]]
            return chance.choice((value[:-1], value * 2, value * 100 if len(value) < 40 else value, [], value[::-1]))
        if isinstance(value, dict):
            if value and chance.random() < 0.9:
                key = chance.choice(list(value))
                return value | {key: self.changed(value[key])}
            return chance.choice(({}, value | {"more": 1.0}, dict.fromkeys(TEXTS, 1.0)))
        if isinstance(value, bool) or value is None:
            return chance.choice((True, False, None, 0, 1))
        if isinstance(value, int):
            return chance.choice((chance.choice(NUMBERS), value + 1, value - 1, chance.randrange(60)))
        if isinstance(value, float):
            return chance.choice((chance.choice(FLOATS), value * 2, -value))
        if isinstance(value, str):
            return chance.choice((chance.choice(TEXTS), value + "x"))
        return chance.choice(
            (b"", value[:-1], value * 2, bytes(len(value)), chance.randbytes(len(value)), value + b"\xff")
        )


class World:
    """One run of a seed."""

    def __init__(self, folder: Path, seed: int):
        (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "architectures": ["Tiny"]}))
        config = small_config(
            run__dir=str(folder),
            run__steps=100_000,
            model__path=str(folder),
            generator__lease_timeout_s=30.0,
            weights__timeout_s=5.0,
            eval__every=50,
            eval__prompts=3,
        )
        self.chance = random.Random(seed)
        self.parts = make_parts(folder, config, flush=lambda fd: None)
        self.wire, ranks = Wire(), Wire()
        surroundings = Surroundings(self.wire, ranks, Process(), MetricsLog(), Stop())
        self.desk = make_desk(config, self.parts.state, self.parts.prompts, surroundings)
        self.ranks = ranks
        self.trainer = Trainer(ranks)
        self.honest = Peer(self.wire, HONEST, self.chance)
        self.peers = [Peer(self.wire, f"evil-{n}".encode(), self.chance) for n in range(NUM_HOSTILE)]
        self.hostile = Hostile(self.chance)
        self.now = 0.0
        self.sent = Counter()
        self.slowest_s = 0.0

    def run(self, num_messages):
        honest_at = 0.0
        while sum(self.sent.values()) < num_messages:
            for _ in range(MESSAGES_A_TURN):
                self._speak(self.chance.choice(self.peers))
            if self.now >= honest_at:
                honest_at = self.now + 0.2
                self.wire.frames.append((HONEST, encode(self.honest.answer(), max_bytes=MEBIBYTE)))
            self._turn()
            self.now += self.chance.choice((0.001, 0.02, 0.1))
        self._check()

    def _speak(self, peer):
        message = peer.answer() if self.chance.random() < 0.5 else peer.any_message()
        if self.chance.random() < 0.002:
            peer.restart()
        try:
            frame = self.hostile.frame(message)
        except (FrameError, OverflowError):
            return
        # The routing id of another connection cannot be had: the ROUTER gives it to one at a time.
        self.wire.frames.append((peer.routing_id, frame))
        self.sent[type(message).__name__] += 1

    def _turn(self):
        started = time.perf_counter()
        desk, now = self.desk, self.now
        desk.boundary.from_generators(self.wire, FROM_GENERATOR, desk._from_generator, now)
        desk.boundary.from_ranks(self.ranks, FROM_TRAINER, desk._from_trainer, now)
        assert not desk._over(now), "a message ended the run"
        desk._tick(now)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        assert not desk.boundary.defects, desk.boundary.defects
        self.trainer.turn()

    def _check(self):
        """Every prompt is in one place, and the honest generator was served all the while."""
        book = self.parts.leases
        places = [book._waiting, book._running, book._accepted, book._settled]
        for ordinal in range(book._next_ordinal):
            found = sum(ordinal in place for place in places)
            assert found == 1, f"ordinal {ordinal} is in {found} places"
        counted = Counter(record.issued_version for record in book.running())
        assert counted == Counter(dict(book.running_by_version))
        session = self.parts.sessions.get("honest")
        assert session is not None and session.incarnation == 1, "the honest generator was fenced"
        assert self.honest.acked > self.now / 5, f"{self.honest.acked} results of the honest generator in {self.now} s"
        assert self.parts.state.policy.trained > 0, "nothing was trained"

    def close(self):
        self.parts.journal.close()


def run(seed, num_messages):
    """Runs one seed and returns its world. An error says how to repeat it."""
    folder = Path(tempfile.mkdtemp(prefix="asyncrl-hostile-"))
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        world = World(folder, seed)
        world.run(num_messages)
        world.close()
    except BaseException as error:
        error.add_note(
            f"repeat: python -m tests.faults.hostile_desk --messages {num_messages} --first {seed} --seeds 1"
        )
        raise
    finally:
        logging.disable(disabled)
        shutil.rmtree(folder, ignore_errors=True)
    return world


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    for seed in range(options.first, options.first + options.seeds):
        started = time.perf_counter()
        world = run(seed, options.messages)
        print(
            f"seed {seed}: {sum(world.sent.values())} hostile messages in {time.perf_counter() - started:.1f} s and "
            f"{world.now:.0f} s of the run; {world.parts.state.policy.trained} versions, "
            f"{world.honest.acked} results of the honest generator; slowest turn {world.slowest_s * 1e3:.0f} ms",
            flush=True,
        )
    print("no exception; every prompt in one place; the honest generator was served")


if __name__ == "__main__":
    main()
