"""The learner's copy of its parameters in one flat buffer, from which they are sent while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy

import torch

from asyncrl.link.weight_records import Patch, WeightLayout, WeightManifest
from asyncrl.weights.bytes.digest import digest_buckets
from asyncrl.weights.bytes.layout import new_buffer, plan_buckets, tensor_views
from asyncrl.weights.bytes.patch import AdaptedWeight


class _Copies:
    """What a snapshot copies and where to, worked out once: with many small tensors that takes longer than copying."""

    def __init__(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        layout: WeightLayout,
        buffer: torch.Tensor,
        adapted: Mapping[str, AdaptedWeight],
    ) -> None:
        self._views: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._merged: list[tuple[torch.Tensor, AdaptedWeight]] = []
        # A GPU at either end returns before its copies are done.
        self._gpu = next((tensor.device for tensor in (buffer, named[0][1]) if tensor.is_cuda), None)
        placed: set[int] = set()
        for (name, tensor), (_, view), entry in zip(named, tensor_views(layout, buffer), layout.tensors, strict=True):
            if not entry.num_bytes or entry.offset in placed:
                continue
            placed.add(entry.offset)
            if name in adapted:
                self._merged.append((view, adapted[name]))
            else:
                self._views.append(view)
                self._sources.append(tensor)

    @torch.no_grad()
    def run(self) -> None:
        if self._views:
            torch._foreach_copy_(self._views, self._sources, non_blocking=True)
        for view, weight in self._merged:
            view.copy_(weight.merged(), non_blocking=True)
        if self._gpu is not None:
            # The optimizer changes the source as soon as this returns. This stream alone is waited for: another stream
            # may hold a broadcast that hangs, and the training must not wait for that.
            torch.cuda.current_stream(self._gpu).synchronize()


class SnapshotBuffer:
    """The learner's staging buffer: a copy of its parameters that stays as it is while training goes on.

    Args:
        named: (name, tensor) pairs, read again at every snapshot; see `plan_buckets` on tied parameters.
        bucket_bytes: upper bound of one broadcast.
        wire_dtype: floating-point tensors travel in this dtype; None keeps each tensor's own.
        adapted, patch: see `SyncSource`.
        shared: in memory that the ipc backend sends from without a copy.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        bucket_bytes: int,
        wire_dtype: torch.dtype | None = None,
        *,
        adapted: Mapping[str, AdaptedWeight] | None = None,
        patch: Patch | None = None,
        shared: bool = False,
    ) -> None:
        self._named = list(named)
        self._shared = shared
        self._adapted = adapted
        self._patch = patch
        self.layout = plan_buckets(self._named, bucket_bytes, wire_dtype)
        self._allocate(self._named[0][1].device)

    def twin(self) -> SnapshotBuffer:
        """Another buffer for snapshots of the same parameters."""
        twin = copy(self)
        twin._allocate(self.flat.device)
        return twin

    def _allocate(self, device: torch.device) -> None:
        self.flat = new_buffer(self.layout, device, shared=self._shared)
        self._copies = _Copies(self._named, self.layout, self.flat, self._adapted or {})

    def snapshot(self) -> None:
        """Copy the parameters as they are now. Not while the buffer is being sent."""
        self._copies.run()

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the snapshot without a copy, in the layout's dtypes."""
        return tensor_views(self.layout, self.flat)

    def manifest(self, version: int) -> WeightManifest:
        """What the receivers of this snapshot are told of it, digests included: reads the whole buffer."""
        return WeightManifest(version, self.layout, digest_buckets(self.layout, self.flat), self._patch)

    def buckets(self) -> Iterator[torch.Tensor]:
        """The buffer in the pieces that are broadcast, uint8 each, in order, without a copy."""
        for start, stop in self.layout.buckets:
            yield self.flat[start:stop]
