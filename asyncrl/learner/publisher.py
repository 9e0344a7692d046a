"""Takes snapshots of the policy and broadcasts them, in a thread beside the training loop.

Two flat staging buffers: the *offered* one may be on the wire at any moment, the *fresh* one takes the next snapshot.
The training loop pays for one memory copy and the canary's forward pass; it never waits for the network. When steps
are faster than syncs, a fresh snapshot that was never offered is overwritten by the next: the newest policy wins.

Order matters in one place: a buffer changes its role only in `_offer_fresh`, under the lock, and only after the desk
said that no round uses the offered one (`SnapshotReleased`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
        with self._lock:
            if not self._offered_free or self._fresh.version is None:
                return
            self._fresh, self._offered = self._offered, self._fresh
            self._fresh.version = None
            self._offered_free = False
        # Outside the lock: digests take as long as reading the buffer, and the training loop may want to snapshot.
        slot = self._offered
        assert slot.version is not None and slot.canary_logprobs is not None
        manifest = slot.buffer.manifest(slot.version)
        canary = [tokens.tobytes() for tokens in self._canary]
        link.send(SnapshotReady(slot.version, manifest.to_dict(), canary, slot.canary_logprobs, slot.snapshot_ms))

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
            num_bytes = self._send_buckets(request)
        except AsyncRLError as failure:
            error = str(failure)
            self._drop_group()  # a collective that failed once cannot be trusted again
        elapsed_ms = (time.monotonic() - started) * 1e3
        return BroadcastDone(request.version, request.attempt, request.group_epoch, error, elapsed_ms, num_bytes)

    def _send_buckets(self, request: Broadcast) -> int:
        if self._group is None or self._group_epoch != request.group_epoch:
            raise AsyncRLError(f"group {request.group_epoch} is not open")
        if self._offered.version != request.version:
            raise AsyncRLError(f"version {request.version} was replaced by {self._offered.version}")
        self._offered_free = False  # a joiner may ask for a snapshot that was released but not replaced yet
        deadline = time.monotonic() + request.timeout_s
        self._group.join(request.timeout_s)
        num_bytes = 0
        for bucket in self._offered.buffer.buckets():
            self._group.broadcast(bucket, max(0.0, deadline - time.monotonic()))
            num_bytes += bucket.numel() * bucket.element_size()
        return num_bytes

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
