"""Journals as a learner leaves them, for the tests of what judges them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from asyncrl.link.codec import encode_body
from asyncrl.link.rollouts import group_to_result
from asyncrl.storage.journal import Journal
from asyncrl.storage.records import StepTaken, StoredGroup
from asyncrl.types import FinishReason, Group, LeaseKey, LeaseKind, Rollout, VersionSpan


def stored(ordinal: int, versions: tuple[int, int], attempt: int = 0, stop: int = 2) -> StoredGroup:
    """A group of one rollout of two tokens; the span of the second ends at `stop`."""
    spans = (VersionSpan(0, 1, versions[0]), VersionSpan(1, stop, versions[1]))
    rollout = Rollout(np.array([3, 4], np.int32), np.zeros(2, np.float32), spans, FinishReason.STOP, 1.0)
    group = Group(LeaseKey(LeaseKind.TRAIN, ordinal, attempt), np.array([1], np.int32), [rollout])
    body = encode_body(group_to_result(group, ordinal + 1, 1))
    return StoredGroup("g0", 1, ordinal + 1, ordinal, attempt, versions[0], *versions, (2,), body)


def write_journal(folder: Path, *records: StoredGroup | StepTaken) -> None:
    journal = Journal.open(folder)
    for record in records:
        journal.append(record, 0.0)
    journal.make_durable()
    journal.close()
