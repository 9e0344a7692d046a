"""What the journal holds: one class per kind of record. `payload` writes its bytes and `from_payload` reads them.

A record's payload is msgpack; a group's is a length-prefixed msgpack header followed by its frame body,
untouched. Frame and checksum belong to `storage.segment`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, get_args

import msgpack

from asyncrl.errors import JournalError
from asyncrl.types import LeaseKey, LeaseKind

_HEADER_LENGTH = struct.Struct("<I")


class RecordKind(IntEnum):
    """The kind byte of a record."""

    GROUP = 1
    STEP = 2
    SEEN = 3
    DROPPED = 4
    GIVEN_UP = 5
    FILTERED = 6
    STARTED = 7
    SKIPPED = 8
    ADMITTED = 9


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """An accepted training group: what the buffer sorts by, whose message it was, and the message body.

    oldest_version and newest_version span the versions of its tokens. issued_version is at most oldest_version: the
    version of its lease where that is known, else the same as oldest_version.
    """

    kind: ClassVar[RecordKind] = RecordKind.GROUP

    generator_id: str
    incarnation: int
    seq: int
    ordinal: int
    attempt: int
    issued_version: int
    oldest_version: int
    newest_version: int
    num_tokens: tuple[int, ...]  # completion tokens of each rollout
    body: bytes  # the frame body of its GroupResult

    @property
    def key(self) -> LeaseKey:
        """The lease that it answers."""
        return LeaseKey(LeaseKind.TRAIN, self.ordinal, self.attempt)

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        header = _pack([getattr(self, name) for name in _GROUP_HEADER])
        return b"".join((_HEADER_LENGTH.pack(len(header)), header, self.body))

    @classmethod
    def from_payload(cls, payload: bytes) -> StoredGroup:
        """The record that these bytes are."""
        (length,) = _HEADER_LENGTH.unpack_from(payload)
        start = _HEADER_LENGTH.size
        header = msgpack.unpackb(payload[start : start + length])
        fields: dict[str, Any] = dict(zip(_GROUP_HEADER, header, strict=True))
        fields["num_tokens"] = tuple(fields["num_tokens"])
        return cls(**fields, body=payload[start + length :])


def without_body(payload: memoryview) -> bytes:
    """The payload of a group up to its body: what is needed to plan a restart, at a fraction of the bytes."""
    (length,) = _HEADER_LENGTH.unpack_from(payload)
    return bytes(payload[: _HEADER_LENGTH.size + length])


# A group's header, in the order of its bytes.
_GROUP_HEADER = (
    *("generator_id", "incarnation", "seq", "ordinal", "attempt"),
    *("issued_version", "oldest_version", "newest_version", "num_tokens"),
)


@dataclass(frozen=True, slots=True)
class StepTaken:
    """These groups, in this order, are the batch that makes `version` + 1. Durable before training on it."""

    kind: ClassVar[RecordKind] = RecordKind.STEP

    version: int
    groups: tuple[tuple[int, int], ...]  # (ordinal, attempt)

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.version, [list(group) for group in self.groups]])

    @classmethod
    def from_payload(cls, payload: bytes) -> StepTaken:
        """The record that these bytes are."""
        version, groups = msgpack.unpackb(payload)
        return cls(version, _pairs(groups))


@dataclass(frozen=True, slots=True)
class MessageSeen:
    """A message was acknowledged that left no group (a failure, an evaluation). For dedup only."""

    kind: ClassVar[RecordKind] = RecordKind.SEEN

    generator_id: str
    incarnation: int
    seq: int

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.generator_id, self.incarnation, self.seq])

    @classmethod
    def from_payload(cls, payload: bytes) -> MessageSeen:
        """The record that these bytes are."""
        return cls(*msgpack.unpackb(payload))


@dataclass(frozen=True, slots=True)
class GroupsDropped:
    """Accepted groups that were found over-age and will not be trained; their ordinals are leased again."""

    kind: ClassVar[RecordKind] = RecordKind.DROPPED

    groups: tuple[tuple[int, int], ...]  # (ordinal, attempt)

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([list(group) for group in self.groups])

    @classmethod
    def from_payload(cls, payload: bytes) -> GroupsDropped:
        """The record that these bytes are."""
        return cls(_pairs(msgpack.unpackb(payload)))


@dataclass(frozen=True, slots=True)
class PromptGivenUp:
    """No group will come for this ordinal; a new ordinal takes its slot.

    reason says why no prompt could be made of its example; it is empty where there was a prompt and its leases failed.
    """

    kind: ClassVar[RecordKind] = RecordKind.GIVEN_UP

    ordinal: int
    reason: str = ""

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.ordinal, self.reason] if self.reason else self.ordinal)

    @classmethod
    def from_payload(cls, payload: bytes) -> PromptGivenUp:
        """The record that these bytes are."""
        unpacked = msgpack.unpackb(payload)
        return cls(*unpacked) if isinstance(unpacked, list) else cls(unpacked)


@dataclass(frozen=True, slots=True)
class GroupFiltered:
    """A group with equal rewards was acknowledged and is not trained on; a new ordinal takes its slot.

    One record for message and ordinal, so that no crash can keep the one and lose the other.
    """

    kind: ClassVar[RecordKind] = RecordKind.FILTERED

    generator_id: str
    incarnation: int
    seq: int
    ordinal: int
    attempt: int

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.generator_id, self.incarnation, self.seq, self.ordinal, self.attempt])

    @classmethod
    def from_payload(cls, payload: bytes) -> GroupFiltered:
        """The record that these bytes are."""
        return cls(*msgpack.unpackb(payload))


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A learner started on the run folder with this run epoch: what the file `run_epoch` is compared with."""

    kind: ClassVar[RecordKind] = RecordKind.STARTED

    run_epoch: int

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack(self.run_epoch)

    @classmethod
    def from_payload(cls, payload: bytes) -> RunStarted:
        """The record that these bytes are."""
        return cls(msgpack.unpackb(payload))


@dataclass(frozen=True, slots=True)
class GeneratorAdmitted:
    """The process of a generator that came first under this id and incarnation: another one is refused."""

    kind: ClassVar[RecordKind] = RecordKind.ADMITTED

    generator_id: str
    incarnation: int
    instance: str

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.generator_id, self.incarnation, self.instance])

    @classmethod
    def from_payload(cls, payload: bytes) -> GeneratorAdmitted:
        """The record that these bytes are."""
        return cls(*msgpack.unpackb(payload))


@dataclass(frozen=True, slots=True)
class BatchSkipped:
    """The batch that should have made `version` + 1 kills the trainer: its groups are dropped, for this reason.

    New ordinals take their slots, and another batch will make that version.
    """

    kind: ClassVar[RecordKind] = RecordKind.SKIPPED

    version: int
    groups: tuple[tuple[int, int], ...]  # (ordinal, attempt)
    reason: str

    def payload(self) -> bytes:
        """Its bytes in the journal."""
        return _pack([self.version, [list(group) for group in self.groups], self.reason])

    @classmethod
    def from_payload(cls, payload: bytes) -> BatchSkipped:
        """The record that these bytes are."""
        version, groups, reason = msgpack.unpackb(payload)
        return cls(version, _pairs(groups), reason)


Record = (
    StoredGroup
    | StepTaken
    | MessageSeen
    | GroupsDropped
    | PromptGivenUp
    | GroupFiltered
    | RunStarted
    | BatchSkipped
    | GeneratorAdmitted
)

_CLASSES: dict[int, type[Record]] = {record.kind: record for record in get_args(Record)}


def decode(kind: int, payload: bytes) -> Record:
    """The record of a payload with the right checksum. Raises JournalError for what another release wrote."""
    record_class = _CLASSES.get(kind)
    if record_class is None:
        raise JournalError(f"journal record of unknown kind {kind}; a newer release wrote it: use that one")
    try:
        return record_class.from_payload(payload)
    except (ValueError, TypeError, struct.error, msgpack.UnpackException) as error:
        raise JournalError(
            f"journal record of kind {record_class.kind.name} cannot be decoded ({error}); another release wrote it: "
            "use that one"
        ) from error


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _pairs(items: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(ordinal), int(attempt)) for ordinal, attempt in items)
