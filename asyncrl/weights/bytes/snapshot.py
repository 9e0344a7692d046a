"""A rank's copy of the parameters that it sends in one buffer, from which they are sent while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy

import torch

from asyncrl.link.weight_records import Patch, WeightManifest, aligned
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import Run, new_buffer, runs_of, tensor_views, torch_dtype
from asyncrl.weights.bytes.patch import AdaptedWeight
from asyncrl.weights.bytes.shards import local_of, plan_shards, rows_of


class _Copies:
    """What a snapshot copies and where to, worked out once: with many small tensors that takes longer than copying."""

    def __init__(
        self,
        named: Sequence[tuple[str, torch.Tensor]],
        runs: Sequence[Run],
        buffer: torch.Tensor,
        adapted: Mapping[str, AdaptedWeight],
    ) -> None:
        self._views: list[torch.Tensor] = []
        self._sources: list[tuple[torch.Tensor, slice]] = []  # and which of the rows that are here
        self._merged: list[tuple[torch.Tensor, AdaptedWeight]] = []
        # A GPU at either end returns before its copies are done.
        self._gpu = next((tensor.device for tensor in (buffer, named[0][1]) if tensor.is_cuda), None)
        tensors = dict(named)
        for run in runs:
            name, tensor = run.entry.name, tensors[run.entry.name]
            raw = buffer[run.local : run.local + run.stop - run.start]
            rows = rows_of(tensor, run)
            view = raw.view(torch_dtype(run.entry)).view(_rows_here(tensor, rows).shape)
            if name in adapted:
                self._merged.append((view, adapted[name]))
            else:
                self._views.append(view)
                self._sources.append((tensor, rows))

    @torch.no_grad()
    def run(self) -> None:
        if self._views:
            torch._foreach_copy_(self._views, [_rows_here(*source) for source in self._sources], non_blocking=True)
        for view, weight in self._merged:
            view.copy_(weight.merged(), non_blocking=True)
        if self._gpu is not None:
            # The optimizer changes the source as soon as this returns. This stream alone is waited for: another stream
            # may hold a broadcast that hangs, and the training must not wait for that.
            torch.cuda.current_stream(self._gpu).synchronize()


def _rows_here(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    held = local_of(tensor)
    return held[rows] if held.dim() else held


class SnapshotBuffer:
    """A sender's staging buffer: a copy of the parameters that it sends, which stays while training goes on.

    Args:
        named: (name, tensor) pairs, read again at every snapshot; see `plan_buckets` on tied parameters. The same names
            on every sender; of a DTensor the buffer takes the rows that are sent from here.
        bucket_bytes: upper bound of one broadcast.
        wire_dtype: floating-point tensors travel in this dtype; None keeps each tensor's own.
        adapted, patch: see `SyncSource`.
        shared: in memory that the ipc backend sends from without a copy.
        sender, senders: which of how many ranks this is that hold the policy together.
        device: of the buffer; None = that of the first tensor.
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
        sender: int = 0,
        senders: int = 1,
        device: torch.device | None = None,
    ) -> None:
        assert senders == 1 or not adapted, "adapters are merged from whole weights"
        self._named = list(named)
        self._shared = shared
        self._adapted = adapted
        self._patch = patch
        self.sender = sender
        self.layout = plan_shards(self._named, bucket_bytes, wire_dtype, senders)
        self._own = [bucket for bucket in self.layout.buckets if bucket.sender == sender]
        self._runs = list(runs_of(self.layout, sender))
        self._allocate(device or self._named[0][1].device)

    def twin(self) -> SnapshotBuffer:
        """Another buffer for snapshots of the same parameters."""
        twin = copy(self)
        twin._allocate(self.flat.device)
        return twin

    def _allocate(self, device: torch.device) -> None:
        self.flat = new_buffer(self.layout, device, shared=self._shared, sender=self.sender)
        if self.flat.is_cuda:
            # Made in the publisher's thread, on a stream of its own; the training fills it from another.
            torch.cuda.current_stream(self.flat.device).synchronize()
        self._copies = _Copies(self._named, self._runs, self.flat, self._adapted or {})

    def snapshot(self) -> None:
        """Copy the parameters as they are now. Not while the buffer is being sent."""
        self._copies.run()

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of a single sender's snapshot without a copy, in the layout's dtypes."""
        return tensor_views(self.layout, self.flat)

    def digests(self) -> list[int]:
        """Those of the buckets that are sent from here, in order: reads the whole buffer."""
        return [digest(bucket) for bucket in self.buckets()]

    def manifest(self, version: int, digests: Sequence[Sequence[int]] | None = None) -> WeightManifest:
        """What the receivers of this snapshot are told of it.

        `digests` are those of each sender, by rank; a single sender's are measured here where they are not given.
        """
        of_sender = [iter(own) for own in digests or [self.digests()]]
        in_order = tuple(next(of_sender[bucket.sender]) for bucket in self.layout.buckets)
        return WeightManifest(version, self.layout, in_order, self._patch)

    def buckets(self) -> Iterator[torch.Tensor]:
        """The buffer in the pieces that are broadcast from here, uint8 each, in order, without a copy."""
        place = 0
        for bucket in self._own:
            yield self.flat[place : place + bucket.num_bytes]
            place += aligned(bucket.num_bytes)
