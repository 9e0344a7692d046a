"""The rollout journal: an append-only log on disk. No rollout is acknowledged before `make_durable` returned.

Layout: numbered segment files of about 64 MiB in one folder, laid out as `storage.segment` says.

The order that makes "an acknowledged rollout is never lost, and none is trained twice" true:

    append(StoredGroup) -> make_durable -> Ack goes out          a crash before: the generator sends it again
    append(StepTaken)   -> make_durable -> batch to the trainer  a crash after: the same batch is trained again
    checkpoint of version v is durable -> delete_before(v)

What `open` finds damaged is counted, never passed over in silence. A frame that the end of the last segment cuts off,
behind what was acknowledged (`journal_end`), is what a crash in mid-write leaves: it is cut off (`torn_bytes`) and kept
in a file `.cut` beside it. Anything else stays where it is and is skipped up to the next whole record (`damage`), and
what should be there and is not, a segment or the end of one, is listed too (`missing`).

A failed write or fdatasync breaks the journal for good: after a failed fdatasync the kernel may have dropped the pages,
so a second one could report success for data that is gone. The learner exits; what was not durable is not acknowledged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count, pairwise
from pathlib import Path
from typing import NamedTuple

from asyncrl.errors import JournalError
from asyncrl.storage.disk import fsync_folder, lock_folder, make_folder, write_all
from asyncrl.storage.journal_end import JournalEnd
from asyncrl.storage.journal_index import JournalIndex, SegmentContents
from asyncrl.storage.journal_reader import Entry, FoundRecords, JournalReader, Location, segment_path
from asyncrl.storage.records import Record, StoredGroup
from asyncrl.storage.segment import (
    HEADER_BYTES,
    encode,
    is_begun_header,
    is_cut_frame,
    new_header,
    read_header,
    read_salt,
    scan,
)

log = logging.getLogger(__name__)

DURABLE_AFTER_S = 0.020  # records that come within this time share one fdatasync
DURABLE_AFTER_BYTES = 8 * 2**20
SEGMENT_BYTES = 16 * 2**20  # a learner that starts reads what is not deleted yet: one segment more than it needs


class Damage(NamedTuple):
    """Bytes of a segment that are no whole record, or that are not there; 0 bytes: it is not known how many."""

    location: Location
    num_bytes: int


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    num_bytes: int
    salt: int
    contents: SegmentContents = field(default_factory=SegmentContents)

    def needed_only_before(self, version: int) -> bool:
        """Whether every group in it was trained by a step below `version`, or dropped."""
        return self.contents.needed_only_before(version)


class Journal:
    """Append, make durable, read back, delete. Single-threaded; times are monotonic seconds passed in.

        journal = Journal.open(run_dir / "journal")
        for entry in journal.read_all(): ...         # recovery, see replay.recovery
        journal.append(group, now)
        if journal.durable_due <= now:               # a deadline of the caller's event loop
            journal.make_durable()

    index knows where groups lie and what was trained; pending_bytes were appended and are not durable yet;
    appended_bytes are all since `open`; torn_bytes, damage and missing are what `open` found.
    """

    def __init__(self, folder: Path, lock_fd: int, segment_bytes: int, flush: Callable[[int], None]) -> None:
        self._folder = folder
        self._lock_fd = lock_fd
        self._segment_bytes = segment_bytes
        self._flush = flush
        self._segments: list[_Segment] = []
        self._found: list[Entry] = []  # what `open` found, until the first record is appended
        self._fd = -1
        self._pending: list[bytes] = []
        self._pending_since = 0.0
        self._broken = ""
        self._end = JournalEnd(folder)
        self._cut_off: list[tuple[_Segment, int]] = []  # segment and offset of what is to be cut off
        self._writable = False
        self.index = JournalIndex()
        self.pending_bytes = 0
        self.appended_bytes = 0
        self.torn_bytes = 0
        self.damage: list[Damage] = []
        self.missing: list[Damage] = []

    @classmethod
    def open(
        cls,
        folder: Path | str,
        segment_bytes: int = SEGMENT_BYTES,
        flush: Callable[[int], None] = os.fdatasync,
        *,
        untouched: bool = False,
    ) -> Journal:
        """Locks the folder (made if missing), cuts off a torn end, and is ready to append.

        untouched leaves what is there as it is until `begin_writing`: for a start that may yet be refused.
        flush(file descriptor) brings what was written to the disk, or raises OSError: a test lets a disk fail here.
        Raises JournalError when another learner holds the folder (its pid is named) or the disk fails.
        """
        folder = Path(folder)
        try:
            make_folder(folder)
            journal = cls(folder, lock_folder(folder), segment_bytes, flush)
            try:
                journal._load()
                if not untouched:
                    journal.begin_writing()
            except BaseException:
                journal.close()
                raise
        except OSError as error:
            raise JournalError(f"cannot open the journal {folder}: {error}; make it writable") from error
        return journal

    def close(self) -> None:
        """Releases the files and the lock. What is not durable is not written: it was never acknowledged."""
        self._pending.clear()
        self.pending_bytes = 0
        self._broken = self._broken or "it is closed"
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        if self._lock_fd >= 0:
            self._end.close()
        self._fd = self._lock_fd = -1

    # -- writing ---------------------------------------------------------------------------------------------

    @property
    def durable_due(self) -> float:
        """When `make_durable` should be called for what is pending; infinity when nothing is."""
        if not self._pending:
            return float("inf")
        if self.pending_bytes >= DURABLE_AFTER_BYTES:
            return self._pending_since
        return self._pending_since + DURABLE_AFTER_S

    def append(self, record: Record, now: float) -> Location:
        """Adds a record, durable with the next `make_durable`.

        Raises JournalError when the journal is closed or broken, or when a new segment is due and the disk fails.
        """
        self._check_usable()
        self._found.clear()
        segment = self._segments[-1]
        frame = encode(record, segment.salt)
        used = segment.num_bytes + self.pending_bytes
        if used > HEADER_BYTES and used - HEADER_BYTES + len(frame) > self._segment_bytes:
            self.make_durable()
            segment = self._start_segment(segment.number + 1)
            frame = encode(record, segment.salt)
        if not self._pending:
            self._pending_since = now
        location = Location(segment.number, segment.num_bytes + self.pending_bytes)
        self._pending.append(frame)
        self.pending_bytes += len(frame)
        self.appended_bytes += len(frame)
        self.index.add(record, location)
        return location

    def make_durable(self) -> None:
        """Makes everything appended durable. Raises JournalError; then nothing more may be acknowledged."""
        self._check_usable()
        if not self._pending:
            return
        segment = self._segments[-1]
        try:
            write_all(self._fd, b"".join(self._pending))
            self._flush(self._fd)
        except OSError as error:
            self._broken = f"an earlier write failed: {error}"
            self._cut_quietly(segment)
            raise JournalError(
                f"cannot write {self.pending_bytes} bytes to {segment.path}: {error}; nothing of it was acknowledged. "
                "Free space on that file system and start the learner again: it resumes there"
            ) from error
        segment.num_bytes += self.pending_bytes
        self._pending.clear()
        self.pending_bytes = 0
        self._move_end()

    def delete_before(self, version: int) -> int:
        """Deletes leading segments that no recovery from the checkpoint of `version` or a newer one needs.

        Such a segment was closed before the step that made `version` was taken (so that the checkpoint's own
        state covers what it acknowledges), and its groups were trained by then or dropped. With several
        checkpoints kept, pass the oldest. Returns how many segments were deleted.
        """
        limit = self.index.segment_of_step(version - 1)
        deleted = 0
        while (segment := self._segments[0]).number < limit and segment.needed_only_before(version):
            # One fsync of the folder each: after a power loss the segments left are still without a gap.
            segment.path.unlink()
            fsync_folder(self._folder)
            self._segments.remove(segment)
            deleted += 1
        if limit >= 0:
            self.index.forget_before(version, self._segments[0].number)
        return deleted

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Bytes on disk plus pending."""
        return sum(segment.num_bytes for segment in self._segments) + self.pending_bytes

    @property
    def folder(self) -> Path:
        """Where its segments are."""
        return self._folder

    @property
    def begins_later(self) -> bool:
        """Whether its first segments are not there: deleted because a checkpoint covers them, or lost."""
        return self._segments[0].number > 1 if self._segments else bool(self.missing)

    def read_all(self) -> JournalReader:
        """Every whole durable record, oldest first."""
        return JournalReader(self._folder, [segment.number for segment in self._segments])

    def found(self) -> JournalReader:
        """What `open` found, as `read_all` gives it, but without the bodies of groups and without reading it again.

        For the start: once a record was appended, all is read.
        """
        return self.read_all() if self.appended_bytes else FoundRecords(self._folder, self._found)

    def read_group(self, location: Location) -> StoredGroup:
        """The durable group at `location`. Raises JournalError when it is not there or damaged."""
        return self.read_all().read_group(location)

    # -- inside ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Reads everything, and changes nothing."""
        paths = sorted(self._folder.glob("*.segment"))
        for path in paths:
            self._load_segment(path, is_last=path == paths[-1])
        numbers = [segment.number for segment in self._segments]
        for before, after in pairwise(numbers):
            self.missing += [Damage(Location(number, 0), 0) for number in range(before + 1, after)]
        if (end := self._end.place) is not None:
            last = self._segments[-1] if self._segments else None
            first_missing = last.number + 1 if last is not None else end.segment
            behind = end.segment + (end.offset > HEADER_BYTES)  # a header alone holds nothing
            self.missing += [Damage(Location(number, 0), 0) for number in range(first_missing, behind)]
            if last is not None and last.number == end.segment:
                self._note_cut(last, end.offset)

    def _load_segment(self, path: Path, is_last: bool) -> None:
        data = path.read_bytes()
        if is_last and is_begun_header(data):
            # A crash while the segment was made: nothing is in it.
            self._cut_off.append((_Segment(int(path.stem), path, len(data), 0), 0))
            self.torn_bytes += len(data)
            return
        try:
            header = read_header(data)
            if header.number not in (None, int(path.stem)):
                raise JournalError(f"says that it is segment {header.number}")
        except JournalError as error:
            raise JournalError(
                f"{path} {error}; it is damaged or of another release: restore it or move it away"
            ) from None
        if header.damaged:
            self.damage.append(Damage(Location(int(path.stem), 0), header.num_bytes))
        if self._segments and header.previous_bytes is not None and self._segments[-1].number + 1 == header.number:
            self._note_cut(self._segments[-1], header.previous_bytes)
        segment = self._add_segment(int(path.stem), path, len(data), header.salt)
        for offset, end, record in scan(data, bodies=False):
            place = Location(segment.number, offset)
            if record is not None:
                self.index.add(record, place)
                self._found.append(Entry(place, record))
                continue
            is_cut = is_last and end == len(data) and is_cut_frame(data, offset)
            if is_cut:
                self._cut_off.append((segment, offset))
            if is_cut and (self._end.place is None or place >= self._end.place):
                self.torn_bytes += end - offset  # an unfinished write: nothing of it was acknowledged
            else:
                self.damage.append(Damage(place, end - offset))

    def _note_cut(self, segment: _Segment, num_bytes: int) -> None:
        """The segment should have at least num_bytes: notes what is gone."""
        if segment.num_bytes < num_bytes:
            self.missing.append(Damage(Location(segment.number, segment.num_bytes), num_bytes - segment.num_bytes))

    def begin_writing(self) -> None:
        """Cuts off a torn end, after it was copied beside, and is ready to append. Does nothing the second time.

        After a damaged end a new segment is begun, so that the bytes stay as they are. Raises JournalError.
        """
        if self._writable:
            return
        try:
            for segment, offset in self._cut_off:
                self._set_aside(segment, offset)
        except OSError as error:
            raise JournalError(f"cannot repair the journal {self._folder}: {error}; make it writable") from error
        self._writable = True
        last = self._segments[-1] if self._segments else None
        newest = max([last.number if last else 0, *(place.segment for place, num_bytes in self.missing)])
        if last is None or newest > last.number or self._ends_damaged(last):
            self._start_segment(newest + 1)
        else:
            try:
                self._fd = os.open(last.path, os.O_WRONLY | os.O_APPEND)
                # What a killed learner wrote and did not sync is read like the rest, and is acknowledged and trained
                # from now on: it must not be in the page cache alone. The same holds for the file's name.
                os.fsync(self._fd)
                fsync_folder(self._folder)
            except OSError as error:
                raise JournalError(f"cannot open {last.path}: {error}; make it writable") from error
        self._move_end()

    def _ends_damaged(self, segment: _Segment) -> bool:
        ends = [place.offset + num_bytes for place, num_bytes in self.damage if place.segment == segment.number]
        return any(end == segment.num_bytes for end in ends)

    def _set_aside(self, segment: _Segment, offset: int) -> None:
        """Cuts the segment off at offset, and keeps what was behind it in a file of its own."""
        names = (f"{segment.path.stem}.{offset}{again}.cut" for again in chain([""], (f".{n}" for n in count(2))))
        kept = next(path for name in names if not (path := segment.path.with_name(name)).exists())
        with open(kept, "wb", opener=_private) as file:
            file.write(segment.path.read_bytes()[offset:])
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self._folder)
        if offset == 0:
            segment.path.unlink()
            fsync_folder(self._folder)
        else:
            self._cut(segment, offset)

    def _move_end(self) -> None:
        segment = self._segments[-1]
        try:
            self._end.move(segment.number, segment.num_bytes)
        except OSError as error:
            # The records are durable; without this a later start cannot tell whether the file was cut short.
            log.warning("cannot note the end of the journal %s: %s", self._folder, error)

    def _start_segment(self, number: int) -> _Segment:
        path = segment_path(self._folder, number)
        header = new_header(number, self._segments[-1].num_bytes if self._segments else 0)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                write_all(fd, header)
                os.fsync(fd)
                fsync_folder(self._folder)
            except OSError:
                os.close(fd)
                raise
        except OSError as error:
            self._broken = f"an earlier write failed: {error}"
            raise JournalError(f"cannot start segment {path}: {error}; free space and start again") from error
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        segment = self._add_segment(number, path, HEADER_BYTES, read_salt(header))
        self._move_end()
        return segment

    def _add_segment(self, number: int, path: Path, num_bytes: int, salt: int) -> _Segment:
        self._segments.append(_Segment(number, path, num_bytes, salt, self.index.begin_segment(number)))
        return self._segments[-1]

    def _cut(self, segment: _Segment, num_bytes: int) -> None:
        fd = os.open(segment.path, os.O_WRONLY)
        try:
            os.ftruncate(fd, num_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        segment.num_bytes = num_bytes

    def _cut_quietly(self, segment: _Segment) -> None:
        try:
            self._cut(segment, segment.num_bytes)
        except OSError:
            # The torn end stays; the next open cuts it off.
            return

    def _check_usable(self) -> None:
        assert self._writable or self._broken, "begin_writing comes before the first record"
        if self._broken:
            raise JournalError(f"the journal {self._folder} takes no more records: {self._broken}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
