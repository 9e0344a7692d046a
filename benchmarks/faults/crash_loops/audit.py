"""The checker of crash loops: the ledgers of the stubs against the journal and against what was trained.

It reads files alone, after the run, and knows nothing of what the desk held in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import (
    GroupFiltered,
    GroupsDropped,
    MessageSeen,
    PromptGivenUp,
    Record,
    StepTaken,
    StoredGroup,
)
from asyncrl.types import LeaseKind
from benchmarks.faults.crash_loops.ledger import GeneratorAccount, MadeStep, read_generator, read_trainer, sha

Who = tuple[str, int]  # generator id, incarnation
MAX_COMPLAINTS = 20


@dataclass(slots=True)
class Verdict:
    """What the ledgers say. `complaints` is empty when every promise was kept."""

    acked_rollouts: int = 0
    acked_groups: int = 0
    needless_groups: int = 0  # acknowledged, and their prompt had its group already
    lost: int = 0  # acknowledged groups that are in no record
    trained_twice: int = 0  # ordinals
    versions: int = 0
    steps_repeated: int = 0  # steps made again after a crash, each of the same groups
    given_up: int = 0
    dropped: int = 0
    complaints: list[str] = field(default_factory=list)

    def complain(self, text: str) -> None:
        """Notes a broken promise."""
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(text)


def archive_segments(journal: Path, archive: Path) -> None:
    """Keeps every segment under a second name: the learner deletes those that its checkpoints make needless."""
    archive.mkdir(exist_ok=True)
    for path in journal.glob("*.segment"):
        kept = archive / path.name
        if not kept.exists():
            os.link(path, kept)


def records_of(archive: Path) -> Iterator[Record]:
    """All records that were ever durable, in their order."""
    numbers = sorted(int(path.stem) for path in archive.glob("*.segment"))
    return (entry.record for entry in JournalReader(archive, numbers))


def generator_accounts(ledgers: Path) -> dict[Who, GeneratorAccount]:
    """What every life of every generator noted."""
    return {
        (path.stem, incarnation): account
        for path in sorted(ledgers.glob("*.generator"))
        for incarnation, account in read_generator(path).items()
    }


def audit(ledgers: Path, archive: Path, groups_per_step: int, last_version: int | None = None) -> Verdict:
    """Judges a run by its ledgers. last_version: that of a run that came to its end."""
    verdict = Verdict()
    journal = _Journal(records_of(archive), verdict)
    steps = _made_steps(read_trainer(ledgers / "steps.trainer"), journal, verdict)
    _check_training(steps, journal, groups_per_step, last_version, verdict)
    for who, account in generator_accounts(ledgers).items():
        _check_acknowledged(who, account, journal, verdict)
    return verdict


class _Journal:
    """The records by what they answer."""

    def __init__(self, records: Iterable[Record], verdict: Verdict) -> None:
        self.stored: dict[tuple[str, int, int], tuple[int, int, str]] = {}  # message -> ordinal, attempt, sha
        self.bodies: dict[tuple[int, int], str] = {}  # (ordinal, attempt) -> sha
        self.seen: set[tuple[str, int, int]] = set()
        self.steps: dict[int, tuple[tuple[int, int], ...]] = {}  # version -> its groups
        self.dropped: set[tuple[int, int]] = set()
        self.given_up: set[int] = set()
        for record in records:
            self._take(record, verdict)
        waiting = Counter(ordinal for ordinal, attempt in self.bodies if (ordinal, attempt) not in self.dropped)
        for ordinal, count in waiting.items():
            if count > 1:
                verdict.complain(f"ordinal {ordinal} was accepted {count} times")
        verdict.given_up, verdict.dropped = len(self.given_up), len(self.dropped)

    def _take(self, record: Record, verdict: Verdict) -> None:
        match record:
            case StoredGroup():
                message = record.generator_id, record.incarnation, record.seq
                if message in self.stored:
                    verdict.complain(f"{message} was accepted twice")
                digest = sha(record.body)
                self.stored[message] = record.ordinal, record.attempt, digest
                self.bodies[record.ordinal, record.attempt] = digest
            case MessageSeen() | GroupFiltered():
                self.seen.add((record.generator_id, record.incarnation, record.seq))
            case StepTaken():
                known = self.steps.setdefault(record.version, record.groups)
                if known != record.groups:
                    verdict.complain(f"the batch of version {record.version} was decided twice, differently")
            case GroupsDropped():
                self.dropped.update(record.groups)
            case PromptGivenUp():
                self.given_up.add(record.ordinal)


def _made_steps(made: Iterable[MadeStep], journal: _Journal, verdict: Verdict) -> dict[int, MadeStep]:
    """The step that made each version; a repeated one must be the same."""
    steps: dict[int, MadeStep] = {}
    for step in made:
        known = steps.setdefault(step.version, step)
        verdict.steps_repeated += known is not step
        if known != step:
            verdict.complain(f"version {step.version} was made of other groups the second time")
    for step in steps.values():
        decided = journal.steps.get(step.version - 1)
        if decided is None or sorted(decided) != sorted((ordinal, attempt) for ordinal, attempt, _ in step.groups):
            verdict.complain(f"version {step.version} was made of groups that no record names")
        for ordinal, attempt, digest in step.groups:
            if journal.bodies.get((ordinal, attempt)) != digest:
                verdict.complain(f"ordinal {ordinal}.{attempt} was trained with other bytes than were accepted")
    return steps


def _check_training(
    steps: dict[int, MadeStep], journal: _Journal, groups_per_step: int, last_version: int | None, verdict: Verdict
) -> None:
    verdict.versions = len(steps)
    newest = max(steps, default=0)
    if sorted(steps) != list(range(1, newest + 1)):
        verdict.complain(f"versions are missing: {len(steps)} of {newest}")
    trained = Counter(ordinal for step in steps.values() for ordinal, _, _ in step.groups)
    twice = [ordinal for ordinal, count in trained.items() if count > 1]
    verdict.trained_twice = len(twice)
    if twice:
        verdict.complain(f"trained twice: ordinals {twice[:5]}")
    if any(len(step.groups) != groups_per_step for step in steps.values()):
        verdict.complain("a batch has another size")
    if last_version is None:
        return
    if newest != last_version:
        verdict.complain(f"the run ended at version {newest} of {last_version}")
    skipped = set(range(max(trained, default=-1) + 1)) - trained.keys() - journal.given_up
    if skipped:
        verdict.complain(f"neither trained nor given up: ordinals {sorted(skipped)[:5]}")


def _check_acknowledged(who: Who, account: GeneratorAccount, journal: _Journal, verdict: Verdict) -> None:
    for seq in sorted(account.acked & account.sent.keys()):
        group = account.sent[seq]
        if group.kind != LeaseKind.TRAIN or seq in account.refused:
            continue
        verdict.acked_groups += 1
        verdict.acked_rollouts += group.num_rollouts
        stored = journal.stored.get((*who, seq))
        if stored == (group.ordinal, group.attempt, group.sha):
            continue
        if stored is None and (*who, seq) in journal.seen:
            verdict.needless_groups += 1
            continue
        verdict.lost += 1
        verdict.complain(f"{who} seq {seq}, ordinal {group.ordinal}.{group.attempt}: acknowledged, stored is {stored}")
