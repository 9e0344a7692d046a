"""What must hold, whatever happens: judged by ledgers of its own, from what crosses the wires and reaches the disk.

The state of the code under test is not looked at. The ledgers are: what generators sent, what the desk acknowledged,
granted and committed, which records reached the disk, what the trainers trained, and which weights sampled each token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from asyncrl.link import messages, trainer_messages
from asyncrl.link.codec import decode
from asyncrl.link.messages import Message
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.records import (
    GroupFiltered,
    GroupsDropped,
    MessageSeen,
    PromptGivenUp,
    Record,
    StepTaken,
    StoredGroup,
)
from asyncrl.storage.segment import HEADER_BYTES, scan
from asyncrl.types import LeaseKind
from tests.simulation.engine import Samples, Weights, digests_of, weights_of
from tests.simulation.network import MAX_FRAME_BYTES
from tests.simulation.trainer import Policy

Who = tuple[str, int]  # generator id, incarnation


class Violation(BaseException):
    """Something that must never happen did. No error of the product's: nothing there may catch it."""


@dataclass(frozen=True, slots=True)
class SentResult:
    """A group that a generator sent: its lease, and its completions by number."""

    key: tuple[str, int, int]
    samples: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class GeneratorLedger:
    """What is known of one incarnation of one generator."""

    sent: dict[int, SentResult | None] = field(default_factory=dict)  # seq -> result; None for a lease that failed
    acked: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    settled_below: int = 1  # it says itself that it holds nothing below
    swaps: set[tuple[int, int, int]] = field(default_factory=set)  # (epoch, version, attempt) that it was told to load
    committed: set[int] = field(default_factory=set)  # versions whose commit it read
    digests_told: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)  # of (epoch, version, try)
    canary_told: dict[tuple[int, int, int], bytes] = field(default_factory=dict)


class Checker:
    """Takes everything in as it happens, raises Violation at once where it can, and judges the rest in `end`."""

    def __init__(self, samples: Samples, max_age: int) -> None:
        self.samples = samples
        self.max_age = max_age
        self.generators: dict[Who, GeneratorLedger] = defaultdict(GeneratorLedger)
        self.records: dict[Record, None] = {}  # every one that was ever durable
        self.seen: dict[tuple[str, int, int], Record] = {}  # (generator, incarnation, seq) -> its record
        self.settled: set[int] = set()  # ordinals in a durable step, given up or filtered
        self.granted: dict[tuple[str, int, int], Who] = {}
        self.grants: dict[tuple[str, int, int], messages.LeaseGrant] = {}
        self.policies: dict[int, bytes] = {0: Policy().chain}  # by version
        self.counts: Counter[str] = Counter()

    # -- what generators send and read

    def generator_sent(self, who: Who, frame: bytes) -> None:
        message = decode(frame, max_bytes=MAX_FRAME_BYTES)
        ledger = self.generators[who]
        if isinstance(message, messages.Hello):
            self._check_said(who, message)
        elif isinstance(message, messages.GroupResult):
            group = result_to_group(message)
            result = SentResult(
                tuple(group.key),
                tuple(int(rollout.token_ids[0]) for rollout in group.rollouts),
                tuple(tuple(map(int, rollout.token_versions())) for rollout in group.rollouts),
            )
            self._note_sent(who, message.seq, result)
            versions = {version for labels in result.labels for version in labels}
            _check(versions <= ledger.committed, f"{who} let tokens of {versions} go, proven are {ledger.committed}")
        elif isinstance(message, messages.LeaseFailed):
            self._note_sent(who, message.seq, None)
        elif isinstance(message, messages.SyncReply) and not message.error:
            which = _which(message)
            if message.digests:
                ledger.digests_told[which] = tuple(message.digests[0])
            if message.canary_logprobs:
                ledger.canary_told[which] = message.canary_logprobs[0]

    def _check_said(self, who: Who, hello: messages.Hello) -> None:
        """What a hello says of the outbox must be true: the desk forgets by it."""
        ledger = self.generators[who]
        below = set(range(1, hello.first_unacked_seq)) & set(ledger.sent)
        open_ones = below - ledger.acked - ledger.refused
        _check(not open_ones, f"{who} says it holds nothing below {hello.first_unacked_seq}; open are {open_ones}")
        ledger.settled_below = max(ledger.settled_below, hello.first_unacked_seq)

    def _note_sent(self, who: Who, seq: int, result: SentResult | None) -> None:
        ledger = self.generators[who]
        known = ledger.sent.setdefault(seq, result)
        _check(known == result, f"{who} used seq {seq} for {known} and for {result}")

    def generator_read(self, who: Who, frame: bytes) -> None:
        message = decode(frame, max_bytes=MAX_FRAME_BYTES)
        if isinstance(message, messages.SyncCommit) and _which(message) in self.generators[who].swaps:
            self.generators[who].committed.add(message.version)

    # -- what the desk says

    def desk_said(self, who: Who, message: Message) -> None:
        self.counts[type(message).__name__] += 1
        match message:
            case messages.Ack():
                self._acked(who, {*range(1, message.acked_seq + 1), *message.beyond})
            case messages.Welcome():
                self._acked(who, set(range(1, message.acked_seq + 1)))
            case messages.Nack() if message.seq:
                self.generators[who].refused.add(message.seq)
            case messages.LeaseGrant():
                self._granted(who, message)
            case messages.SyncSwap():
                self.generators[who].swaps.add(_which(message))
            case messages.SyncCommit() if _which(message) in self.generators[who].swaps:
                # Else it was meant for the incarnation before, whose name this one took over a moment ago.
                self._committed(who, message)

    def desk_said_in_vain(self, who: Who, message: Message) -> None:
        """The connection was gone. A refusal is one all the same: what is acknowledged later may lie above it."""
        if isinstance(message, messages.Nack) and message.seq:
            self.generators[who].refused.add(message.seq)

    def _acked(self, who: Who, seqs: set[int]) -> None:
        ledger = self.generators[who]
        for seq in sorted(seqs - ledger.acked - ledger.refused):
            if seq >= ledger.settled_below:
                _check(seq in ledger.sent, f"{who}: seq {seq} is acknowledged and was never sent")
                _check((*who, seq) in self.seen, f"{who}: seq {seq} is acknowledged and not on the disk")
        ledger.acked |= seqs - ledger.refused

    def _granted(self, who: Who, grant: messages.LeaseGrant) -> None:
        key = tuple(grant.key)
        _check(key not in self.granted, f"lease {key} is granted to {who} and was to {self.granted.get(key)}")
        self.granted[key] = who
        self.grants[key] = grant
        if grant.kind is LeaseKind.TRAIN:
            _check(grant.ordinal not in self.settled, f"ordinal {grant.ordinal} is settled and leased again")

    def _committed(self, who: Who, commit: messages.SyncCommit) -> None:
        which = _which(commit)
        policy = self.policies.get(commit.version)
        _check(policy is not None, f"version {commit.version} is committed and does not exist")
        told = self.generators[who].digests_told.get(which)
        _check(told == digests_of(weights_of(policy)), f"{who}: {which} is committed with digests {told}")
        canary = self.generators[who].canary_told.get(which)
        row = np.frombuffer(canary or b"", np.float32)
        good = np.frombuffer(self.canary_of(policy), np.float32)
        _check(row.shape == good.shape and np.abs(row - good).max() < 1e-3, f"{who}: {which} committed, canary {row}")

    def canary_of(self, policy: bytes) -> bytes:
        from tests.simulation.engine import canary_row
        from tests.simulation.trainer import CANARY

        return canary_row(weights_of(policy), CANARY).tobytes()

    def batch_dealt(self, batch: trainer_messages.Batch) -> None:
        """The desk deals a batch to the trainer: what it is made of must be on the disk."""
        decided = any(record.version == batch.version for record in self._of(StepTaken))
        _check(decided, f"the batch of version {batch.version} is dealt, and no record of it is on the disk")

    # -- what reaches the disk, and what is trained

    def on_disk(self, records: Iterable[Record]) -> None:
        """Records that are durable, in their order; those that were there before among them."""
        for record in records:
            if record in self.records:
                continue
            self.records[record] = None
            match record:
                case StoredGroup() | MessageSeen() | GroupFiltered():
                    self.seen[record.generator_id, record.incarnation, record.seq] = record
                case StepTaken():
                    self.settled |= {ordinal for ordinal, _ in record.groups}
                case PromptGivenUp():
                    self.settled.add(record.ordinal)
            if isinstance(record, GroupFiltered):
                self.settled.add(record.ordinal)

    def trained(self, policy: Policy) -> None:
        known = self.policies.setdefault(policy.version, policy.chain)
        _check(known == policy.chain, f"version {policy.version} was made twice, of other groups or in another order")

    # -- the end

    def end(self, final: Policy, steps: int, groups_per_step: int) -> None:
        """Judges a run that has ended, by the state of its last trainer."""
        self.counts["trained"] = len(final.history)
        _check(final.version == steps, f"the run ended at version {final.version} of {steps}")
        trained = Counter(group.ordinal for group in final.history)
        twice = [ordinal for ordinal, count in trained.items() if count > 1]
        _check(not twice, f"trained twice: {twice}")
        _check(len(trained) == steps * groups_per_step, f"{len(trained)} groups trained")
        given_up = {record.ordinal for record in self._of(PromptGivenUp)}
        filtered = {record.ordinal for record in self._of(GroupFiltered)}
        for name, others in (("given up", given_up), ("filtered", filtered)):
            both = others & trained.keys()
            _check(not both, f"{name} and trained: {both}")
        for ordinal in given_up:
            self._check_given_up(ordinal)
        everything = trained.keys() | given_up | filtered
        skipped = set(range(max(everything) + 1)) - everything
        _check(not skipped, f"neither trained nor given up nor filtered: {sorted(skipped)}")
        self._check_tokens(final)
        self._check_acknowledged(final, everything)

    def _check_given_up(self, ordinal: int) -> None:
        """A prompt is given up after failures at two generators, or at one that brought other groups meanwhile."""
        names = {who[0] for key, who in self.granted.items() if key[:2] == (LeaseKind.TRAIN, ordinal)}
        worked = {who[0] for who, ledger in self.generators.items() if any(ledger.sent.values())}
        _check(len(names) > 1 or bool(names & worked), f"ordinal {ordinal} is given up for failures of {names} alone")

    def _of(self, kind: type) -> Iterator[Record]:
        return (record for record in self.records if isinstance(record, kind))

    def _check_tokens(self, final: Policy) -> None:
        for group in final.history:
            for sample, labels in zip(group.samples, group.labels, strict=True):
                _check(sample in self.samples.by_number, f"ordinal {group.ordinal}: nobody sampled {sample}")
                sampled = self.samples.by_number[sample]
                committed = self.generators[sampled.generator, sampled.incarnation].committed
                _check(len(labels) == len(sampled.weights), f"{sample}: {len(labels)} labels, {len(sampled.weights)}")
                for label, weights in zip(labels, sampled.weights, strict=True):
                    where = f"ordinal {group.ordinal}, completion {sample}, version {label}"
                    _check(label in committed, f"{where}: never committed to {sampled.generator}")
                    _check(self._weights(label) == weights, f"{where}: sampled under other weights")
                    age = group.version - label
                    _check(0 <= age <= self.max_age, f"{where}: trained at age {age}, limit {self.max_age}")

    def _weights(self, version: int) -> Weights:
        return weights_of(self.policies[version])

    def _check_acknowledged(self, final: Policy, settled: set[int]) -> None:
        """Every acknowledged group was trained as it was sent, dropped by name, or its prompt was settled before."""
        trained = {(group.ordinal, group.attempt): (group.samples, group.labels) for group in final.history}
        dropped = {pair for record in self._of(GroupsDropped) for pair in record.groups}
        for who, ledger in self.generators.items():
            for seq in sorted(ledger.acked & ledger.sent.keys()):
                result = ledger.sent[seq]
                if result is None or result.key[0] != LeaseKind.TRAIN:
                    continue
                self.counts["acknowledged"] += 1
                record = self.seen.get((*who, seq))
                what = f"{who} seq {seq}, lease {result.key}"
                _check(record is not None, f"{what}: acknowledged and lost")
                pair = result.key[1:]
                if isinstance(record, StoredGroup):
                    fate = trained.get(pair)
                    _check(fate is not None or pair in dropped, f"{what}: acknowledged, not trained and not dropped")
                    _check(fate in (None, (result.samples, result.labels)), f"{what}: trained as something else")
                else:
                    _check(result.key[1] in settled, f"{what}: taken for needless, and its prompt is not settled")


def records_in(segments: Iterable[bytes]) -> Iterator[Record]:
    """The whole records of a journal's segments."""
    for data in segments:
        if len(data) >= HEADER_BYTES:
            yield from (record for _, _, record in scan(data) if record is not None)


def _which(phase: messages.SyncSwap | messages.SyncCommit | messages.SyncReply) -> tuple[int, int, int]:
    """(run epoch, version, attempt): what tells one load from all others."""
    return phase.run_epoch, phase.version, phase.attempt


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)
