"""Where a learner that starts goes on: what the newest checkpoint and the journal after it hold, as a `RunState`.

Without either, that is a run from its beginning. Nothing is lost that was acknowledged: results of before the crash are
in the buffer again or trained again, prompts that were under way are leased again, and the sessions know which results
they have seen, so that a generator that sends one again gets its acknowledgement and nothing more.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config import Config
from asyncrl.desk.counters import Counters
from asyncrl.desk.opening.saved_state import SavedDesk
from asyncrl.desk.run_state import PolicyVersions, RunState
from asyncrl.errors import CheckpointError, JournalError
from asyncrl.host.fingerprints import model_folder_fingerprint, tokenizer_fingerprint
from asyncrl.host.model_folder import find_model
from asyncrl.link.desk_session import DeskSessions, Expected, SavedSession
from asyncrl.replay.buffer import ReplayBuffer
from asyncrl.replay.lease_book import LeaseBook
from asyncrl.replay.lease_records import SavedLeases
from asyncrl.replay.pacing import Pacing
from asyncrl.replay.recovery import ReplayPlan, replay_plan
from asyncrl.replay.tickets import Tickets
from asyncrl.storage.checkpoint_files import Manifest, find_latest, is_empty, load_desk_state, unreadable
from asyncrl.storage.journal import Journal
from asyncrl.tasks.fingerprint import shared_settings
from asyncrl.types import Frontier

log = logging.getLogger(__name__)

# A checkpoint's files up to this size are read before the desk serves. Larger ones are read by the trainer, which takes
# an older checkpoint, and the journal since that, when one of them turns out to be damaged.
READ_AT_START_BYTES = 64 * 2**20


def checkpoint_folder(config: Config) -> Path:
    """Where the checkpoints of a run are."""
    return Path(config.run.dir) / "checkpoints"


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What is on disk of a run: the newest checkpoint, the desk's state in it (None without one), and the journal."""

    manifest: Manifest | None
    desk: SavedDesk | None
    plan: ReplayPlan

    @property
    def version(self) -> int:
        """The version of the checkpoint; 0 without one."""
        return self.manifest.version if self.manifest is not None else 0

    @property
    def reached(self) -> int:
        """The version that the run had reached: of the checkpoint and the steps that are trained again."""
        return self.version + len(self.plan.steps)


def read_saved_run(config: Config, journal: Journal) -> SavedRun:
    """Reads what is on disk, and changes nothing.

    Raises CheckpointError or JournalError when that cannot be read, or when a part of it is not there.
    """
    root = checkpoint_folder(config)
    everything = config.checkpoint.resume in ("fork", "fresh")
    manifest = find_latest(root, max_bytes=None if everything else READ_AT_START_BYTES)
    if manifest is None and not is_empty(root):
        raise CheckpointError(unreadable(root))
    desk = SavedDesk.decode(load_desk_state(manifest)) if manifest is not None else None
    version = manifest.version if manifest is not None else 0
    plan = replay_plan(version, desk.leases.settled if desk is not None else Frontier(), journal.found())
    if manifest is None and journal.begins_later:
        raise CheckpointError(
            f"the journal in {config.run.dir} goes on from a checkpoint, and there is none in {root}: restore that "
            "folder, or begin the run anew from model.path with checkpoint.resume=fresh; what is here is then kept in "
            "the folder `earlier`"
        )
    if plan.newest_step < version - 1 and not journal.damage:
        raise JournalError(
            f"the journal in {config.run.dir} ends at version {plan.newest_step + 1}, before the checkpoint of version "
            f"{version}: a part of it is gone, and with it acknowledged results. Restore the folder `journal`; or "
            "begin a new run from the weights of the checkpoint with checkpoint.resume=fork, or from model.path with "
            "checkpoint.resume=fresh; what is here is then kept in the folder `earlier`"
        )
    return SavedRun(manifest, desk, plan)


def restore_run(config: Config, run_epoch: int, journal: Journal, found: SavedRun | None = None) -> RunState:
    """The run as it stands after what is on disk: `found`, or what `read_saved_run` finds, which may raise."""
    found = found or read_saved_run(config, journal)
    saved, plan = found.desk, found.plan
    version = found.version
    counters = Counters()
    if saved is not None:
        counters.restore(saved.totals)
    _say_restored(version, plan, journal)
    pacing = Pacing(config.learner.groups_per_step, config.staleness.max_age, config.run.steps)
    return RunState(
        run_epoch=run_epoch,
        policy=PolicyVersions.at_start(version, found.reached, run_epoch),
        leases=_restore_leases(config, pacing, run_epoch, saved.leases if saved is not None else None, plan),
        buffer=_restore_buffer(config, pacing, plan),
        journal=journal,
        sessions=_restore_sessions(config, run_epoch, saved.sessions if saved is not None else {}, plan),
        counters=counters,
        evals_done=set(saved.evals_done) if saved is not None else set(),
        tickets=Tickets.of_run(config.run.dir, config.run.name),
    )


def make_sessions(config: Config, run_epoch: int) -> DeskSessions:
    """The desk's end of all sessions, which expects generators of the same model, tokenizer and task."""
    return DeskSessions(
        run_epoch=run_epoch,
        run_name=config.run.name,
        expected=Expected(
            model_folder_fingerprint(config.model.path),
            tokenizer_fingerprint(find_model(config.model.path).folder),
            config.task.path,
            tuple(shared_settings(config)),
        ),
        credit_bytes=config.transport.credit_bytes,
        max_frame_bytes=config.transport.max_frame_bytes,
    )


def _restore_leases(
    config: Config, pacing: Pacing, run_epoch: int, saved: SavedLeases | None, plan: ReplayPlan
) -> LeaseBook:
    leases = LeaseBook(pacing, config.generator.lease_timeout_s, run_epoch)
    leases.restore(
        saved,
        trained=plan.trained,
        accepted=[group.key for group in plan.buffered],
        given_up=plan.given_up,
        filtered=plan.filtered,
        left_out=plan.left_out,
    )
    return leases


def _restore_buffer(config: Config, pacing: Pacing, plan: ReplayPlan) -> ReplayBuffer:
    buffer = ReplayBuffer(pacing, config.staleness.over_age)
    for group in plan.buffered:
        buffer.add(group)
    return buffer


def _restore_sessions(config: Config, run_epoch: int, saved: dict[str, SavedSession], plan: ReplayPlan) -> DeskSessions:
    sessions = make_sessions(config, run_epoch)
    now = time.monotonic()
    sessions.restore(saved, now=now)
    for (generator_id, incarnation), instance in plan.admitted.items():
        sessions.replay_admission(generator_id, incarnation, instance, now=now)
    for (generator_id, incarnation), seqs in plan.seen.items():
        for seq in sorted(seqs):
            sessions.replay(generator_id, incarnation, seq, now=now)
    return sessions


def _say_restored(version: int, plan: ReplayPlan, journal: Journal) -> None:
    if journal.torn_bytes:
        log.info(
            "%d bytes of an unfinished write at the end of the journal are kept in a file .cut; none was acknowledged",
            journal.torn_bytes,
        )
    for place, num_bytes in journal.damage:
        log.error("journal is damaged at %s: %d bytes are skipped", place, num_bytes)
    for place, num_bytes in journal.missing:
        what = f"{num_bytes} bytes" if num_bytes else "a whole segment"
        log.error("journal: %s from %s on should be there and is not: acknowledged results are lost", what, place)
    if plan.broken_at is not None:
        log.error("the batch of version %d cannot be read back: training goes on with other batches", plan.broken_at)
    if version or plan.steps or plan.buffered:
        log.info(
            "resuming: checkpoint at version %d, %d steps to train again, %d groups in the buffer",
            version,
            len(plan.steps),
            len(plan.buffered),
        )
