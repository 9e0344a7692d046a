"""A worker's staging buffer: how a version gets into it, whole or as a delta, and what proves that it did.

A buffer outlives the sync that filled it, because the next delta starts from what it holds. So there is one buffer: a
delta travels in memory of its own, is verified there, and only then changes the buffer in place. Whatever goes wrong
before that leaves the base as it was; what goes wrong after it is found by the digests of the buckets, and the buffer
counts for nothing.

A worker that needs slices of the tensors takes them out of buckets that pass through a few slots. A bucket is proven
there, as it was sent; what the slices hold is proven later on by digests that were taken when they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import Bucket, WeightLayout, WeightManifest
from asyncrl.weights.bytes.boxes import BoxLayout
from asyncrl.weights.bytes.delta import apply_delta, delta_parts
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import bucket_bytes, new_buffer, scatter_bucket, tensor_views
from asyncrl.weights.channels.channel import WeightChannel


@dataclass(frozen=True, slots=True)
class Staged:
    """A staging buffer whose bytes were verified to be `version`."""

    version: int
    layout: WeightLayout
    buffer: torch.Tensor  # uint8 [layout.total_bytes], or that of `slices`
    timings_ms: dict[str, float] = field(default_factory=dict)  # of its receipt: receive_ms, decode_ms, verify_ms
    slices: BoxLayout | None = None  # what of the tensors is held; None = all of them
    slice_digests: dict[str, int] = field(default_factory=dict)  # of each tensor's slices, right after they came

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, what is held of the tensor), without a copy."""
        return tensor_views(self.layout, self.buffer) if self.slices is None else self.slices.views(self.buffer)

    def changed(self, manifest: WeightManifest, measure: Callable[[torch.Tensor], int]) -> list[str]:
        """What holds other bytes now than when it was verified, in words."""
        if self.slices is not None:
            now = self.slices.digests(self.buffer)
            changed = [f"slices of {name}" for name, expected in self.slice_digests.items() if now[name] != expected]
        else:
            places = enumerate(zip(manifest.layout.buckets, manifest.digests, strict=True))
            changed = [
                f"bucket {index}"
                for index, (bucket, expected) in places
                if measure(bucket_bytes(self.buffer, bucket)) != expected
            ]
        return [f"staged {what} (changed since it was verified)" for what in changed]


def receive(
    channel: WeightChannel,
    manifest: WeightManifest,
    held: Staged | None,
    device: torch.device,
    timeout_s: float,
    digests: list[int],
    on_received: Callable[[int], None] = lambda num_bytes: None,
    *,
    measure: Callable[[torch.Tensor], int] = digest,
    spare: torch.Tensor | None = None,
) -> Staged:
    """Receives `manifest` into the buffer of `held`, or into another one, and verifies every bucket.

    The caller gives `held` away: after a failure the transport may still write to its buffer.

    Args:
        channel: joined; brings the bytes.
        manifest: what the sync promises.
        held: what the buffer holds before; a delta starts from it.
        device: where a new buffer lies.
        timeout_s: bounds the transfer.
        digests: takes what was measured, bucket by bucket.
        on_received: is told the bytes of each part that has come, so that a failure can say how far it was.
        measure: the digest of a bucket.
        spare: memory, uint8, for a buffer where `held` has none that fits; None = new memory.

    Raises:
        ChannelError: the channel failed; bytes were damaged; a delta starts from a version that is not held.
        ProtocolError: a delta does not fit the layout.
    """
    deadline = time.monotonic() + timeout_s
    timings_ms: dict[str, float] = {}
    layout, delta = manifest.layout, manifest.delta
    if delta is not None:
        buffer = _base_of(manifest, held)
        payloads = [torch.empty(each.num_bytes, dtype=torch.uint8, device=device) for each in delta.payloads]
        with _timed(timings_ms, "receive_ms"):
            parts, senders = delta_parts(payloads, layout.bucket_bytes)
            channel.broadcast(parts, deadline - time.monotonic(), on_received, senders)
        with _timed(timings_ms, "decode_ms"):
            apply_delta(layout, buffer, delta, [payload.to(buffer.device) for payload in payloads])
    else:
        if held is not None and held.slices is None and held.buffer.numel() == layout.total_bytes:
            buffer = held.buffer
        elif spare is not None and spare.numel() >= layout.total_bytes:
            buffer = spare[: layout.total_bytes]
        else:
            buffer = new_buffer(layout, device)
        with _timed(timings_ms, "receive_ms"):
            parts = [_room_for(bucket, buffer) for bucket in layout.buckets]
            senders = [bucket.sender for bucket in layout.buckets]
            channel.broadcast(parts, deadline - time.monotonic(), on_received, senders)
            for bucket, part in zip(layout.buckets, parts, strict=True):
                if len(bucket.pieces) > 1:
                    scatter_bucket(buffer, bucket, part)
    # Not bucket by bucket on the way: the sender and all other members would wait for it.
    with _timed(timings_ms, "verify_ms"):
        _verify(manifest, buffer, digests, measure)
    return Staged(manifest.version, layout, buffer, timings_ms)


def receive_in_slots(
    channel: WeightChannel,
    manifest: WeightManifest,
    slots: Sequence[torch.Tensor],
    take: Callable[[Bucket, torch.Tensor], None],
    timeout_s: float,
    digests: list[int],
    on_received: Callable[[int], None],
    *,
    measure: Callable[[torch.Tensor], int] = digest,
) -> dict[str, float]:
    """Receives `manifest` bucket by bucket through a few slots, verifies each and has it taken out of its slot.

    slots: AHEAD of them, uint8 [layout.bucket_bytes] each. The transport writes to a slot again only after `take` has
        returned (`Transport.broadcast`); AHEAD - 1 buckets are on their way meanwhile.
    take(bucket, its bytes): runs in the transport's thread, for buckets that are as the manifest says.
    For the others, and what is raised, see `receive`. Returns timings in ms.
    """
    buckets = manifest.layout.buckets
    parts = [slots[index % len(slots)][: bucket.num_bytes] for index, bucket in enumerate(buckets)]
    problems: list[str] = []
    spent = {"verify_ms": 0.0, "decode_ms": 0.0}

    def arrived(num_bytes: int) -> None:
        index = len(digests)
        started = time.monotonic()
        digests.append(measure(parts[index]))
        verified = time.monotonic()
        if digests[index] == manifest.digests[index]:
            take(buckets[index], parts[index])
        else:
            # Said when all have come: who left in the middle would break the channel for the others.
            problems.append(_mismatch(manifest, index, digests[index]))
        spent["verify_ms"] += (verified - started) * 1e3
        spent["decode_ms"] += (time.monotonic() - verified) * 1e3
        on_received(num_bytes)

    timings_ms: dict[str, float] = {}
    with _timed(timings_ms, "receive_ms"):
        channel.broadcast(parts, timeout_s, arrived, [bucket.sender for bucket in buckets])
    if problems:
        raise ChannelError(problems[0])
    return {"receive_ms": timings_ms["receive_ms"] - sum(spent.values()), **spent}


@contextmanager
def _timed(timings_ms: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    timings_ms[name] = (time.monotonic() - started) * 1e3


def _room_for(bucket: Bucket, buffer: torch.Tensor) -> torch.Tensor:
    """Where a bucket arrives: at its place in the buffer where it has one, else beside it."""
    if len(bucket.pieces) == 1:
        return bucket_bytes(buffer, bucket)
    return torch.empty(bucket.num_bytes, dtype=torch.uint8, device=buffer.device)


def _base_of(manifest: WeightManifest, held: Staged | None) -> torch.Tensor:
    """The buffer that the delta of `manifest` changes. Raises ChannelError when it does not hold the base."""
    delta = manifest.delta
    assert delta is not None
    if held is None or held.version != delta.base_version or held.layout != manifest.layout or held.slices:
        holds = "nothing" if held is None else f"{'slices of ' if held.slices else ''}version {held.version}"
        raise ChannelError(
            f"version {manifest.version} comes as a delta to version {delta.base_version}, staging holds {holds}; "
            "it must be sent whole"
        )
    return held.buffer


def _verify(
    manifest: WeightManifest, buffer: torch.Tensor, digests: list[int], measure: Callable[[torch.Tensor], int]
) -> None:
    for index, (bucket, expected) in enumerate(zip(manifest.layout.buckets, manifest.digests, strict=True)):
        measured = measure(bucket_bytes(buffer, bucket))
        digests.append(measured)
        if measured != expected:
            raise ChannelError(_mismatch(manifest, index, measured))


def _mismatch(manifest: WeightManifest, index: int, measured: int) -> str:
    told = f"digest {measured}, the manifest says {manifest.digests[index]}"
    return f"bucket {index} of version {manifest.version}: {told}; {_suspects(manifest)}"


def _suspects(manifest: WeightManifest) -> str:
    if manifest.delta is None:
        return "the bytes were damaged on the way or changed while they were sent"
    return f"version {manifest.delta.base_version}, to which a delta was applied, had changed since it was staged"
