"""The learner's weight plane and its receivers in one process, without a trainer and without engines.

The publisher runs in its thread over a real socket, and channels are real; receivers stage in threads and show the
learner's own canary.
"""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import torch

from asyncrl.errors import AsyncRLError
from asyncrl.link.codec import decode, encode
from asyncrl.link.messages import SyncOffer, SyncReply, SyncSwap
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.trainer_messages import BroadcastDone, ChannelReady, SnapshotReady
from asyncrl.link.weight_records import BitsInUse
from asyncrl.link.wire_types import SyncPhase
from asyncrl.weights.bytes.snapshot import SnapshotBuffer
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.plan.planner import SyncPlanner
from asyncrl.weights.plan.records import Committed, RoundEnded, SyncFailed, ToGenerator, ToPublisher
from asyncrl.weights.publisher import Publisher
from asyncrl.weights.staging import receive

MAX_BYTES = 1 << 24
TIMEOUT_S = 20.0
CANARY = [np.arange(4)]
SCORES = [np.full(3, -1.5, np.float32)]


class Receiver:
    """One generator: stages in a thread, holds what it staged."""

    def __init__(self, name, replies):
        self.name = name
        self.held = None
        self.deaf = False  # it takes no part in anything
        self.encodings = []
        self._replies = replies
        self._channel = None

    def take(self, message):
        if self.deaf:
            return
        if isinstance(message, SyncOffer):
            threading.Thread(target=self._stage, args=(message,), daemon=True).start()
        elif isinstance(message, SyncSwap):
            scores = [row.tobytes() for row in SCORES]
            in_use = [BitsInUse(message.version, 9, [], [])]
            reply = SyncReply(1, message.version, message.attempt, SyncPhase.SWAP, "", [], scores, {}, in_use)
            self._replies.put((self.name, reply))

    def _stage(self, offer):
        manifest = offer.manifest
        self.encodings.append("dense" if manifest.delta is None else "delta")
        spec = offer.channel.spec(offer.timeout_s)
        held, self.held, digests, error = self.held, None, [], ""
        try:
            if self._channel is None or self._channel.spec.prefix != spec.prefix:
                self.close()
                self._channel = WeightChannel(spec)
                self._channel.join()
            self.held = receive(self._channel, manifest, held, torch.device("cpu"), offer.timeout_s, digests)
        except AsyncRLError as failure:
            error = str(failure)
        reply = SyncReply(1, offer.version, offer.attempt, SyncPhase.STAGE, error, [] if error else [digests])
        self._replies.put((self.name, reply))

    def close(self):
        if self._channel is not None:
            self._channel.close()


class World:
    """A learner's weight plane without a trainer: `step` changes weights, `publish` brings them to all receivers."""

    def __init__(self, dtype=torch.bfloat16, cell_size=8, timeout_s=TIMEOUT_S, **options):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(20_000, generator=generator).to(dtype))
        named = [("weight", self.weight)]
        self.socket = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
        self.publisher = Publisher(
            self.socket.address,
            SnapshotBuffer(named, 4096),
            CANARY,
            host="127.0.0.1",
            **options,
        )
        self.publisher.start()
        self.begin(timeout_s, cell_size)

    def begin(self, timeout_s, cell_size):
        """The desk's end, without receivers."""
        self.planner = SyncPlanner(run_epoch=1, run_name="r", timeout_s=timeout_s, tolerance=1e-6, cell_size=cell_size)
        self.replies = queue.Queue()
        self.receivers = {}
        self.ended, self.failed = [], []
        self.before_offer = lambda: None
        self._peer = None
        self._version = -1

    def join(self, name):
        self.receivers[name] = Receiver(name, self.replies)
        self.planner.joined(name, 1, 1, time.monotonic())

    def step(self, share=0.02):
        with torch.no_grad():
            words = self.weight.view({2: torch.int16, 4: torch.int32}[self.weight.element_size()])
            words[: int(len(words) * share)] += 1

    def publish(self):
        """The next version to everybody; the encodings of its rounds."""
        self._version += 1
        self.publisher.publish(self._version, SCORES)
        return self.settle()

    def publish_to(self, *names):
        """The next version, until these hold it."""
        self._version += 1
        self.publisher.publish(self._version, SCORES)
        self.wait(lambda: self._all_hold(self._version, names))

    def _all_hold(self, version, names=None):
        names = self.receivers if names is None else names
        return all(self.planner.held_version(name) == version for name in names)

    def wait(self, condition, timeout_s=2 * TIMEOUT_S):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            self._turn()

    def offer(self):
        """The next version to the planner alone."""
        self._version += 1
        self.publisher.publish(self._version, SCORES)
        self.wait(lambda: self.planner.snapshot is not None and self.planner.snapshot.version == self._version)

    def settle(self):
        first = len(self.ended)
        self.wait(lambda: not self.planner.rounds and self._all_hold(self._version))
        for receiver in self.receivers.values():
            assert torch.equal(receiver.held.buffer[: self.weight.nbytes], self.weight.detach().view(torch.uint8))
        rounds = self.ended[first:]
        assert all(ended.dense_bytes == -(-self.weight.nbytes // 64) * 64 for ended in rounds)
        return ["dense" if ended.base_version is None else "delta" for ended in rounds]

    def _turn(self):
        now = time.monotonic()
        for peer, frame in self.socket.poll(0.005):
            self._peer, message = peer, decode(frame, max_bytes=MAX_BYTES)
            match message:
                case SnapshotReady():
                    self.before_offer()
                    self.planner.snapshot_ready(message, now)
                case ChannelReady():
                    self.planner.channel_ready(message, now)
                case BroadcastDone():
                    self.planner.broadcast_done(message, now)
        while not self.replies.empty():
            self.planner.reply(*self.replies.get(), now)
        self.planner.advance(now)
        for output in self.planner.take_outputs():
            match output:
                case ToPublisher(message):
                    self.socket.send(self._peer, encode(message, max_bytes=MAX_BYTES))
                case ToGenerator(name, message):
                    self.receivers[name].take(decode(encode(message, max_bytes=MAX_BYTES), max_bytes=MAX_BYTES))
                case RoundEnded():
                    self.ended.append(output)
                case SyncFailed():
                    self.failed.append(output)
                case Committed():
                    pass

    def close(self):
        self.publisher.stop(10.0)
        for receiver in self.receivers.values():
            receiver.close()
        self.socket.close()
        assert self.publisher.crash is None
