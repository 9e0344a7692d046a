"""What each stub process writes down about itself, in a file of its own, one line at a time.

A line is written by one `write` before the thing that it tells of goes out, so that SIGKILL loses none: the page cache
outlives the process. Generators write

    G INCARNATION TIME                          this life begins
    W INCARNATION TIME RUN_EPOCH                a learner of this run epoch has welcomed it
    S INCARNATION SEQ KIND ORDINAL ATTEMPT ROLLOUTS SHA       a group is sent for the first time
    F INCARNATION SEQ KIND ORDINAL ATTEMPT REASON             a lease ended without one
    A INCARNATION SEQ                           the learner said that this one is on its disk
    N INCARNATION SEQ CODE                      the learner will never take this one

and trainers, as JSON, each step that they made: the version, the chain, the groups in it. TIME is CLOCK_MONOTONIC.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asyncrl.link import messages
from asyncrl.link.codec import body_of, decode

_WIRE_CODE = struct.Struct("<H")  # at byte 6 of a frame, see link.codec
_RESULTS = {messages.GroupResult.wire_code, messages.LeaseFailed.wire_code}
_ANSWERS = {messages.Welcome.wire_code, messages.Ack.wire_code, messages.Nack.wire_code}


def _code(frame: bytes) -> int:
    (code,) = _WIRE_CODE.unpack_from(frame, 6)
    return int(code)


class Ledger:
    """A file to which whole lines are added."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        """One line."""
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def sha(body: bytes | memoryview) -> str:
    """Names a result by its bytes."""
    return hashlib.sha256(body).hexdigest()[:24]


class GeneratorLedger:
    """Notes what a generator sends and reads, from the frames themselves."""

    def __init__(self, path: Path, incarnation: int, max_frame_bytes: int) -> None:
        self._ledger = Ledger(path)
        self._incarnation = incarnation
        self._max_frame_bytes = max_frame_bytes
        self._last_sent = 0
        self._acked: set[int] = set()
        self._acked_to = 0
        self._run_epoch = 0

    def began(self, now: float) -> None:
        """The process is there."""
        self._ledger.write("G", self._incarnation, f"{now:.6f}")

    def sends(self, frame: bytes) -> None:
        """To be called before a frame is sent."""
        if _code(frame) not in _RESULTS:
            return
        message = decode(frame, max_bytes=self._max_frame_bytes)
        assert isinstance(message, messages.GroupResult | messages.LeaseFailed)
        if message.seq <= self._last_sent:
            return
        self._last_sent = message.seq
        what = self._incarnation, message.seq, message.kind, message.ordinal, message.attempt
        if isinstance(message, messages.GroupResult):
            self._ledger.write("S", *what, len(message.rollouts), sha(body_of(frame)))
        else:
            self._ledger.write("F", *what, message.reason)

    def read(self, frame: bytes, now: float) -> None:
        """To be called when a frame came in."""
        if _code(frame) not in _ANSWERS:
            return
        message = decode(frame, max_bytes=self._max_frame_bytes)
        match message:
            case messages.Welcome():
                self._welcomed(message, now)
                self._acknowledged(range(self._acked_to + 1, message.acked_seq + 1))
            case messages.Ack():
                self._acknowledged([*range(self._acked_to + 1, message.acked_seq + 1), *message.beyond])
                self._acked_to = max(self._acked_to, message.acked_seq)
            case messages.Nack() if message.seq:
                self._ledger.write("N", self._incarnation, message.seq, message.code)

    def _welcomed(self, message: messages.Welcome, now: float) -> None:
        if message.run_epoch > self._run_epoch:
            self._run_epoch = message.run_epoch
            self._ledger.write("W", self._incarnation, f"{now:.6f}", message.run_epoch)

    def _acknowledged(self, seqs: Iterable[int]) -> None:
        for seq in seqs:
            if seq not in self._acked:
                self._acked.add(seq)
                self._ledger.write("A", self._incarnation, seq)


@dataclass(frozen=True, slots=True)
class SentGroup:
    """A group, as its generator noted it."""

    kind: str
    ordinal: int
    attempt: int
    num_rollouts: int
    sha: str


@dataclass(slots=True)
class GeneratorAccount:
    """One incarnation of one generator, read back."""

    began_at: float = 0.0
    sent: dict[int, SentGroup] = field(default_factory=dict)  # by seq
    acked: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    welcomed: list[tuple[float, int]] = field(default_factory=list)  # when, by which run epoch


def read_generator(path: Path) -> dict[int, GeneratorAccount]:
    """The accounts of a generator's ledger, by incarnation."""
    accounts: dict[int, GeneratorAccount] = {}
    for line in path.read_text().splitlines():
        kind, incarnation, *rest = line.split()
        account = accounts.setdefault(int(incarnation), GeneratorAccount())
        match kind:
            case "G":
                account.began_at = float(rest[0])
            case "W":
                account.welcomed.append((float(rest[0]), int(rest[1])))
            case "S":
                seq, what, ordinal, attempt, num_rollouts, digest = rest
                account.sent[int(seq)] = SentGroup(what, int(ordinal), int(attempt), int(num_rollouts), digest)
            case "A":
                account.acked.add(int(rest[0]))
            case "N":
                account.refused.add(int(rest[0]))
    return accounts


@dataclass(frozen=True, slots=True)
class MadeStep:
    """A step that a trainer made, as it noted it."""

    version: int  # that it made
    chain: str
    groups: tuple[tuple[int, int, str], ...]  # ordinal, attempt, sha; in the batch's order


class TrainerLedger:
    """Notes each step of a trainer."""

    def __init__(self, path: Path) -> None:
        self._ledger = Ledger(path)

    def made(self, step: MadeStep) -> None:
        """To be called before the step is reported."""
        self._ledger.write(json.dumps([step.version, step.chain, step.groups], separators=(",", ":")))


def read_trainer(path: Path) -> Iterator[MadeStep]:
    """All steps, those that were made again among them."""
    for line in path.read_text().splitlines():
        version, chain, groups = json.loads(line)
        yield MadeStep(version, chain, tuple((ordinal, attempt, digest) for ordinal, attempt, digest in groups))
