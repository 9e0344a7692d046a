"""What the parts of the desk share: one object, made when the learner starts, from which each part takes what it needs.

Nothing here decides. `PolicyVersions` is the only place that knows which version the run is at; `RunState` names the
rest and puts together what a checkpoint must hold of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncrl.desk.counters import Counters
from asyncrl.desk.opening.saved_state import SavedDesk
from asyncrl.link.desk_session import DeskSessions
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.tickets import Tickets
from asyncrl.storage.journal import Journal


@dataclass(slots=True)
class PolicyVersions:
    """Which policy versions there are. Version v is the policy after v optimizer steps; 0 is the model as it was given.

    resumed_from    version of the checkpoint that the learner started from; 0 without one
    trained         the newest version that exists: of that checkpoint, or of the newest step that a rank reported
    decided         the newest version whose batch was decided in this life of the learner; None before the first
    replay_to       the version that was reached before the trainer (re)started: what leads up to it is trained again
                    from the journal, and not published on the way
    newest          the highest version that a token may bear: it was published, or is trained again
    proven_before   up to this one, versions were proven to an earlier learner of the run, and their tokens are taken
                    without a proof given to this one; -1 when there was no earlier learner

    What a generator holds and which version is on offer to it is the sync planner's (`weights.plan.planner`).
    """

    resumed_from: int = 0
    trained: int = 0
    decided: int | None = None
    replay_to: int = 0
    newest: int = 0
    proven_before: int = -1

    @classmethod
    def at_start(cls, checkpoint: int, reached: int, run_epoch: int) -> PolicyVersions:
        """Of a learner that starts at `checkpoint`, when the journal holds the steps up to version `reached`.

        `reached` counts as newest at once: generators are back within a second and bring what they have of it, while
        the trainer that trains up to it again takes longer to start.
        """
        proven_before = reached if run_epoch > 1 else -1
        return cls(resumed_from=checkpoint, trained=checkpoint, newest=reached, proven_before=proven_before)

    def trainer_started(self, version: int, num_steps: int) -> int:
        """A trainer starts at `version` and the journal holds `num_steps` steps after it. Returns `replay_to`."""
        reached = version + num_steps
        if self.decided == reached - 1 and self.trained < reached:
            reached -= 1  # decided in this life and not trained yet: it is new, whatever the journal says
        self.replay_to = max(self.trained, reached)
        self.newest = max(self.newest, self.replay_to)
        return self.replay_to

    def batch_decided(self, version: int) -> None:
        """The batch that makes `version` + 1 is in the journal, durable."""
        self.decided = version

    def batch_left_out(self, version: int) -> None:
        """The batch that should have made `version` + 1 is out of the journal: another one will."""
        self.decided = version - 1

    def step_made(self, version: int) -> None:
        """A rank reported the step that made `version`; steps that are trained again change nothing."""
        self.trained = max(self.trained, version)

    def published(self, version: int) -> None:
        """The publisher offers `version`: from now on a generator may sample from it."""
        self.newest = max(self.newest, version)


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything of the run that more than one part of the desk reads or changes."""

    run_epoch: int
    policy: PolicyVersions
    leases: LeaseBook
    buffer: ReplayBuffer
    journal: Journal
    sessions: DeskSessions
    counters: Counters
    evals_done: set[int]  # versions whose evaluation was asked for
    tickets: Tickets = field(default_factory=Tickets)

    def for_checkpoint(self) -> SavedDesk:
        """The state as it is now. Taken when a batch is decided: accepted groups and later news are in the journal."""
        return SavedDesk(
            leases=self.leases.state(),
            sessions=self.sessions.state(),
            totals=self.counters.state(),
            evals_done=frozenset(self.evals_done),
        )
