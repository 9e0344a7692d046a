"""What the messages of a weight sync say: where a channel meets, and what it will deliver. Without torch.

The bytes themselves travel beside the messages, see `weights`. Learner, generators and vLLM's workers use these classes
as they are. Their constructors check what the types leave open, so that nothing impossible gets past the decoding.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from asyncrl.errors import ProtocolError
from asyncrl.host.processes import boot_id, pid_namespace
from asyncrl.link.schema.field_rules import AtMost, Within
from asyncrl.link.wire_types import KEY, MAX_WORKERS, Count, Digest, Label, Number, Port, Rank, Reason, Seconds, Tag

MAX_TENSORS = 2**20  # names or buckets of one policy
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every element size and of the digest's word
DTYPE_BYTES = {  # size of one element; the names are those of torch
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """Where a channel meets. The first ranks are the learner's senders, mostly one; then come the generators.

    A generator's tensor-parallel workers take consecutive ranks.

    `prefix` names the channel in the store and must never be used twice, also not after a failure.
    `timeout_s` bounds the forming of the channel.

    Raises:
        ProtocolError: the rank is not in the channel, or no time is left to form it.
    """

    store_host: Label
    store_port: Port
    prefix: Label
    rank: Rank
    world_size: Rank
    backend: Tag
    timeout_s: Seconds
    num_senders: Rank | None = None  # None = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or not self.timeout_s > 0:
            raise ProtocolError(
                f"weight channel spec is out of range: rank {self.rank} must be in [0, {self.world_size}), "
                f"timeout_s {self.timeout_s} above 0"
            )
        if not 1 <= self.senders <= self.world_size:
            raise ProtocolError(f"weight channel of {self.world_size} ranks cannot have {self.senders} senders")

    @property
    def senders(self) -> int:
        """The ranks below this send, all others receive."""
        return 1 if self.num_senders is None else self.num_senders

    def for_rank(self, rank: int) -> ChannelSpec:
        """The same channel seen from another rank."""
        return replace(self, rank=rank)


@dataclass(frozen=True, slots=True)
class ChannelPlace:
    """A channel as a generator is told of it: `rank` is that of its first worker; see ChannelSpec."""

    channel_epoch: Number = field(metadata={KEY: "group_epoch"})
    store_host: Label
    store_port: Port
    prefix: Label
    rank: Rank
    world_size: Rank
    backend: Tag
    num_senders: Rank | None = None  # None = 1

    def spec(self, timeout_s: float) -> ChannelSpec:
        """What to join, within `timeout_s`. Raises ProtocolError."""
        return ChannelSpec(
            store_host=self.store_host,
            store_port=self.store_port,
            prefix=self.prefix,
            rank=self.rank,
            world_size=self.world_size,
            backend=self.backend,
            timeout_s=timeout_s,
            num_senders=self.num_senders,
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a process computes, as far as it decides how weights can reach it.

    machine: the boot id of its kernel; empty = not told.
    memory: its user and PID namespace: where both agree, processes can open each other's memory.
    gpus: UUIDs of its GPUs in the order of its workers; none = it computes on the CPU.
    """

    machine: Tag = ""
    memory: Tag = ""
    gpus: Annotated[tuple[Tag, ...], AtMost(MAX_WORKERS)] = ()

    @classmethod
    def here(cls, gpus: Sequence[str] = ()) -> Placement:
        """That of this process."""
        return cls(boot_id(), f"{os.geteuid()}@{pid_namespace()}", tuple(gpus))


class TensorEntry(NamedTuple):
    """One named tensor in the flat buffer. Tied tensors are two entries with one offset and travel once."""

    name: Label
    dtype: Tag
    shape: Annotated[tuple[Count, ...], AtMost(16)]
    offset: Count  # bytes

    @property
    def word_bytes(self) -> int:
        """Size of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.word_bytes


Ranges = Annotated[tuple[tuple[Count, Count], ...], AtMost(MAX_TENSORS)]  # [start, stop) in bytes of the flat buffer


_PIECE = struct.Struct("<qq")


class Bucket(NamedTuple):
    """What one sender broadcasts at once: byte ranges of the flat buffer, its pieces.

    On the way its pieces follow each other, each from the next multiple of ALIGNMENT on; the bytes between are zero.
    There is a piece for every tensor and sender: too many for a message, were they objects of their own.
    """

    sender: Rank
    table: Annotated[bytes, AtMost(16 * MAX_TENSORS)]  # the pieces: pairs of little-endian int64

    @classmethod
    def of(cls, sender: int, pieces: Sequence[tuple[int, int]]) -> Bucket:
        """The bucket of these pieces, [start, stop) each."""
        return cls(sender, b"".join(_PIECE.pack(*piece) for piece in pieces))

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Its byte ranges [start, stop), in the order in which they travel. Raises ProtocolError for a cut table."""
        if len(self.table) % _PIECE.size:
            raise ProtocolError(f"a bucket's table of {len(self.table)} bytes is no list of pairs")
        return tuple((start, stop) for start, stop in _PIECE.iter_unpack(self.table))

    @property
    def num_bytes(self) -> int:
        """Size on the way: what is broadcast and digested."""
        *_, (place, start, stop) = self.places()
        return place + stop - start

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(place in the bucket, start, stop) of each piece."""
        place = 0
        for start, stop in self.pieces:
            yield place, start, stop
            place += aligned(stop - start)


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Where every tensor lies in the flat buffer, and the buckets it is sent in; see `buckets`.

    ranges: the buckets of a single sender, one piece each, in order; empty where there are several senders.
    shards: the buckets of several senders, in the order in which they are sent; the bytes of each are its own alone.

    Raises:
        ProtocolError: a tensor lies outside the buffer, or the buckets do not cover it.
    """

    total_bytes: Count
    tensors: Annotated[tuple[TensorEntry, ...], AtMost(MAX_TENSORS)]
    ranges: Ranges = field(metadata={KEY: "buckets"})
    shards: Annotated[tuple[Bucket, ...], AtMost(MAX_TENSORS)] | None = None

    def __post_init__(self) -> None:
        for entry in self.tensors:
            self._check_entry(entry)
        if self.shards is not None and (self.ranges or not all(bucket.table for bucket in self.shards)):
            raise ProtocolError("a layout of several senders has buckets without a sender or without bytes")
        pieces = self.ranges if self.shards is None else sorted(p for bucket in self.shards for p in bucket.pieces)
        position = 0
        for start, stop in pieces:
            if start != position or stop <= start:
                raise ProtocolError(f"bucket [{start}, {stop}) does not continue at byte {position}")
            position = stop
        if position != self.total_bytes:
            raise ProtocolError(f"buckets cover {position} of {self.total_bytes} bytes")

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets in the order in which they are sent, whoever sends them. Digests are in this order."""
        if self.shards is not None:
            return self.shards
        return tuple(Bucket.of(0, (piece,)) for piece in self.ranges)

    @property
    def num_senders(self) -> int:
        """The senders are ranks 0 to this, of which the last has a bucket."""
        return 1 if self.shards is None else 1 + max(bucket.sender for bucket in self.shards)

    @property
    def bucket_bytes(self) -> int:
        """Size of the largest bucket: what one broadcast may carry."""
        return max(bucket.num_bytes for bucket in self.buckets)

    def _check_entry(self, entry: TensorEntry) -> None:
        if entry.dtype not in DTYPE_BYTES:
            raise ProtocolError(f"tensor {entry.name}: dtype {entry.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if any(n < 0 for n in entry.shape) or entry.offset < 0 or entry.offset % ALIGNMENT:
            raise ProtocolError(f"tensor {entry.name}: shape {entry.shape} at offset {entry.offset} is not valid")
        stop = entry.offset + entry.num_bytes
        if stop > self.total_bytes:
            raise ProtocolError(f"tensor {entry.name} ends at byte {stop}, the buffer has {self.total_bytes}")


class DeltaPayload(NamedTuple):
    """The bytes of one sender's delta."""

    num_bytes: Count
    digest: Digest


@dataclass(frozen=True, slots=True)
class DeltaInfo:
    """What a receiver must know of a delta before it comes: see `weights.bytes.delta`.

    Each sender encodes what it sends: there is one payload for each, and they are sent in the order of ranks.

    Raises:
        ProtocolError: no delta can have this size or these pieces.
    """

    base_version: Number  # the policy version it starts from
    num_bytes: Count  # of all payloads
    digest: Digest  # of the payload of a single sender, else 0
    piece_words: Count
    shards: Annotated[tuple[DeltaPayload, ...], AtMost(MAX_TENSORS)] | None = None  # of several senders, by rank

    def __post_init__(self) -> None:
        if self.num_bytes < 0 or self.piece_words < 1:
            raise ProtocolError(f"weight delta of {self.num_bytes} bytes in pieces of {self.piece_words} is not valid")
        if self.shards is not None and sum(payload.num_bytes for payload in self.shards) != self.num_bytes:
            raise ProtocolError(f"weight delta of {self.num_bytes} bytes has payloads of another size together")

    @property
    def payloads(self) -> tuple[DeltaPayload, ...]:
        """One for each sender, in the order of ranks."""
        return (DeltaPayload(self.num_bytes, self.digest),) if self.shards is None else self.shards


@dataclass(frozen=True, slots=True)
class Patch:
    """What completes the tensors of a manifest to a policy: see `weights.bytes.patch`.

    base: (name, digest) of the tensors of the initial model that do not travel; the digest is that of their values
        in float32, in whatever dtype the folder stores them.
    tied: (name, original) of tensors that are tensors of the base under a second name.
    scale: None, or: the manifest carries pairs `X.lora_A.weight` [rank, in] and `X.lora_B.weight` [out, rank], each
        of which folds into the base tensor `X.weight` [out, in], see `weights.bytes.patch.fold_adapter`.
    """

    base: Annotated[tuple[tuple[Label, Digest], ...], AtMost(MAX_TENSORS)]
    tied: Annotated[tuple[tuple[Label, Label], ...], AtMost(MAX_TENSORS)] = ()
    scale: Annotated[float, Within(-1e30, 1e30)] | None = None


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What a weight sync will deliver: policy `version`, its layout, and one digest per bucket.

    Without a `patch` the layout holds the whole policy. With a `delta` the difference to another version travels
    instead of the buckets; the digests are those of the buckets all the same, once it is applied.

    Raises:
        ProtocolError: the digests do not match the buckets in number.
    """

    version: Number
    layout: WeightLayout
    digests: Annotated[tuple[Digest, ...], AtMost(MAX_TENSORS)]
    patch: Patch | None = None
    delta: DeltaInfo | None = None

    def __post_init__(self) -> None:
        if len(self.digests) != len(self.layout.buckets):
            raise ProtocolError(
                f"weight manifest has {len(self.digests)} digests for {len(self.layout.buckets)} buckets"
            )
        if self.delta is not None and len(self.delta.payloads) != self.layout.num_senders:
            raise ProtocolError(
                f"weight delta has {len(self.delta.payloads)} payloads, {self.layout.num_senders} senders have buckets"
            )


@dataclass(frozen=True, slots=True)
class BitsInUse:
    """One worker's comparison of what it computes with, after a swap, with what was staged."""

    version: Number  # whose staged tensors it was compared with
    compared: Count  # parameters
    differing: Annotated[list[Reason], AtMost(32)]  # the first few of them that hold other bits
    # The first few that could not be compared, each with the reason: the canary alone sees them.
    not_compared: Annotated[list[Reason], AtMost(32)]
