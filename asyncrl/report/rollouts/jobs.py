"""What the desk's process sends to the one that writes rollouts: a setup, then jobs of one file each, as msgpack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from asyncrl.report.rollouts.records import KeptRollout, small_payload
from asyncrl.types import LeaseKind


@dataclass(frozen=True, slots=True)
class WriterSetup:
    """Where to write, how much, and whose tokenizer makes the text."""

    folder: str
    model_path: str
    max_bytes: int
    level: str = "info"  # of the process's log

    def encode(self) -> bytes:
        """The body of its frame."""
        return _pack([self.folder, self.model_path, self.max_bytes, self.level])

    @classmethod
    def decode(cls, body: bytes) -> WriterSetup:
        """What `encode` made into `body`."""
        return cls(*msgpack.unpackb(body))


class JobEntry(NamedTuple):
    """A rollout to write, with what the desk knows of it: the generator, and what the task gave its reward."""

    rollout: KeptRollout | bytes  # bytes: as the trainer has sent it
    generator: str | None
    payload: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class RolloutJob:
    """One file to write: of the step that made `version`, or of its evaluation."""

    kind: LeaseKind
    version: int
    rollouts: Sequence[JobEntry]

    def encode(self) -> bytes:
        """The body of its frame. Large payloads are left out here."""
        entries = [
            (rollout if isinstance(rollout, bytes) else rollout.to_bytes(), generator, small_payload(payload))
            for rollout, generator, payload in self.rollouts
        ]
        return _pack([self.kind, self.version, entries])


class WrittenEntry(NamedTuple):
    """A rollout as the writing process gets it."""

    body: bytes  # of `KeptRollout.to_bytes`
    generator: str | None
    payload: str | None  # JSON


@dataclass(frozen=True, slots=True)
class WrittenJob:
    """A job as the writing process gets it."""

    kind: LeaseKind
    version: int
    rollouts: list[WrittenEntry]

    @classmethod
    def decode(cls, body: bytes) -> WrittenJob:
        """What `RolloutJob.encode` made into `body`."""
        kind, version, entries = msgpack.unpackb(body)
        return cls(LeaseKind(kind), version, [WrittenEntry(*entry) for entry in entries])


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
