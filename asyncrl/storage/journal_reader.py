"""Reads a journal folder: all of it in order, or one record by its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from asyncrl.errors import JournalError
from asyncrl.storage.records import Record, StoredGroup
from asyncrl.storage.segment import FRAME_BYTES, HEADER_BYTES, payload_bytes, read_salt, scan, whole_record


class Location(NamedTuple):
    """Where a record lies: segment number and byte offset in it."""

    segment: int
    offset: int


class Entry(NamedTuple):
    """One record read back."""

    location: Location
    record: Record


def segment_path(folder: Path, number: int) -> Path:
    """Where segment `number` of the journal in `folder` lies."""
    return folder / f"{number:08d}.segment"


class JournalReader:
    """The whole records that are durable so far. Iterating holds one segment in memory at a time."""

    def __init__(self, folder: Path, numbers: Sequence[int]) -> None:
        self._folder = folder
        self._numbers = numbers

    def __iter__(self) -> Iterator[Entry]:
        for number in self._numbers:
            data = segment_path(self._folder, number).read_bytes()
            for offset, _, record in scan(data):
                if record is not None:
                    yield Entry(Location(number, offset), record)

    def read_at(self, location: Location) -> Record:
        """The record at `location`. Raises JournalError when it is not there or damaged."""
        path = segment_path(self._folder, location.segment)
        try:
            with path.open("rb") as file:
                salt = read_salt(file.read(HEADER_BYTES))
                file.seek(location.offset)
                head = file.read(FRAME_BYTES)
                whole = whole_record(head + file.read(payload_bytes(head)), 0, salt)
        except OSError as error:
            raise JournalError(f"cannot read byte {location.offset} of {path}: {error}") from error
        if whole is None:
            raise JournalError(f"no whole record at byte {location.offset} of {path}: the file is damaged; restore it")
        return whole[1]

    def read_group(self, location: Location) -> StoredGroup:
        """The group at `location`. Raises JournalError when it is not there or damaged, or another record is."""
        record = self.read_at(location)
        if not isinstance(record, StoredGroup):
            path = segment_path(self._folder, location.segment)
            raise JournalError(
                f"byte {location.offset} of {path} holds a {type(record).__name__}, not a group: "
                "the place is of another journal; restore the whole folder"
            )
        return record


class FoundRecords(JournalReader):
    """The records that were found when the journal was opened, without the bodies of groups."""

    def __init__(self, folder: Path, entries: Sequence[Entry]) -> None:
        super().__init__(folder, ())
        self._entries = entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)
