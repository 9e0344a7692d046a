"""The run epoch: how often a learner has started on a run folder, in the file `run_epoch` of it.

Whoever holds the higher one has replaced the other, so it must never fall back. The file is compared with what the
journal and the checkpoints know: `next_run_epoch` gets the highest epoch that they name.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from asyncrl.errors import JournalError
from asyncrl.storage.disk import fsync_folder, make_folder

log = logging.getLogger(__name__)

MAX_EPOCH = 2**31  # more starts than any run has: a larger number was not written by a learner


def next_run_epoch(run_dir: Path | str, newest_known: int = 0) -> int:
    """The run epoch of this learner start: 1, 2, 3, ...; durable before it is returned.

    newest_known is the highest epoch that journal and checkpoints name: a file that says less, or nothing, is of an
    earlier time or damaged; that is said, and the count goes on from newest_known. Call it with the journal open: its
    lock keeps a second learner out. Raises JournalError when the file is damaged and nothing else is known, or when it
    cannot be written.
    """
    path = _epoch_file(run_dir)
    try:
        said = run_epoch_of(run_dir)
    except JournalError as error:
        if newest_known == 0:
            raise
        log.error("%s; the journal knows run epoch %d, and the count goes on from there", error, newest_known)
        said = newest_known
    if said < newest_known:
        log.error("%s says %d, but run epoch %d was there: the count goes on from there", path, said, newest_known)
    epoch = max(said, newest_known) + 1
    try:
        make_folder(path.parent)
        fresh = path.with_suffix(".new")
        with fresh.open("w") as file:
            file.write(f"{epoch}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error}; make the run folder writable") from error
    return epoch


def run_epoch_of(run_dir: Path | str) -> int:
    """The run epoch of the learner that started last; 0 when none has. Raises JournalError."""
    path = _epoch_file(run_dir)
    try:
        text = path.read_text(errors="replace") if path.exists() else "0"
    except OSError as error:
        raise JournalError(f"cannot read {path}: {error}; make the run folder readable") from error
    number = text.strip()
    if not (number.isascii() and number.isdecimal() and int(number[:20]) <= MAX_EPOCH):
        raise JournalError(f"{path} holds {text[:20]!r}, not a number; write the highest epoch of the logs there")
    return int(number)


def _epoch_file(run_dir: Path | str) -> Path:
    return Path(run_dir) / "run_epoch"
