"""The trainer's ranks as the desk sees them: from where they train, what they get, what they report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.batches import BatchDealer, DecidedStep
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.run_state import RunState
from asyncrl.host.cpu_time import TreeCpuTime
from asyncrl.link import trainer_messages
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ServerSocket
from asyncrl.metrics import Metrics
from asyncrl.replay.recovery import steps_to_repeat
from asyncrl.report.rollouts.jobs import JobEntry, RolloutJob
from asyncrl.report.rollouts.writer import RolloutWriter
from asyncrl.storage.checkpoint_files import oldest_version
from asyncrl.storage.records import GroupsDropped, StepTaken, StoredGroup
from asyncrl.types import LeaseKind

log = logging.getLogger(__name__)


class Ranks:
    """All ranks of the trainer.

    last_logged_version is the newest step that is in the metrics already; checkpoints is the folder in which the run
    keeps its checkpoints; keeps_journal says that no segment of the journal is deleted; rollouts writes those of some
    steps, None writes none.
    """

    def __init__(
        self,
        *,
        socket: ServerSocket,
        state: RunState,
        acknowledgements: Acknowledgements,
        dealer: BatchDealer,
        prompts: LeasedPrompts,
        metrics: Metrics,
        last_logged_version: int,
        checkpoints: Path,
        keeps_journal: bool = False,
        rollouts: RolloutWriter | None = None,
    ) -> None:
        self.socket = socket
        self._state = state
        self._policy = state.policy
        self._journal = state.journal
        self._counters = state.counters
        self._acknowledgements = acknowledgements
        self._dealer = dealer
        self._prompts = prompts
        self._metrics = metrics
        self._last_logged_version = last_logged_version
        self._checkpoints = checkpoints
        self._keeps_journal = keeps_journal
        self._rollouts = rollouts
        self._payloads: dict[int, Mapping[str, Any]] = {}  # by ordinal, of the batch decided last
        self._peers: dict[int, bytes] = {}  # rank -> routing id
        self._step_ended_at = time.monotonic()
        self._has_logged = False  # a step of this life of the learner
        self._cpu_time = TreeCpuTime()
        self._cpu_s = 0.0  # at the newest step that was reported

    # -- life ------------------------------------------------------------------------------------------------------

    def hello(self, peer: bytes, hello: trainer_messages.TrainerHello) -> None:
        """Everything after the trainer's checkpoint is trained again, from the journal, before anything new."""
        self._peers[hello.rank] = peer
        self._dealer.world_size = hello.world_size
        steps = steps_to_repeat(hello.version, self._journal)
        replay_to = self._policy.trainer_started(hello.version, len(steps))
        if replay_to > hello.version:
            log.info("trainer is at version %d, trains again from the journal to %d", hello.version, replay_to)
        self._dealer.train_again(steps)
        self._send(hello.rank, trainer_messages.TrainerWelcome(self._state.run_epoch, replay_to))

    def begin(self, now: float) -> None:
        """The first generator is ready: time before that is start-up, not idling."""
        if self._policy.trained == self._policy.resumed_from:
            self._step_ended_at = now

    @property
    def present(self) -> bool:
        """Whether a trainer said hello and has not died since."""
        return bool(self._peers)

    @property
    def at_end(self) -> bool:
        """Whether the trainer that lives now has made all steps."""
        return self._dealer.at_end

    def request(self, peer: bytes, message: trainer_messages.BatchRequest) -> None:
        """A rank asks for the batch of its version."""
        if self._peers.get(message.rank) != peer:
            return  # it died, and this was still on its way
        self._dealer.request(message.rank, message.version)

    def lost(self) -> None:
        """The trainer died; another one will say hello."""
        self._peers.clear()
        self._dealer.forget_ranks()
        self._counters.trainer_lost()

    def stop(self, finished: bool, reason: str) -> None:
        """Tells the ranks to save and end; when the run is finished, they export the model too."""
        for rank in self._peers:
            self._send(rank, trainer_messages.TrainerStop(checkpoint=True, export=finished, reason=reason))

    # -- batches ---------------------------------------------------------------------------------------------------

    @property
    def waiting_version(self) -> int | None:
        """The version whose batch the ranks wait for, if it is not decided."""
        return self._dealer.needs_decision()

    def decide(self, now: float) -> bool:
        """Chooses the batch the ranks wait for, if the buffer may be taken from; says whether it did.

        Results that were not durable yet become so on the way, and can be acknowledged. Raises JournalError.
        """
        version = self._dealer.needs_decision()
        if version is None:
            return False
        buffer = self._state.buffer
        leases = self._state.leases
        self._drop(buffer.drop_over_age(version), now)
        if not buffer.can_take(version, leases.running_by_version):
            return False
        batch = buffer.take(version)
        if self._rollouts is not None:
            self._payloads = self._prompts.payloads(group.ordinal for group in batch)
        leases.train(group.key for group in batch)
        self._journal.append(StepTaken(version, tuple((g.ordinal, g.attempt) for g in batch)), now)
        self._acknowledgements.make_durable()  # the decision is durable before any rank sees a group
        self._policy.batch_decided(version)
        self._counters.batch_decided(version + 1, batch)
        self._dealer.decide(DecidedStep(version, batch, self._state.for_checkpoint().encode()))
        return True

    def deal(self) -> None:
        """Sends out the shards of a decided batch once every rank asked."""
        self._dealer.deal(self._send)

    def _drop(self, dropped: list[StoredGroup], now: float) -> None:
        if not dropped:
            return
        self._journal.append(GroupsDropped(tuple((g.ordinal, g.attempt) for g in dropped)), now)
        for group in dropped:
            self._state.leases.drop(group.key, now)
            self._counters.totals.rollouts_dropped += len(group.num_tokens)
        log.warning("%d groups were over max_age and are leased again", len(dropped))

    # -- reports ---------------------------------------------------------------------------------------------------

    def step_done(self, peer: bytes, done: trainer_messages.StepDone, num_alive: int, now: float) -> None:
        """A step was made. It is reported once, however often it is trained again; num_alive counts generators."""
        if peer not in self._peers.values():
            done = dataclasses.replace(done, time_s={})  # it died, and its successor counts from zero
        self._policy.step_made(done.version)
        is_new = done.version > self._last_logged_version
        interval_s = now - self._step_ended_at
        if is_new or not self._has_logged:  # what a restart repeats is part of the interval of the next new step
            self._step_ended_at = now
        if is_new:
            self._last_logged_version, self._has_logged = done.version, True
            before, self._cpu_s = self._cpu_s, self._cpu_time.seconds()
            figures = self._counters.step_metrics(done, interval_s, self._state.buffer, num_alive, self._cpu_s - before)
            self._metrics.log_step(figures)

    def step_rollouts(self, message: trainer_messages.StepRollouts) -> None:
        """Rollouts of a step, to be written beside. What is not known of them any more stays out."""
        batch = self._dealer.in_hand
        if self._rollouts is None or batch is None or batch.version + 1 != message.version:
            return
        by_ordinal = dict(zip((ordinal for ordinal, _ in batch.groups), batch.generator_ids, strict=True))
        entries = [
            JobEntry(rollout, by_ordinal.get(ordinal), self._payloads.get(ordinal))
            for ordinal, rollout in zip(message.ordinals, message.rollouts, strict=True)
        ]
        self._rollouts.write(RolloutJob(LeaseKind.TRAIN, message.version, entries))

    def checkpoint_done(self, done: trainer_messages.CheckpointDone) -> None:
        """A checkpoint was saved, or could not be: then the one before stays. Trims the journal."""
        if done.error:
            log.error("checkpoint of version %d failed, training goes on: %s", done.version, done.error)
            return
        log.info("checkpoint of version %d in %.1f s: %s", done.version, done.seconds, done.path)
        self._counters.checkpoint_saved(done.seconds)
        if self._keeps_journal:
            return
        # By the oldest checkpoint that is kept: a recovery may have to fall back to it, and needs the journal since.
        self._journal.delete_before(oldest_version(self._checkpoints) or 0)

    def _send(self, rank: int, message: Message) -> None:
        """Best effort: a rank asks again for what did not come."""
        peer = self._peers.get(rank)
        if peer is None or not self.socket.send_message(peer, message):
            log.debug("%s to rank %d not sent", type(message).__name__, rank)
