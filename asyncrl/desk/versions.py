"""How versions reach the generators: carries the sync planner's wishes out and its results on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from asyncrl.desk.evaluation import Evaluator
from asyncrl.desk.generators import Generators
from asyncrl.desk.proofs import Proofs
from asyncrl.desk.run_state import RunState
from asyncrl.link import messages
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.wire_types import RefusalCode
from asyncrl.metrics import Metrics
from asyncrl.weights.plan.planner import SyncPlanner
from asyncrl.weights.plan.records import Committed, RoundEnded, SyncFailed, ToGenerator, ToPublisher

log = logging.getLogger(__name__)


class Versions:
    """The way between the planner, the publisher in the trainer, and the generators.

    on_first_proof(now) is called once, when the first generator has proved a version and can sample.
    """

    def __init__(
        self,
        *,
        planner: SyncPlanner,
        socket: ServerSocket,
        generators: Generators,
        state: RunState,
        proofs: Proofs,
        evaluator: Evaluator,
        metrics: Metrics,
        on_first_proof: Callable[[float], None],
    ) -> None:
        self.planner = planner
        self._socket = socket
        self._generators = generators
        self._policy = state.policy
        self._leases = state.leases
        self._counters = state.counters
        self._proofs = proofs
        self._evaluator = evaluator
        self._metrics = metrics
        self._on_first_proof = on_first_proof
        self._proven_once = False
        self._publisher: bytes | None = None  # routing id

    def snapshot_ready(self, peer: bytes, message: messages.SnapshotReady, now: float) -> None:
        """The publisher offers a version."""
        self._publisher = peer
        self._policy.published(message.version)
        self.planner.snapshot_ready(message, now)

    def trainer_lost(self, now: float) -> None:
        """The trainer died, and the publisher with it: what it offered is gone."""
        self.planner.publisher_lost(now)
        self._publisher = None

    def next_deadline(self, now: float) -> float:
        """When `advance` must be called even if nothing happens; infinity when never."""
        deadline = self.planner.next_deadline(now)
        return float("inf") if deadline is None else deadline

    def held_versions(self) -> set[int | None]:
        """The versions that generators hold, proven."""
        return {receiver.held_version for receiver in self.planner.receivers.values()}

    def advance(self, now: float) -> None:
        """Lets the planner act, and does what it asks for."""
        held = {name: receiver.held_version for name, receiver in self.planner.receivers.items()}
        self.planner.set_busy(self._leases.eval_holders(held))
        self.planner.advance(now)
        for output in self.planner.take_outputs():
            match output:
                case ToPublisher(message):
                    self._to_publisher(message)
                case ToGenerator(name, message):
                    self._generators.send(name, message)
                case Committed():
                    self._proofs.add(output.name, output.incarnation, output.version)
                    self._evaluator.version_proven(output.version, now)
                    if not self._proven_once:
                        self._proven_once = True
                        self._on_first_proof(now)
                case SyncFailed():
                    self._failed(output, now)
                case RoundEnded():
                    if output.version >= 0:  # else it ended before there was anything to sync
                        self._metrics.log_sync(self._counters.sync_metrics(output))

    def _failed(self, failed: SyncFailed, now: float) -> None:
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
            self._generators.send(name, messages.Refusal(RefusalCode.TAINTED, reason, "", ""))
            self._generators.gone(name, "could not prove its weights", now)

    def _to_publisher(self, message: messages.Message) -> None:
        if self._publisher is not None:
            self._socket.send_message(self._publisher, message)
