"""A worker's staging buffer: how a version gets into it, whole or as a delta, and what proves that it did.

A buffer outlives the sync that filled it, because the next delta starts from what it holds. So there is one buffer: a
delta travels in memory of its own, is verified there, and only then changes the buffer in place. Whatever goes wrong
before that leaves the base as it was; what goes wrong after it is found by the digests of the buckets, and the buffer
counts for nothing. Knows nothing of vLLM.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from asyncrl.errors import WeightGroupError
from asyncrl.transport.weight_delta import apply_delta
from asyncrl.transport.weight_group import WeightGroup, WeightLayout, WeightManifest, digest


@dataclass(frozen=True, slots=True)
class Staged:
    """A staging buffer whose bytes were verified to be `version`."""

    version: int
    layout: WeightLayout
    buffer: torch.Tensor  # uint8 [layout.total_bytes]


def receive(
    group: WeightGroup,
    manifest: WeightManifest,
    held: Staged | None,
    device: torch.device,
    timeout_s: float,
    digests: list[int],
) -> Staged:
    """Receives `manifest` into the buffer of `held`, or into a new one, and verifies every bucket.

    The caller gives `held` away: after a failure the transport may still write to its buffer.

    Args:
        digests: takes what was measured, bucket by bucket.

    Raises:
        WeightGroupError: the group failed; bytes were damaged; a delta starts from a version that is not held.
        ProtocolError: a delta does not fit the layout.
    """
    deadline = time.monotonic() + timeout_s
    layout = manifest.layout
    if manifest.delta is not None:
        buffer = _receive_delta(group, manifest, held, device, deadline)
    elif held is not None and held.buffer.numel() == layout.total_bytes:
        buffer = held.buffer
    else:
        buffer = layout.new_buffer(device)
    for index, ((start, stop), expected) in enumerate(zip(layout.buckets, manifest.digests, strict=True)):
        bucket = buffer[start:stop]
        if manifest.delta is None:
            group.broadcast(bucket, deadline - time.monotonic())
        measured = digest(bucket)
        digests.append(measured)
        if measured != expected:
            raise WeightGroupError(
                f"bucket {index} of version {manifest.version}: digest {measured}, the manifest says {expected}; "
                + _suspects(manifest)
            )
    return Staged(manifest.version, layout, buffer)


def _receive_delta(
    group: WeightGroup, manifest: WeightManifest, held: Staged | None, device: torch.device, deadline: float
) -> torch.Tensor:
    delta, layout = manifest.delta, manifest.layout
    assert delta is not None
    if held is None or held.version != delta.base_version or held.layout != layout:
        holds = "nothing" if held is None else f"version {held.version}"
        raise WeightGroupError(
            f"version {manifest.version} comes as a delta to version {delta.base_version}, staging holds {holds}; "
            "it must be sent whole"
        )
    payload = torch.empty(delta.num_bytes, dtype=torch.uint8, device=device)
    for part in payload.split(layout.bucket_bytes):
        group.broadcast(part, deadline - time.monotonic())
    apply_delta(layout, held.buffer, delta, payload)
    return held.buffer


def _suspects(manifest: WeightManifest) -> str:
    if manifest.delta is None:
        return "the bytes were damaged on the way or changed while they were sent"
    return f"version {manifest.delta.base_version}, to which a delta was applied, had changed since it was staged"
