"""What a running journal keeps in memory of its records: where groups lie and which steps trained them, no bodies.

A trainer that comes back learns from it what to train again, and the journal which segments nobody needs any more. A
group is in it until a step before the oldest checkpoint trained it, or until it is dropped: memory grows with what lies
between the checkpoints, not with the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from asyncrl.storage.journal_reader import Location
from asyncrl.storage.records import BatchSkipped, GroupsDropped, Record, StepTaken, StoredGroup

GroupKey = tuple[int, int]  # (ordinal, attempt)

_OFFSET_BITS = 40  # a place is one number, which costs the garbage collector nothing: segments are below 1 TiB


@dataclass(slots=True)
class SegmentContents:
    """What becomes of the groups of one segment."""

    untrained: set[GroupKey] = field(default_factory=set)
    newest_step: int = -1  # newest version whose step trained a group of this segment

    def needed_only_before(self, version: int) -> bool:
        """Whether every group in it was trained by a step below `version`, or dropped."""
        return not self.untrained and self.newest_step < version


class JournalIndex:
    """Takes in each record where it is appended or found, in the journal's order."""

    def __init__(self) -> None:
        self._places: dict[GroupKey, int] = {}
        self._segments: dict[int, SegmentContents] = {}
        self._steps: dict[int, StepTaken] = {}  # by version
        self._segment_of_step: dict[int, int] = {}  # by version: of those, and of the step before them
        self._end = 0  # above all versions of steps
        self.begins_at = 0  # steps of earlier versions are forgotten

    def __len__(self) -> int:
        """Groups and steps that are remembered."""
        return len(self._places) + len(self._steps)

    @property
    def steps(self) -> Mapping[int, StepTaken]:
        """The steps that stand, by version: not those that another step or a skipped batch replaced."""
        return self._steps

    def place_of(self, group: GroupKey) -> Location | None:
        """Where a group lies; None when it is not there, was dropped, or trained before `begins_at`."""
        place = self._places.get(group)
        return None if place is None else Location(place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1))

    def begin_segment(self, number: int) -> SegmentContents:
        """A segment was begun, or found; it comes before its records."""
        contents = self._segments[number] = SegmentContents()
        return contents

    def add(self, record: Record, location: Location) -> None:
        """A record was appended, or found, at `location`."""
        match record:
            case StoredGroup():
                group = (record.ordinal, record.attempt)
                self._places[group] = location.segment << _OFFSET_BITS | location.offset
                self._segments[location.segment].untrained.add(group)
            case StepTaken():
                self._void_steps_from(record.version)
                self._steps[record.version] = record
                self._segment_of_step[record.version] = location.segment
                self._end = max(self._end, record.version + 1)
                for home, group in self._homes(record.groups):
                    home.untrained.discard(group)
                    home.newest_step = max(home.newest_step, record.version)
            case BatchSkipped():
                self._void_steps_from(record.version)
                self._drop(record.groups)
            case GroupsDropped():
                self._drop(record.groups)

    def segment_of_step(self, version: int) -> int:
        """The segment with the step that made `version` + 1; -1 when that is not known."""
        return self._segment_of_step.get(version, -1)

    def forget_before(self, version: int, first_segment: int) -> None:
        """Segments before `first_segment` are deleted, and no trainer will begin before `version`."""
        for number in [number for number in self._segments if number < first_segment]:
            del self._segments[number]
        for earlier in [step for step in self._steps if step < version]:
            for group in self._steps.pop(earlier).groups:
                self._places.pop(group, None)
        for earlier in [step for step in self._segment_of_step if step < version - 1]:
            del self._segment_of_step[earlier]
        self.begins_at = max(self.begins_at, version)

    def _homes(self, groups: Iterable[GroupKey]) -> Iterator[tuple[SegmentContents, GroupKey]]:
        for group in groups:
            place = self._places.get(group)
            if place is not None and (home := self._segments.get(place >> _OFFSET_BITS)) is not None:
                yield home, group

    def _drop(self, groups: tuple[GroupKey, ...]) -> None:
        for home, group in self._homes(groups):
            home.untrained.discard(group)
        for group in groups:
            self._places.pop(group, None)

    def _void_steps_from(self, version: int) -> None:
        """A step taken anew (its batch could not be read back) voids it and all later ones: their groups wait."""
        for later in range(version, self._end):
            if (step := self._steps.pop(later, None)) is not None:
                del self._segment_of_step[later]
                for home, group in self._homes(step.groups):
                    home.untrained.add(group)
        self._end = min(self._end, version)
