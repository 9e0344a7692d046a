"""The desk's side towards the trainer ranks: from where they train, what they get, what they report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from asyncrl.desk.batches import BatchDealer, DecidedStep
from asyncrl.desk.counters import Counters
from asyncrl.desk.intake import Intake
from asyncrl.link import messages
from asyncrl.link.codec import encode
from asyncrl.link.messages import Message
from asyncrl.link.session import DeskSession
from asyncrl.link.sockets import ServerSocket
from asyncrl.metrics import Metrics
from asyncrl.replay.frontier import Frontier
from asyncrl.replay.recovery import replay_plan
from asyncrl.storage.checkpoint_files import oldest_version
from asyncrl.storage.records import GroupsDropped, StepTaken, StoredGroup

log = logging.getLogger(__name__)


class Ranks:
    """`version` is the newest policy version that exists; `desk_state` says what a checkpoint must hold of the desk."""

    def __init__(
        self,
        *,
        run_epoch: int,
        version: int,
        socket: ServerSocket,
        intake: Intake,
        dealer: BatchDealer,
        metrics: Metrics,
        last_logged_version: int,
        desk_state: Callable[[], dict[str, Any]],
        checkpoints: Path,
    ) -> None:
        self.version = self._first_version = version
        self.socket = socket
        self._run_epoch = run_epoch
        self._intake = intake
        self._journal = intake.journal
        self._account: Counters = intake.account
        self._dealer = dealer
        self._metrics = metrics
        self._last_logged_version = last_logged_version
        self._desk_state = desk_state
        self._checkpoints = checkpoints
        self._peers: dict[int, bytes] = {}  # rank -> routing id
        self._step_ended_at = time.monotonic()

    # -- life ------------------------------------------------------------------------------------------------------

    def hello(self, peer: bytes, hello: messages.TrainerHello) -> None:
        """Everything after the trainer's checkpoint is trained again, from the journal, before anything new."""
        self._peers[hello.rank] = peer
        self._dealer.world_size = hello.world_size
        steps = replay_plan(hello.version, Frontier(), self._journal.read_all()).steps
        reached = hello.version + len(steps)
        if self._dealer.decided_version == reached - 1 and self.version < reached:
            reached -= 1  # decided in this life and not trained yet: it is new, whatever the journal says
        replay_to = max(self.version, reached)
        if replay_to > hello.version:
            log.info("trainer is at version %d, trains again from the journal to %d", hello.version, replay_to)
        self._dealer.train_again(steps, replay_to)
        self._intake.newest_version = max(self._intake.newest_version, replay_to)
        self._send(hello.rank, messages.TrainerWelcome(self._run_epoch, replay_to))

    def begin(self, now: float) -> None:
        """The first generator is ready: time before that is start-up, not idling."""
        if self.version == self._first_version:
            self._step_ended_at = now

    @property
    def present(self) -> bool:
        """A trainer said hello and did not die since."""
        return bool(self._peers)

    @property
    def at_end(self) -> bool:
        """The trainer that lives now has made all steps."""
        return self._dealer.at_end

    def request(self, peer: bytes, message: messages.BatchRequest) -> None:
        if self._peers.get(message.rank) != peer:
            return  # it died, and this was still on its way
        self._dealer.request(message.rank, message.version)

    def lost(self) -> None:
        """The trainer died; another one will say hello."""
        self._peers.clear()
        self._dealer.forget_ranks()

    def stop(self, finished: bool, reason: str) -> None:
        for rank in self._peers:
            self._send(rank, messages.TrainerStop(checkpoint=True, export=finished, reason=reason))

    # -- batches ---------------------------------------------------------------------------------------------------

    @property
    def waiting_version(self) -> int | None:
        """The version whose batch the ranks wait for, if it is not decided."""
        return self._dealer.needs_decision()

    def decide(self, now: float) -> list[DeskSession]:
        """Chooses the batch the ranks wait for, if the buffer may be taken from.

        Returns the sessions whose results became durable on the way, to be acknowledged.
        """
        version, buffer, leases = self._dealer.needs_decision(), self._intake.buffer, self._intake.leases
        if version is None:
            return []
        self._drop(buffer.drop_over_age(version), now)
        if not buffer.can_take(version, leases.running_by_version):
            return []
        batch = buffer.take(version)
        leases.train(group.key for group in batch)
        self._intake.batch_taken()
        self._journal.append(StepTaken(version, tuple((g.ordinal, g.attempt) for g in batch)), now)
        sessions = self._intake.sync()  # the decision is durable before any rank sees a group
        self._account.rollouts_trained += sum(len(group.num_tokens) for group in batch)
        self._dealer.decide(DecidedStep(version, batch, msgpack.packb(self._desk_state())))
        return sessions

    def deal(self) -> None:
        """Sends out the shards of a decided batch once every rank asked."""
        self._dealer.deal(self._send)

    def _drop(self, dropped: list[StoredGroup], now: float) -> None:
        if not dropped:
            return
        self._journal.append(GroupsDropped(tuple((g.ordinal, g.attempt) for g in dropped)), now)
        for group in dropped:
            self._intake.leases.drop(group.key, now)
            self._account.rollouts_dropped += len(group.num_tokens)
        log.warning("%d groups were over max_age and are leased again", len(dropped))

    # -- reports ---------------------------------------------------------------------------------------------------

    def step_done(self, done: messages.StepDone, num_alive: int, now: float) -> None:
        interval_s, self._step_ended_at = now - self._step_ended_at, now
        self.version = max(self.version, done.version)
        if done.version > self._last_logged_version:
            self._last_logged_version = done.version
            figures = self._account.step_metrics(done, interval_s, self._intake.buffer, num_alive)
            self._metrics.log_step(figures)

    def checkpoint_done(self, done: messages.CheckpointDone) -> None:
        if done.error:
            log.error("checkpoint of version %d failed, training goes on: %s", done.version, done.error)
            return
        log.info("checkpoint of version %d in %.1f s: %s", done.version, done.seconds, done.path)
        # The oldest one kept: a recovery may have to fall back to it, and then needs the journal since.
        self._journal.delete_before(oldest_version(self._checkpoints) or 0)

    def _send(self, rank: int, message: Message) -> None:
        """Best effort: a rank asks again for what did not come."""
        peer = self._peers.get(rank)
        if peer is None or not self.socket.send(peer, encode(message, max_bytes=self.socket.max_frame_bytes)):
            log.debug("%s to rank %d not sent", type(message).__name__, rank)
