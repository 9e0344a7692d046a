"""How versions reach the generators: carries the sync planner's wishes out and its results on.

`Versions` is the only door to the planner (`weights.plan.planner`): the other parts of the desk tell it what generators
and publisher report, and ask it what generators hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.proofs import Proofs
from asyncrl.desk.run_state import RunState
from asyncrl.link import messages, trainer_messages
from asyncrl.link.schema.message_base import Message
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.weight_records import Placement
from asyncrl.link.wire_types import RefusalCode
from asyncrl.metrics import Metrics
from asyncrl.weights.plan.planner import SyncPlanner
from asyncrl.weights.plan.records import Committed, RoundEnded, SyncFailed, ToGenerator, ToPublisher, Unreachable

log = logging.getLogger(__name__)

LOOK_AT_EVALUATION_S = 0.05  # generators that an evaluation needs may not swap: so often it is seen that it is over


class SyncedGenerators(Protocol):
    """What `Versions` needs of the generators: `desk.generators.Generators`."""

    def send(self, name: str, message: Message) -> None:
        """Sends a message to a generator by its id."""

    def gone(self, name: str, why: str, now: float) -> None:
        """Ends a generator's session."""


class Versions:
    """The way between the planner, the publisher in the trainer, and the generators.

    on_first_proof(now) is called once, when the first generator has proved a version and can sample.
    """

    def __init__(
        self,
        *,
        planner: SyncPlanner,
        socket: ServerSocket,
        state: RunState,
        proofs: Proofs,
        evaluator: Evaluator,
        metrics: Metrics,
        on_first_proof: Callable[[float], None],
    ) -> None:
        self._planner = planner
        self._socket = socket
        self._policy = state.policy
        self._leases = state.leases
        self._counters = state.counters
        self._proofs = proofs
        self._evaluator = evaluator
        self._metrics = metrics
        self._on_first_proof = on_first_proof
        self._proven_once = False
        self._publisher: bytes | None = None  # routing id
        self._changed = True  # since the last `advance`
        self._due_at = 0.0  # when `advance` has something to do though nothing changed

    def snapshot_ready(self, peer: bytes, message: trainer_messages.SnapshotReady, now: float) -> None:
        """The publisher offers a version."""
        self._changed = True
        self._publisher = peer
        self._policy.published(message.version)
        self._planner.snapshot_ready(message, now)

    def trainer_lost(self, now: float) -> None:
        """The trainer died, and the publisher with it: what it offered is gone."""
        self._changed = True
        self._planner.publisher_lost(now)
        self._publisher = None

    def channel_ready(self, message: trainer_messages.ChannelReady, now: float) -> None:
        """The publisher opened a channel, or could not."""
        self._changed = True
        self._planner.channel_ready(message, now)

    def broadcast_done(self, message: trainer_messages.BroadcastDone, now: float) -> None:
        """The publisher sent a version over a channel, or failed."""
        self._changed = True
        self._planner.broadcast_done(message, now)

    def trainer_joined(self, placement: Placement) -> None:
        """A trainer said hello, and where it will send weights from."""
        self._changed = True
        self._planner.trainer_joined(placement)

    def joined(
        self, name: str, incarnation: int, num_workers: int, now: float, placement: Placement | None = None
    ) -> None:
        """The engine of a generator is up, with this many workers: it can take weights."""
        self._changed |= self._planner.joined(name, incarnation, num_workers, now, placement)

    def left(self, name: str, why: str, now: float) -> None:
        """A generator is gone, and whatever it held with it."""
        self._changed = True
        self._planner.left(name, now, why)

    def send_again(self, name: str) -> None:
        """Whatever a generator holds is doubted: it counts as holding nothing, and gets the newest version anew."""
        self._changed = True
        self._planner.send_again(name)

    def holds(self, name: str, version: int | None, now: float) -> None:
        """The version that a generator says in its beat it holds, proven."""
        self._changed |= self._planner.holds(name, version, now)

    def reply(self, name: str, message: messages.SyncReply, now: float) -> None:
        """A generator answers a phase of a sync."""
        self._changed = True
        self._planner.reply(name, message, now)

    @property
    def offered(self) -> bool:
        """Whether a publisher has a version on offer."""
        return self._planner.snapshot is not None

    def held_version(self, name: str) -> int | None:
        """The version that a generator holds, proven; None when it holds none or is not known."""
        return self._planner.held_version(name)

    def next_deadline(self, now: float) -> float:
        """When `advance` has something to do even if nothing happens; infinity when never."""
        return now if self._changed else self._due_at

    def __contains__(self, version: object) -> bool:
        """Whether a generator holds this version, proven."""
        return any(receiver.held_version == version for receiver in self._planner.receivers.values())

    def advance(self, now: float, generators: SyncedGenerators) -> None:
        """Lets the planner act, and does what it asks for; nothing where nothing changed and no deadline has come."""
        if not self._changed and now < self._due_at:
            return
        self._changed = False
        held = {name: receiver.held_version for name, receiver in self._planner.receivers.items()}
        busy = self._leases.eval_holders(held)
        self._planner.set_busy(busy)
        self._planner.advance(now)
        self._carry_out(now, generators)
        deadline = self._planner.next_deadline(now)
        self._due_at = float("inf") if deadline is None else deadline
        if busy or self._leases.eval_is_running:
            self._due_at = min(self._due_at, now + LOOK_AT_EVALUATION_S)

    def _carry_out(self, now: float, generators: SyncedGenerators) -> None:
        for output in self._planner.take_outputs():
            match output:
                case ToPublisher(message):
                    self._to_publisher(message)
                case ToGenerator(name, message):
                    generators.send(name, message)
                case Committed():
                    self._proofs.add(output.name, output.incarnation, output.version)
                    self._evaluator.version_proven(output.version, now)
                    if not self._proven_once:
                        self._proven_once = True
                        self._on_first_proof(now)
                case SyncFailed():
                    self._failed(output, now, generators)
                case Unreachable(name, reason):
                    log.warning("generator %s is refused: %s", name, reason)
                    generators.send(name, messages.Refusal(RefusalCode.CONFIG, reason, "", ""))
                    generators.gone(name, "cannot be reached by weights", now)
                case RoundEnded():
                    if output.version >= 0:  # else it ended before there was anything to sync
                        self._metrics.log_sync(self._counters.sync_metrics(output))

    def _failed(self, failed: SyncFailed, now: float, generators: SyncedGenerators) -> None:
        name = failed.name
        log.warning(
            "sync of %s to version %d failed (%s), %s; %s",
            name,
            failed.version,
            failed.phase,
            failed.reason,
            failed.remedy,
        )
        if failed.fatal:
            reason = f"its weights could not be proven: {failed.reason}"
            generators.send(name, messages.Refusal(RefusalCode.TAINTED, reason, "", ""))
            generators.gone(name, "could not prove its weights", now)

    def _to_publisher(self, message: Message) -> None:
        if self._publisher is not None:
            self._socket.send_message(self._publisher, message)
