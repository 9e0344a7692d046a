"""Opens a run folder: which run is in it, whether this start may go on with that, and where it goes on.

Nothing is written before all that is checked. A run that cannot be gone on with is refused with the remedy; only
`checkpoint.resume=fork` and `fresh` set it aside (`setting_aside`) and begin a new one in its folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config import Config
from asyncrl.desk.opening.changes import changes_since
from asyncrl.desk.opening.restoring import SavedRun, checkpoint_folder, read_saved_run
from asyncrl.desk.opening.run_record import RunRecord, read_record
from asyncrl.desk.opening.setting_aside import FORKED_FROM, complete_fork, forget_fork, set_aside
from asyncrl.errors import AsyncRLError, CheckpointError, ConfigError, JournalError
from asyncrl.storage.checkpoint_files import is_empty, newest_run_epoch
from asyncrl.storage.disk import make_folder
from asyncrl.storage.journal import SEGMENT_BYTES, Journal
from asyncrl.storage.records import RunStarted
from asyncrl.storage.room import GIB
from asyncrl.storage.run_epoch import next_run_epoch
from asyncrl.tasks.fingerprint import run_settings

log = logging.getLogger(__name__)

MIN_SEGMENT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run folder that this learner holds: `journal` is locked and not written to yet. See `begin`.

    record is what the folder is to say from now on.
    """

    journal: Journal
    saved: SavedRun
    record: RunRecord

    def is_finished(self, steps: int) -> bool:
        """Whether there is nothing left to do for a run of so many steps."""
        return self.record.finished == self.saved.reached >= steps

    def begin(self, run_dir: Path, now: float) -> int:
        """Takes the run over: repairs the journal's end, and returns the run epoch, which is durable in two places.

        Raises JournalError.
        """
        self.journal.begin_writing()
        forget_fork(run_dir)
        known = max(self.saved.plan.run_epoch, newest_run_epoch(run_dir / "checkpoints"))
        run_epoch = next_run_epoch(run_dir, known)
        self.journal.append(RunStarted(run_epoch), now)
        self.journal.make_durable()
        return run_epoch


def open_run(config: Config) -> OpenedRun:
    """Opens the run folder; the caller closes `journal`.

    Raises ConfigError when the folder holds a run that this configuration may not go on with, CheckpointError or
    JournalError when what is there is damaged so that nobody can; each names the remedy.
    """
    run_dir = Path(config.run.dir)
    try:
        make_folder(run_dir)
        complete_fork(run_dir)
    except OSError as error:
        raise JournalError(f"cannot use run.dir={run_dir}: {error}; make it writable") from error
    try:
        return _open(config)
    except (ConfigError, CheckpointError, JournalError) as problem:
        if config.checkpoint.resume not in ("fork", "fresh") or _is_held(problem):
            raise
        forks = config.checkpoint.resume == "fork"
        kept = set_aside(run_dir, fork=forks)
        begins = "from the weights of its newest checkpoint" if forks else "from model.path"
        log.warning(
            "%s\ncheckpoint.resume=%s: what was in %s is kept in %s, a new run begins %s; start its generators again",
            problem,
            config.checkpoint.resume,
            run_dir,
            kept,
            begins,
        )
    return _open(config)


def _is_held(problem: AsyncRLError) -> bool:
    """Whether another learner runs on the folder: then nothing in it may be moved."""
    return "is in use by the learner" in str(problem)


def _open(config: Config) -> OpenedRun:
    # Segments are deleted whole, so they must be small beside the limit.
    segment_bytes = max(MIN_SEGMENT_BYTES, min(SEGMENT_BYTES, int(config.run.journal_max_gib * GIB) // 16))
    journal = Journal.open(Path(config.run.dir) / "journal", segment_bytes, untouched=True)
    try:
        return _examine(config, journal)
    except BaseException:
        journal.close()
        raise


def _examine(config: Config, journal: Journal) -> OpenedRun:
    run_dir, checkpoints = Path(config.run.dir), checkpoint_folder(config)
    record = read_record(run_dir)
    saved = read_saved_run(config, journal)
    settings = tuple(run_settings(config))
    used = saved.plan.num_records > 0 or not is_empty(checkpoints)
    if used and config.checkpoint.resume == "never":
        raise ConfigError(
            f"run.dir={run_dir} holds an earlier run and checkpoint.resume=never; "
            "use checkpoint.resume=auto to go on with it, or another run.dir (or run.name)"
        )
    forked_from = record.forked_from if record is not None else ""
    if saved.manifest is not None:
        forked_from = str(saved.manifest.extra.get(FORKED_FROM, forked_from))
    elif forked_from:
        raise CheckpointError(_no_beginning(run_dir, forked_from))
    if not used or record is None:
        if used and not forked_from:
            log.warning("%s says nothing of how its run was started: it is not compared with this start", run_dir)
        return OpenedRun(journal, saved, RunRecord(settings, forked_from))
    changes = changes_since(record, settings, saved.reached)
    if changes.refused:
        raise ConfigError(
            f"run.dir={run_dir} holds a run that was started with other values; with these it would be another run:\n  "
            + "\n  ".join(changes.refused)
            + "\nPut them back to go on with it, or give a new run.name (or run.dir). checkpoint.resume=fork begins a "
            "new run here from the newest checkpoint's weights; what is here is then kept in the folder `earlier`"
        )
    if changes.accepted:
        log.info("the run goes on with other values than before:\n  %s", "\n  ".join(changes.accepted))
    return OpenedRun(journal, saved, RunRecord(settings, forked_from, record.finished))


def _no_beginning(run_dir: Path, forked_from: str) -> str:
    return (
        f"the run in {run_dir} began with the weights of {forked_from}, and no checkpoint of it is left: restore "
        "the folder `checkpoints`, or begin anew from model.path with checkpoint.resume=fresh"
    )
