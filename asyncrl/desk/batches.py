"""What the trainer's ranks get: each batch is decided once, made durable, and dealt out in shards.

A batch is decided when all ranks ask for it and the buffer may be taken from. The decision is a StepTaken record in
the journal, on disk before any rank sees a group. A trainer that comes back from a checkpoint is dealt the steps after
it again from the journal, the same groups in the same order, until it has caught up; those are not published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asyncrl.desk.run_state import PolicyVersions
from asyncrl.link.trainer_messages import Batch
from asyncrl.replay.recovery import ReplayStep
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StoredGroup


@dataclass(frozen=True, slots=True)
class DecidedStep:
    """The groups that make `version` + 1, in their order, and the encoded state of the desk after they were taken."""

    version: int
    groups: list[StoredGroup]
    desk_state: bytes


@dataclass(frozen=True, slots=True)
class DealtBatch:
    """What the ranks have in hand to make `version` + 1: (ordinal, attempt) of each group, and who made it."""

    version: int
    groups: tuple[tuple[int, int], ...]
    generator_ids: tuple[str, ...] = ()


class BatchDealer:
    """Takes the ranks' requests for batches and answers them with decided steps.

    checkpoint_every is in versions, 0 for none on the way; last_step is the version at which the run ends. A checkpoint
    is saved out of turn when the journal has grown by checkpoint_bytes since the last: only checkpoints let it shrink.
    """

    def __init__(
        self,
        journal: Journal,
        policy: PolicyVersions,
        *,
        checkpoint_every: int,
        last_step: int,
        checkpoint_bytes: int = 2**62,
    ) -> None:
        self._journal = journal
        self._policy = policy
        self._checkpoint_every = checkpoint_every
        self._last_step = last_step
        self._checkpoint_bytes = checkpoint_bytes
        self._grown_until = checkpoint_bytes - journal.num_bytes  # appended bytes at which one is saved out of turn
        self._again: dict[int, ReplayStep] = {}
        self._decided: DecidedStep | None = None
        self._requests: dict[int, int] = {}  # rank -> version
        self.world_size = 1
        self.in_hand: DealtBatch | None = None  # dealt out, and not reported as trained

    def request(self, rank: int, version: int) -> None:
        """A rank wants the batch of `version`; asking again replaces the request."""
        self._requests[rank] = version

    @property
    def wanted_version(self) -> int | None:
        """The version whose batch all ranks wait for; None while one of them is still at work."""
        versions = set(self._requests.values())
        if len(self._requests) < self.world_size or len(versions) != 1:
            return None
        return next(iter(versions))

    @property
    def at_end(self) -> bool:
        """Whether all ranks made the last step and ask for more. A rank that died, or trains again, does not ask."""
        version = self.wanted_version
        return version is not None and version >= self._last_step

    def forget_ranks(self) -> None:
        """The trainer died: nobody waits any more."""
        self._requests.clear()
        self.in_hand = None

    def step_made(self, version: int) -> None:
        """The ranks made `version`."""
        if self.in_hand is not None and self.in_hand.version < version:
            self.in_hand = None

    def has_steps_after(self, version: int) -> bool:
        """Whether the journal holds steps that follow the one of `version`."""
        return max(self._again, default=-1) > version

    def leave_out(self, version: int) -> None:
        """The batch of this version is not to be trained: another one has to be decided."""
        self._again.pop(version, None)
        if self._decided is not None and self._decided.version == version:
            self._decided = None

    def needs_decision(self) -> int | None:
        """The version all ranks wait for if its batch is still to be chosen."""
        version = self.wanted_version
        if version is None or version in self._again or version >= self._last_step:
            return None
        if self._decided is not None and self._decided.version == version:
            return None
        return version

    def train_again(self, steps: Iterable[ReplayStep]) -> None:
        """The trainer (re)started: nobody waits any more, and these steps come first."""
        self._requests.clear()
        self._again = {step.version: step for step in steps}

    def decide(self, step: DecidedStep) -> None:
        """Fixes a batch. The caller has made its StepTaken record durable."""
        self._decided = step

    def deal(self, send: Callable[[int, Batch], None]) -> bool:
        """Sends every rank its shard if the batch they all wait for is decided; says whether it did.

        Raises JournalError when a step that is trained again cannot be read back.
        """
        version = self.wanted_version
        if version is None:
            return False
        step = self._decided
        checkpoint = False
        if step is not None and step.version == version:
            # Checked before the journal's steps: a live decision carries the desk's state, which a checkpoint needs.
            checkpoint = self._saves(version + 1)
        elif version in self._again:
            groups = [self._journal.read_group(place) for place in self._again[version].places]
            step = DecidedStep(version, groups, desk_state=b"")
        else:
            return False
        publish = version + 1 >= self._policy.replay_to
        for rank, bodies in enumerate(_shards(step.groups, self.world_size)):
            send(rank, Batch(version, rank, bodies, step.desk_state, checkpoint, publish))
        self.in_hand = DealtBatch(
            version,
            tuple((group.ordinal, group.attempt) for group in step.groups),
            tuple(group.generator_id for group in step.groups),
        )
        self._requests.clear()
        return True

    def _saves(self, version: int) -> bool:
        """Whether this version gets a checkpoint; the last one is saved when the run ends."""
        appended = self._journal.appended_bytes
        in_turn = self._checkpoint_every > 0 and version % self._checkpoint_every == 0
        if version >= self._last_step or not (in_turn or appended >= self._grown_until):
            return False
        self._grown_until = appended + self._checkpoint_bytes
        return True


def _shards(groups: list[StoredGroup], world_size: int) -> list[list[bytes]]:
    """Groups over ranks, longest first to the rank with the fewest tokens; each shard in ordinal order.

    Ordinal order, so that the order of arrival cannot change a sum of floats.
    """
    shards: list[list[StoredGroup]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for group in sorted(groups, key=lambda group: (-sum(group.num_tokens), group.ordinal)):
        rank = loads.index(min(loads))
        shards[rank].append(group)
        loads[rank] += sum(group.num_tokens)
    return [[group.body for group in sorted(shard, key=lambda group: group.ordinal)] for shard in shards]
