"""What a restarted learner does, read from the newest checkpoint's state and the journal after it.

    journal = Journal.open(run_dir / "journal")
    plan = replay_plan(checkpoint_version, saved.settled, journal.read_all())    # saved: LeaseBook.state()
    leases.restore(saved, plan.trained, [group.key for group in plan.buffered], plan.given_up, plan.filtered)
    for group in plan.buffered: buffer.add(group)
    for step in plan.steps: train [journal.read_group(place) for place in step.places]

The last line trains the same batches in the same order again, and no rollout is generated for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asyncrl.replay.lease_records import run_epoch_of_attempt
from asyncrl.storage.journal import Journal
from asyncrl.storage.journal_reader import JournalReader, Location
from asyncrl.storage.records import (
    BatchSkipped,
    GeneratorAdmitted,
    GroupFiltered,
    GroupsDropped,
    MessageSeen,
    PromptGivenUp,
    RunStarted,
    StepTaken,
    StoredGroup,
)
from asyncrl.types import Frontier


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """The batch that made `version` + 1, in its order. Bodies stay on disk until their step comes."""

    version: int
    groups: tuple[tuple[int, int], ...]  # (ordinal, attempt)
    places: tuple[Location, ...]


@dataclass(slots=True)
class ReplayPlan:
    """What to train again, what to buffer, what to remember.

    seen holds, for each (generator id, incarnation), the seqs of the results in the journal: those were taken, and are
    to be merged into what the sessions know. admitted holds the process that came first under each (generator id,
    incarnation). broken_at is the version of the first step whose batch cannot be read back
    (its record or one of its groups was damaged): training goes on from there with other batches, and the groups of
    later steps are buffered again. newest_step is the highest version of a step in the journal, -1 if there is none;
    run_epoch the highest that the journal knows of; num_records counts all but those of mere starts, generators' too.
    """

    steps: list[ReplayStep] = field(default_factory=list)
    buffered: list[StoredGroup] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)
    filtered: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    seen: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    admitted: dict[tuple[str, int], str] = field(default_factory=dict)
    broken_at: int | None = None
    newest_step: int = -1
    run_epoch: int = 0
    num_records: int = 0

    @property
    def trained(self) -> list[int]:
        """Ordinals of all steps to train again."""
        return [ordinal for step in self.steps for ordinal, _ in step.groups]


def replay_plan(checkpoint_version: int, settled: Frontier, journal: JournalReader) -> ReplayPlan:
    """Reads the journal into a plan.

    checkpoint_version  version of the checkpoint that is resumed; 0 without one
    settled             ordinals trained, given up, filtered or left out by then; empty without one

    Bodies are read for the buffer only: memory stays within its bound, however long the journal. Every accepted group
    ends in exactly one of: settled, a step, the buffer; one that was filtered or skipped stays so. A step taken anew
    replaces its earlier record and all later ones: those are of a future that a damaged journal made impossible to
    repeat. Raises JournalError when a group for the buffer cannot be read.
    """
    plan = ReplayPlan()
    groups: dict[tuple[int, int], Location] = {}
    dropped: set[tuple[int, int]] = set()
    steps: dict[int, StepTaken] = {}
    for location, record in journal:
        plan.num_records += not isinstance(record, RunStarted | GeneratorAdmitted)
        match record:
            case RunStarted():
                plan.run_epoch = max(plan.run_epoch, record.run_epoch)
            case GeneratorAdmitted():
                plan.admitted.setdefault((record.generator_id, record.incarnation), record.instance)
            case StoredGroup():
                _see(plan, record)
                plan.run_epoch = max(plan.run_epoch, run_epoch_of_attempt(record.attempt))
                groups[record.ordinal, record.attempt] = location
            case StepTaken():
                _forget_from(record.version, steps)
                steps[record.version] = record
            case BatchSkipped():
                _forget_from(record.version, steps)
                plan.filtered.extend(ordinal for ordinal, _ in record.groups)
            case MessageSeen():
                _see(plan, record)
            case GroupsDropped():
                dropped.update(record.groups)
            case PromptGivenUp():
                (plan.left_out if record.reason else plan.given_up).append(record.ordinal)
            case GroupFiltered():
                _see(plan, record)
                plan.filtered.append(record.ordinal)
    plan.newest_step = max(steps, default=-1)
    _plan_steps(plan, checkpoint_version, steps, groups.get)
    trained_before = (step.groups for version, step in steps.items() if version < checkpoint_version)
    done = {*plan.trained, *plan.given_up, *plan.filtered, *plan.left_out}
    done.update(ordinal for step in trained_before for ordinal, _ in step)
    left = {
        group[0]: location
        for group, location in groups.items()
        if group[0] not in done and group[0] not in settled and group not in dropped
    }
    plan.buffered = [journal.read_group(left[ordinal]) for ordinal in sorted(left)]
    return plan


def steps_to_repeat(version: int, journal: Journal) -> list[ReplayStep]:
    """The steps that a trainer repeats which begins at `version`, from what the running journal has in memory.

    Raises JournalError when the journal has to be read for it, and cannot be.
    """
    index = journal.index
    if version < index.begins_at:  # a checkpoint older than those that were kept: put back by hand
        return replay_plan(version, Frontier(), journal.read_all()).steps
    plan = ReplayPlan()
    _plan_steps(plan, version, index.steps, index.place_of)
    return plan.steps


def _forget_from(version: int, steps: dict[int, StepTaken]) -> None:
    for later in range(version, max(steps, default=-1) + 1):
        steps.pop(later, None)


def _see(plan: ReplayPlan, record: StoredGroup | MessageSeen | GroupFiltered) -> None:
    plan.seen.setdefault((record.generator_id, record.incarnation), set()).add(record.seq)


def _plan_steps(
    plan: ReplayPlan,
    checkpoint_version: int,
    steps: Mapping[int, StepTaken],
    place_of: Callable[[tuple[int, int]], Location | None],
) -> None:
    version = checkpoint_version
    while version in steps:
        batch = steps[version].groups
        places = tuple(place for group in batch if (place := place_of(group)) is not None)
        if len(places) < len(batch):
            break
        plan.steps.append(ReplayStep(version, batch, places))
        version += 1
    if version <= max(steps, default=-1):
        plan.broken_at = version
