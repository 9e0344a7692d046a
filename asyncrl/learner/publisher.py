"""Takes snapshots of the policy and broadcasts them, in a thread beside the training loop.

Flat staging buffers: the *offered* one may be on the wire at any moment, the *fresh* one takes the next snapshot. The
training loop pays for one memory copy and the canary's forward pass; it never waits for the network. When steps are
faster than syncs, a fresh snapshot that was never offered is overwritten by the next: the newest policy wins.

A third one, the *base*, keeps what was sent last, so that the next version can go out as the difference to it. It is
made when a sample of both says for the first time that a delta would pay: a run whose weights all change at every step
(float32 on the wire, high learning rates) has two buffers for ever. Each is as large as the policy in its wire dtype.

Order matters in one place: a buffer changes its role only in `_rotate`, under the lock, and only after the desk said
that no round uses the offered one (`SnapshotReleased`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from asyncrl.errors import AsyncRLError
from asyncrl.transport.messages import (
    Broadcast,
    BroadcastDone,
    GroupReady,
    Message,
    OpenGroup,
    SnapshotReady,
    SnapshotReleased,
)
from asyncrl.transport.trainer_link import TrainerLink
from asyncrl.transport.weight_delta import Delta, delta_pays, encode_delta
from asyncrl.transport.weight_group import SnapshotBuffer, WeightGroup, WeightGroupSpec
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE

log = logging.getLogger(__name__)

IDLE_WAIT_S = 5.0


@dataclass(slots=True)
class _Slot:
    """One staging buffer and what it holds."""

    buffer: SnapshotBuffer
    version: int | None = None
    canary_logprobs: list[bytes] | None = None
    snapshot_ms: float = 0.0
    sent: bool = False  # whole or as a delta, to at least one group


class Publisher(threading.Thread):
    """Rank 0's side of the weight plane. The training loop calls `publish`, everything else runs in the thread."""

    def __init__(
        self,
        desk_address: str,
        buffers: tuple[SnapshotBuffer, SnapshotBuffer],
        canary: list[np.ndarray],
        score: Callable[[list[list[int]]], list[np.ndarray]],
        *,
        host: str,
        backend: str,
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        self._desk_address = desk_address
        self._fresh, self._offered = _Slot(buffers[0]), _Slot(buffers[1])
        self._base: _Slot | None = None  # what `_offered` was compared with, or will be if it is not sent
        self._spare: _Slot | None = None  # memory of a third buffer without a role at present
        self._delta: Delta | None = None  # from `_base` to `_offered`
        self._encode_ms = 0.0
        self._offered_free = True
        self._canary = [tokens.astype(TOKEN_DTYPE) for tokens in canary]
        self._score = score
        self._host = host
        self._backend = backend
        self._group: WeightGroup | None = None
        self._group_epoch = -1
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = threading.Event()
        self.crash: BaseException | None = None

    def publish(self, version: int) -> float:
        """Snapshots the parameters as `version`. Returns the milliseconds the training loop was held up."""
        started = time.monotonic()
        logprobs = self._score([tokens.tolist() for tokens in self._canary])
        with self._lock:
            self._fresh.buffer.snapshot()
            self._fresh.version = version
            self._fresh.canary_logprobs = [row.astype(LOGPROB_DTYPE).tobytes() for row in logprobs]
            self._fresh.snapshot_ms = (time.monotonic() - started) * 1e3
            held_up_ms = self._fresh.snapshot_ms
        os.eventfd_write(self._wake, 1)
        return held_up_ms

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; a broadcast under way is aborted."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        if self._group:
            self._group.abort()
        self.join(timeout_s)

    def run(self) -> None:
        try:
            link = TrainerLink(self._desk_address, wake_fd=self._wake)  # here: a socket belongs to one thread
            while not self._stopping.is_set():
                self._offer_fresh(link)
                if (message := link.receive(IDLE_WAIT_S)) is not None:
                    self._handle(link, message)
            link.close()
        except BaseException as error:
            self.crash = error
            log.exception("publisher thread died")

    def _offer_fresh(self, link: TrainerLink) -> None:
        if not self._rotate():
            return
        # Outside the lock: digests take as long as reading the buffer, and the training loop may want to snapshot.
        slot = self._offered
        assert slot.version is not None and slot.canary_logprobs is not None
        manifest = slot.buffer.manifest(slot.version)
        self._encode()
        canary = [tokens.tobytes() for tokens in self._canary]
        delta = None if self._delta is None else self._delta.info.to_dict()
        ready = SnapshotReady(slot.version, manifest.to_dict(), canary, slot.canary_logprobs, slot.snapshot_ms, delta)
        link.send(ready)

    def _rotate(self) -> bool:
        """Makes the fresh snapshot the offered one, if there is one and the offered one is free."""
        sent = self._offered if self._offered.sent else self._base
        with self._lock:
            if not self._offered_free or self._fresh.version is None:
                return False
            pays = sent is not None and delta_pays(sent.buffer.layout, sent.buffer.flat, self._fresh.buffer.flat)
        if pays and self._base is None and self._spare is None:
            # Not under the lock: filling it with zeros takes as long as a snapshot, which may have to go on.
            self._spare = _Slot(self._fresh.buffer.twin())
        with self._lock:
            free = [slot for slot in (self._offered, self._base, self._spare) if slot is not None]
            self._base = sent if pays else None
            free = [slot for slot in free if slot is not self._base]
            self._offered, self._fresh = self._fresh, free[0]
            self._spare = free[1] if len(free) > 1 else None
            self._fresh.version, self._fresh.sent = None, False
            self._offered_free = False
        return True

    def _encode(self) -> None:
        """The difference from base to offered; none where there is no base or it is no smaller than half of all."""
        self._delta, self._encode_ms = None, 0.0
        if self._base is None:
            return
        started = time.monotonic()
        old, new = self._base, self._offered
        assert old.version is not None
        self._delta = encode_delta(new.buffer.layout, old.buffer.flat, new.buffer.flat, old.version)
        self._encode_ms = (time.monotonic() - started) * 1e3

    def _handle(self, link: TrainerLink, message: Message) -> None:
        match message:
            case SnapshotReleased():
                if message.version == self._offered.version:
                    self._offered_free = True
            case OpenGroup():
                link.send(self._open(message))
            case Broadcast():
                link.send(self._broadcast(message))
            case _:
                log.warning("publisher got an unexpected %s", type(message).__name__)

    def _open(self, request: OpenGroup) -> GroupReady:
        self._drop_group()
        spec = WeightGroupSpec(
            store_host=self._host,
            store_port=0,
            prefix=request.prefix,
            rank=0,
            world_size=request.world_size,
            backend=self._backend,
            timeout_s=request.timeout_s,
        )
        try:
            self._group = WeightGroup.host(spec)
        except (AsyncRLError, OSError) as error:
            return GroupReady(request.group_epoch, self._host, 0, str(error), self._backend)
        self._group_epoch = request.group_epoch
        return GroupReady(request.group_epoch, self._host, self._group.store_port, "", self._backend)

    def _broadcast(self, request: Broadcast) -> BroadcastDone:
        started = time.monotonic()
        error, num_bytes = "", 0
        try:
            num_bytes = self._send(request)
        except AsyncRLError as failure:
            error = str(failure)
            self._drop_group()  # a collective that failed once cannot be trusted again
        return BroadcastDone(
            request.version,
            request.attempt,
            request.group_epoch,
            error,
            (time.monotonic() - started) * 1e3,
            num_bytes,
            self._offered.buffer.layout.total_bytes,
            self._encode_ms,
        )

    def _send(self, request: Broadcast) -> int:
        """Returns the number of bytes sent."""
        if self._group is None or self._group_epoch != request.group_epoch:
            raise AsyncRLError(f"group {request.group_epoch} is not open")
        if self._offered.version != request.version:
            raise AsyncRLError(f"version {request.version} was replaced by {self._offered.version}")
        parts = self._parts(request.base_version)
        self._offered_free = False  # a joiner may ask for a snapshot that was released but not replaced yet
        deadline = time.monotonic() + request.timeout_s
        self._group.join(request.timeout_s)
        num_bytes = 0
        for part in parts:
            self._group.broadcast(part, max(0.0, deadline - time.monotonic()))
            num_bytes += part.nbytes
        self._offered.sent = True
        return num_bytes

    def _parts(self, base_version: int | None) -> Iterable[torch.Tensor]:
        """What is broadcast, in order."""
        buffer = self._offered.buffer
        if base_version is None:
            return buffer.buckets()
        if self._delta is None or self._delta.info.base_version != base_version:
            raise AsyncRLError(f"there is no delta from version {base_version} to {self._offered.version}")
        return self._delta.payload.split(buffer.layout.bucket_bytes)

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
