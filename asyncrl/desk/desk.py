"""The desk: the learner's process that talks. Sockets, leases, journal, replay buffer, weight-sync decisions; no torch.

One thread, one poll, no waits: every handler returns at once, every deadline is part of the poll's timeout.

    from            message                       who handles it, and what it does
    --------------  ----------------------------  ------------------------------------------------------------
    generator       Hello, Beat, Bye              generators: admits, compares leases, acknowledges
                    GroupResult, LeaseFailed      intake: validate → journal → buffer; acknowledged once durable
                    SyncReply                     versions: the planner's next phase
    trainer rank    TrainerHello                  ranks: from where to train again
                    BatchRequest                  ranks: decides the batch, journals it, deals the shards
                    StepDone, CheckpointDone      ranks: counts, trims the journal
                    StepRollouts                  ranks: to be written beside, with what the desk knows of them
    publisher       SnapshotReady, ChannelReady,  versions: the planner's next phase
                    BroadcastDone

The parts share one `RunState` and call each other's methods; nothing calls back into the desk. It survives the trainer:
while that restarts, rollouts are still taken and acknowledged.
"""

from __future__ import annotations

import logging
import time

from asyncrl.config import Config
from asyncrl.desk.acknowledgements import Acknowledgements
from asyncrl.desk.bad_batches import BadBatches
from asyncrl.desk.boundary import Boundary
from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.generators import Generators
from asyncrl.desk.intake import Intake, Taken
from asyncrl.desk.prompts import LeasedPrompts
from asyncrl.desk.ranks import Ranks
from asyncrl.desk.run_state import RunState
from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.desk.versions import Versions
from asyncrl.errors import JournalError, TooManyFailures, UserError
from asyncrl.host.garbage import rare_collections
from asyncrl.host.processes import StopSignal
from asyncrl.link import messages, trainer_messages
from asyncrl.link.codec import body_of
from asyncrl.link.desk_session import DeskSession
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import SocketPoller
from asyncrl.metrics.health import DaemonState, Pulse
from asyncrl.storage.room import GIB, DiskRoom
from asyncrl.storage.run_epoch import run_epoch_of

log = logging.getLogger(__name__)

FROM_GENERATOR = frozenset(
    {
        messages.Hello,
        messages.Beat,
        messages.GroupResult,
        messages.LeaseFailed,
        messages.SyncReply,
        messages.Bye,
    }
)
FROM_TRAINER = frozenset(
    {
        trainer_messages.TrainerHello,
        trainer_messages.BatchRequest,
        trainer_messages.StepDone,
        trainer_messages.StepRollouts,
        trainer_messages.CheckpointDone,
        trainer_messages.SnapshotReady,
        trainer_messages.ChannelReady,
        trainer_messages.BroadcastDone,
    }
)
MAX_WAIT_S = 0.5
SAY_WAITING_EVERY_S = 30.0
SAY_MISSING_AFTER_S = 4.0  # who is missing before any generator can work
LOOK_WHO_IS_MISSING_EVERY_S = 0.5
SIGNAL_STOP_TIMEOUT_S = 20.0  # systems that send it often kill 30 s later
FINISH_TIMEOUT_S = 600.0  # the last checkpoint and the export of a large model
# The last evaluation may take this many times generator.lease_timeout_s: once until a generator proves the version, and
# once until its prompts are answered.
FINAL_EVALUATION_LEASES = 2
# Prompts without a group after all their attempts: more than this, and more than a tenth of all, ends the run.
MAX_GIVEN_UP = 16
MAX_GIVEN_UP_SHARE = 0.1


class Desk:
    """Connects the parts; each keeps its own rules. `run` returns when the run is over or was stopped."""

    def __init__(
        self,
        config: Config,
        *,
        state: RunState,
        acknowledgements: Acknowledgements,
        intake: Intake,
        generators: Generators,
        prompts: LeasedPrompts,
        ranks: Ranks,
        versions: Versions,
        evaluator: Evaluator,
        process: TrainerProcess,
        bad_batches: BadBatches,
        stop: StopSignal,
        pulse: Pulse,
    ) -> None:
        self.config = config
        self.state = state
        self.acknowledgements = acknowledgements
        self.intake = intake
        self.generators = generators
        self.boundary = Boundary(generators)
        self.prompts = prompts
        self.ranks = ranks
        self.versions = versions
        self.evaluator = evaluator
        self.process = process
        self.bad_batches = bad_batches
        self.stop = stop
        self.pulse = pulse
        self.room = DiskRoom(
            state.journal,
            max_bytes=int(config.run.journal_max_gib * GIB),
            min_free_bytes=int(config.run.min_free_gib * GIB),
        )
        self._waiting_since: float | None = None
        self._stopping_since: float | None = None
        self._stopped_while_loading = False  # the trainer: it had nothing to save
        self._missing = ""  # who is missing before any generator can work, as last said
        self._missing_said_at: float | None = None
        self._look_who_is_missing_at = 0.0
        self._evaluating_since: float | None = None  # all steps are trained

    def run(self) -> int:
        """Serves until the last version is trained, evaluated and saved, or until a signal. Returns 0.

        Raises CheckpointError or TrainerFailed when the trainer failed at the end, TooManyFailures when prompts were
        given up wholesale, JournalError when the disk fails or another learner took over the run folder, TaskError or
        ModelError when no prompts can be made.
        """
        poller = SocketPoller()
        for source in (self.generators.socket, self.ranks.socket, self.stop.fd):
            poller.add(source)
        if self.prompts.fd >= 0:
            poller.add(self.prompts.fd)
        with rare_collections():
            while True:
                ready = poller.wait(self._timeout(time.monotonic()))
                now = time.monotonic()
                if self.generators.socket in ready:
                    self.boundary.from_generators(self.generators.socket, FROM_GENERATOR, self._from_generator, now)
                if self.ranks.socket in ready:
                    self.boundary.from_ranks(self.ranks.socket, FROM_TRAINER, self._from_trainer, now)
                if self._over(now):
                    return 0
                self._tick(now)

    def _tick(self, now: float) -> None:
        """Does what time or the last messages made due. Results count before a batch is decided."""
        self._take_prompts(now)
        self.intake.note_given_up(now)
        self.generators.judge()
        self._check_failures()
        self._check_superseded()
        self.acknowledgements.make_durable_if_due(now)
        self.generators.acknowledge()
        self._watch_trainer(now)
        self.generators.expire(now)
        self.generators.say_strangers(now)
        self.boundary.summarise(now)
        if self._stopping_since is None:
            self.versions.advance(now, self.generators)
            self.evaluator.advance(self.state.policy.trained, self.versions)
            if self.ranks.decide(now):
                self.intake.batch_taken()
            self.generators.acknowledge()
            self.state.leases.paused = self.state.sessions.paused = not self.room.has_room(now)
            self.generators.grant(now)
        self.ranks.deal()
        self._say_waiting(now)
        self._show_pulse()

    def _show_pulse(self) -> None:
        """Shows that the loop turned, and what the learner does. In few steps: this is done at each turn."""
        version = self.ranks.waiting_version
        if self._stopping_since is not None:
            self.pulse.turn(DaemonState.STOPPING, ready=False)
        elif self._missing or not self.ranks.present:
            self.pulse.turn(DaemonState.WAITING, self._missing or "the trainer is loading", ready=False)
        elif self._evaluating_since is not None:
            self.pulse.turn(DaemonState.WAITING, "the last evaluation", ready=True)
        elif version is not None:
            self.pulse.turn(DaemonState.WAITING, f"rollouts for the step after version {version}", ready=True)
        else:
            self.pulse.turn(DaemonState.TRAINING, ready=True)

    def _timeout(self, now: float) -> float:
        deadlines = (
            self.state.journal.durable_due,
            self.state.leases.next_deadline(now),
            self.versions.next_deadline(now),
            self.prompts.next_deadline(),
            now if self.generators.grants_left else now + MAX_WAIT_S,
        )
        return max(0.0, min(deadlines) - now)

    def _from_generator(self, peer: bytes, message: Message, frame: bytes, now: float) -> None:
        if isinstance(message, messages.Hello):
            self.generators.hello(peer, message, now)
            return
        session = self.generators.session_of(peer, now)
        if session is None:
            return
        match message:
            case messages.Beat():
                self.generators.beat(session, message, now)
            case messages.GroupResult():
                self._pass_on(session, self.intake.group(session, message, bytes(body_of(frame)), now))
            case messages.LeaseFailed():
                self._pass_on(session, self.intake.failed(session, message, len(frame), now))
            case messages.SyncReply():
                self.versions.reply(session.generator_id, message, now)
            case messages.Bye():
                self.generators.bye(session, message, now)

    def _pass_on(self, session: DeskSession, taken: Taken) -> None:
        """Tells generators what became of a result."""
        if taken.superseded is not None:
            self.generators.abandon(taken.superseded)
        if taken.reply is not None:
            self.generators.reply(session, taken.reply)

    def _from_trainer(self, peer: bytes, message: Message, frame: bytes, now: float) -> None:
        match message:
            case trainer_messages.TrainerHello():
                self.ranks.hello(peer, message)
                self.versions.trainer_joined(message.placement)
            case trainer_messages.BatchRequest():
                self.ranks.request(peer, message)
            case trainer_messages.StepDone():
                self.bad_batches.stepped(message.version)
                self.ranks.step_done(peer, message, len(self.generators.alive()), now)
                self.evaluator.advance(self.state.policy.trained, self.versions)
            case trainer_messages.StepRollouts():
                self.ranks.step_rollouts(message)
            case trainer_messages.CheckpointDone():
                self.ranks.checkpoint_done(message)
            case trainer_messages.SnapshotReady() if self.ranks.present:  # else its memory died with the trainer
                self.versions.snapshot_ready(peer, message, now)
            case trainer_messages.ChannelReady():
                self.versions.channel_ready(message, now)
            case trainer_messages.BroadcastDone():
                self.versions.broadcast_done(message, now)

    def _take_prompts(self, now: float) -> None:
        """Takes in the prompts that were made. Raises TaskError or ModelError when there is no going on."""
        if self._stopping_since is not None:
            return
        try:
            self.prompts.advance(now)
        except UserError:
            self.generators.stop(True, "the learner's task or model cannot be used; its log says why")
            raise
        for record in self.prompts.take_needless():
            self.generators.abandon(record)
        if (count := self.prompts.num_evals) is not None:
            self.evaluator.prompts_are_there(count, now)

    def _watch_trainer(self, now: float) -> None:
        if self._stopping_since is None and self.bad_batches.trainer_died(now):
            self.versions.trainer_lost(now)
            self.ranks.lost()

    def _check_failures(self) -> None:
        """Raises TooManyFailures when prompts are given up wholesale, or no generator brings groups any more."""
        leases = self.state.leases
        given_up = leases.num_given_up
        if given_up > MAX_GIVEN_UP and given_up > MAX_GIVEN_UP_SHARE * (given_up + leases.num_trained):
            self.generators.stop(True, "the learner gives up: too many prompts failed")
            raise TooManyFailures(
                f"{given_up} prompts got no group after all their attempts, {leases.num_trained} did "
                f"(rollouts lost by reason: {self.state.counters.totals.rollouts_failed}); see the warnings above, "
                "correct the task's reward or the generator, and start again"
            )
        if why := self.generators.hopeless():
            self.generators.stop(True, "the learner gives up: every generator fails")
            raise TooManyFailures(
                f"every generator's leases fail, trials after a back-off too ({why}); see the warnings above, correct "
                "the task's reward or the generators, and start again: the run goes on where it stands"
            )

    def _check_superseded(self) -> None:
        """Raises JournalError when another learner took over the run folder: all that this one does is lost then."""
        sessions = self.state.sessions
        if sessions.superseded_by is None:
            return
        # Not on a generator's word alone: it may come from a run of this name in a folder that was deleted.
        run_dir = self.config.run.dir
        newest = run_epoch_of(run_dir)
        if newest > sessions.run_epoch:
            raise JournalError(
                f"another learner has taken over {run_dir}: it is at run epoch {newest}, this one at "
                f"{sessions.run_epoch}; one learner per run.dir, stop one of them"
            )
        sessions.superseded_by = None

    # -- end -------------------------------------------------------------------------------------------------------

    def _over(self, now: float) -> bool:
        """Starts the end when it is time, and is True once the trainer has saved and gone."""
        if self._stopping_since is None:
            finished = self.ranks.at_end and self._is_evaluated(now)
            if not finished and self.stop.received is None:
                return False
            self._begin_stop(finished, now)
        assert self._stopping_since is not None
        limit_s = SIGNAL_STOP_TIMEOUT_S if self.stop.received is not None else FINISH_TIMEOUT_S
        if self.process.running and now - self._stopping_since < limit_s:
            return False
        if self.process.running:
            log.error("the trainer did not stop within %.0f s and is killed", limit_s)
            self.process.kill()
        self.acknowledgements.make_durable()
        self.generators.acknowledge()
        self._check_end()
        return True

    def _is_evaluated(self, now: float) -> bool:
        """Whether the last version is evaluated, or nobody was there for it in time."""
        if self.evaluator.idle:
            return True
        if self._evaluating_since is None:
            self._evaluating_since = now
            log.info("all %d steps are trained; %s", self.config.run.steps, self.evaluator.describe())
        limit_s = FINAL_EVALUATION_LEASES * self.config.generator.lease_timeout_s
        if now - self._evaluating_since < limit_s:
            return False
        log.error(
            "ends without its last evaluation %.0f s (%d x generator.lease_timeout_s) after the last step: %s; %s",
            limit_s,
            FINAL_EVALUATION_LEASES,
            self.evaluator.describe(),
            self.generators.describe(),
        )
        self.evaluator.give_up()
        return True

    def _check_end(self) -> None:
        """Raises when the trainer failed at what it had to do last."""
        code = self.process.exit_code
        if self._stopped_while_loading:
            return
        if self.stop.received is not None and code is not None and code < 0:
            # By us because it was too slow, or by a signal to all processes. The journal holds what it did not save.
            log.error("the trainer was killed (exit code %d) and saved no last checkpoint", code)
            return
        self.process.check_end()

    def _begin_stop(self, finished: bool, now: float) -> None:
        self._stopping_since = now
        reason = "the run is finished"
        if not finished:
            assert self.stop.received is not None
            reason = f"the learner got {self.stop.received.name}"
        log.info("stopping: %s", reason)
        self.prompts.stop()
        self.generators.stop(finished, reason)
        self.ranks.stop(finished, reason)
        if not self.ranks.present and self.process.running:
            # It would hear of it only when it has loaded its model, and has made nothing that could be lost.
            log.info("the trainer is still loading: it is stopped at once")
            self._stopped_while_loading = True
            self.process.kill()

    def _say_waiting(self, now: float) -> None:
        """Logs what is missing, by name, every SAY_WAITING_EVERY_S without a batch or after the last step."""
        if self._evaluating_since is None and self._say_missing(now):
            return
        version = self.ranks.waiting_version
        waits = version is not None or self._evaluating_since is not None
        if not waits or self._stopping_since is not None:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since >= SAY_WAITING_EVERY_S:
            self._waiting_since = now
            why = self.evaluator.describe()
            if version is not None:
                why = self.prompts.describe() or self.state.buffer.waiting_for(version, self.state.leases.running())
            log.info("%s; %s", why or f"version {version} waits", self.generators.describe())

    def _say_missing(self, now: float) -> bool:
        """Whether no generator can work yet; said by name SAY_MISSING_AFTER_S later, and again every now and then."""
        if now < self._look_who_is_missing_at or self._stopping_since is not None:
            return bool(self._missing)
        self._look_who_is_missing_at = now + LOOK_WHO_IS_MISSING_EVERY_S
        missing = self.generators.missing(now, trainer_loads=not self.versions.offered)
        if missing != self._missing or self._missing_said_at is None:
            self._missing, self._missing_said_at = missing, now - SAY_WAITING_EVERY_S + SAY_MISSING_AFTER_S
        if missing and now >= self._missing_said_at + SAY_WAITING_EVERY_S:
            self._missing_said_at = now
            log.info("%s", missing)
        return bool(missing)
