"""The receiving end of a weight channel, in a process that runs a part of a rollout engine. Knows no engine.

A version arrives in a staging buffer of the receiver's own, in a thread beside the engine's loop, and is verified
there. Only the load from staging, which is the engine's affair, needs generation to pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import BitsInUse, ChannelSpec, WeightManifest
from asyncrl.weights.base_weights import BaseWeights
from asyncrl.weights.bytes.boxes import Box, BoxLayout, fits
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import bucket_bytes, new_buffer, scatter_bucket
from asyncrl.weights.channels.base import AHEAD
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.staging import Staged, receive, receive_in_slots

log = logging.getLogger("vllm.asyncrl")  # below vLLM's logger, which its processes have configured

NAMED = 8  # changed buckets in a report; damage that is everywhere need not fill a message

PreparedT = TypeVar("PreparedT")  # what an engine makes of a staged version before it is loaded
PreparedT_co = TypeVar("PreparedT_co", covariant=True)
JobPhase = Literal["join", "stage", "check"]


@dataclass
class Job:
    """Work of the receiver's thread. `state` goes from running to done or failed and stays there."""

    phase: JobPhase
    state: Literal["running", "done", "failed"] = "running"
    error: str = ""
    received_bytes: int = 0
    total_bytes: int = 0
    digests: list[int] = field(default_factory=list)  # measured, one for each bucket
    elapsed_ms: float = 0.0
    timings_ms: dict[str, float] = field(default_factory=dict)  # of its parts
    in_use: BitsInUse | None = None  # what a check found

    def to_dict(self) -> dict[str, Any]:
        """Plain values: fit for the answers of an engine's worker."""
        return asdict(self)


@dataclass
class _Memory:
    """What a job stages into. It belongs to the job until that succeeds: the transport may write to it after a failure.

    held: verified; outlives channels and `staged`, because deltas start from it.
    spare: for the staging buffer where `held` has none that fits.
    slots: through which buckets pass, where slices are kept.
    """

    held: Staged | None = None
    spare: torch.Tensor | None = None
    slots: list[torch.Tensor] = field(default_factory=list)


class Slicing(Protocol[PreparedT_co]):
    """An engine's worker that needs slices of the tensors alone, once it has seen which."""

    def boxes(self) -> Mapping[str, Box] | None:
        """What it needs of each tensor; None while that is not known. The same object while nothing has changed."""
        ...

    def live_are(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """Whether it computes with these slices of `version`, bit for bit. Beside generation."""
        ...

    def prepare_slices(
        self, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]
    ) -> PreparedT_co | None:
        """Makes slices ready to be put in place; None when that is not possible."""
        ...


class WeightReceiver(Generic[PreparedT]):
    """One process's membership of a weight channel, and its staging buffer.

    `begin_*` start a job in a thread and return at once; `poll` tells how the newest one goes. `leave` disowns a job
    under way: it fails by its own deadline and touches nothing that later jobs use.

    Args:
        device: where the staging buffer lies.
        base: completes what syncs leave out.
        prepare: does what can be done for a load before the engine pauses; None when nothing can.
        slicing: of a worker that needs slices of the tensors. Until it has seen which, and where it must have all of a
            version once more, that waits in host memory; else buckets go through a few slots and slices are kept.
        spare: memory for the staging buffer, uint8, made before the engine measured what is free for its cache.
        open_channel, measure: how a channel is joined and a bucket's digest measured; other than the defaults where
            faults are injected.
    """

    def __init__(
        self,
        device: torch.device,
        base: BaseWeights,
        prepare: Callable[[WeightManifest, Iterator[tuple[str, torch.Tensor]]], PreparedT | None],
        *,
        slicing: Slicing[PreparedT] | None = None,
        spare: torch.Tensor | None = None,
        open_channel: Callable[[ChannelSpec, torch.device], WeightChannel] = WeightChannel,
        measure: Callable[[torch.Tensor], int] = digest,
    ) -> None:
        self._device = device
        self._slicing = slicing
        self._memory = _Memory(spare=spare)
        self._proven: Mapping[str, Box] | None = None  # boxes whose slices were compared with whole tensors once
        self._base = base
        self._prepare = prepare
        self._open_channel = open_channel
        self._measure = measure
        self._channel: WeightChannel | None = None
        self._job = Job("join", state="done")
        self._lock = threading.Lock()  # between a job that publishes its result and `leave`
        self.staged: WeightManifest | None = None
        self.prepared: PreparedT | None = None  # reads the buffer, so that it lives no longer than `staged`

    def begin_join(self, spec: ChannelSpec) -> None:
        """Leave the channel joined before, if any, and connect to this one.

        Raises:
            ChannelError: no such backend, or it cannot work on this device.
        """
        self.leave()
        channel = self._channel = self._open_channel(spec, self._device)
        self._begin("join", lambda job: channel.join())

    @property
    def _held(self) -> Staged | None:
        return self._memory.held

    @property
    def holds_slices(self) -> bool:
        """Whether what is staged is a part of the tensors."""
        return self._held is not None and self._held.slices is not None

    @property
    def staging_bytes(self) -> int:
        """Size of what is held."""
        return 0 if self._held is None else self._held.buffer.numel()

    def begin_stage(self, manifest: WeightManifest, timeout_s: float, *, whole: bool = False) -> None:
        """Receive `manifest` into the staging buffer and verify it; `whole`: slices would not do.

        Raises:
            ChannelError: no channel was joined, or another job is still running.
        """
        channel = self._channel
        if channel is None:
            raise ChannelError("stage: this worker is in no weight channel; join one first")
        if self._job.state == "running" and self._job.phase != "check":  # a check is disowned, nobody waits for it
            raise ChannelError("stage: the job before it is still running; leave the channel first")
        self.staged = None
        self.prepared = None
        # The job owns the buffer until it succeeds: after a failure the transport may still write to it.
        given, self._memory = self._memory, _Memory()
        boxes = None if whole else self._boxes_for(manifest)
        self._begin("stage", lambda job: self._stage(channel, manifest, given, boxes, timeout_s, job))

    def begin_check(self, compare: Callable[[int, Iterable[tuple[str, torch.Tensor]]], BitsInUse]) -> None:
        """Compare what is in use with what is staged, in the thread: `compare(version, tensors)`. After a load."""
        assert self.staged is not None
        assert self._held is not None
        manifest, held = self.staged, self._held
        tensors = self.tensors()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the thread has a stream of its own

        def work(job: Job) -> None:
            started = time.monotonic()
            found = compare(manifest.version, tensors)
            # What it was compared with has to be what the learner sent, still.
            changed = held.changed(manifest, self._measure)
            job.in_use = replace(found, differing=[*found.differing, *changed[:NAMED]])
            if not job.in_use.differing:
                self._drop_what_is_not_needed(held, manifest, job)
            job.timings_ms = {"check_ms": (time.monotonic() - started) * 1e3}

        self._begin("check", work)

    def refuse(self, phase: JobPhase, error: Exception) -> None:
        """Notes that a job could not even begin: `poll` tells of it as of one that failed."""
        self._job = Job(phase, state="failed", error=f"{type(error).__name__}: {error}")

    def poll(self) -> Job:
        """The newest job."""
        return self._job

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The staged policy under its checkpoint names: without a copy, but for weights that an adapter changes."""
        assert self.staged is not None and self._held is not None
        return self._base.complete(self.staged, self._held.tensors())

    def leave(self) -> None:
        """Disconnect and drop what is staged."""
        with self._lock:
            self.staged = None
            self.prepared = None
            self._job = Job("join", state="done")
            channel, self._channel = self._channel, None
        if channel is not None:
            # Closing breaks off what is under way and may then wait until a deadline: the engine must not wait for it.
            threading.Thread(target=_close, args=(channel,), name="asyncrl: close channel", daemon=True).start()

    def _begin(self, phase: JobPhase, work: Callable[[Job], None]) -> None:
        job = self._job = Job(phase)

        def run() -> None:
            started = time.monotonic()
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a new thread's is that of rank 0
                work(job)
            except Exception as error:  # noqa: BLE001 - whatever it is becomes the job's state, which the engine reads
                job.error = f"{type(error).__name__}: {error}"
            job.elapsed_ms = (time.monotonic() - started) * 1e3
            job.state = "failed" if job.error else "done"  # last: a reader that sees it may read the rest

        threading.Thread(target=run, name=f"asyncrl: {phase} weights", daemon=True).start()

    def _stage(
        self,
        channel: WeightChannel,
        manifest: WeightManifest,
        given: _Memory,
        boxes: Mapping[str, Box] | None,
        timeout_s: float,
        job: Job,
    ) -> None:
        job.total_bytes = manifest.layout.total_bytes if manifest.delta is None else manifest.delta.num_bytes
        if manifest.patch is not None:
            given.spare = None  # for the base, which comes on top of what is staged

        def received(num_bytes: int) -> None:
            job.received_bytes += num_bytes

        staged = self._receive(channel, manifest, given, boxes, timeout_s, job, received)
        if self._job is not job:
            return  # disowned: the base may be that of another manifest by now
        started = time.monotonic()
        # After the last bucket: reading a base takes seconds, and the channel's other members must not wait for it.
        self._base.prepare(manifest)
        prepare = self._prepare
        if boxes is not None:
            assert self._slicing is not None
            prepare = self._slicing.prepare_slices
        prepared = prepare(manifest, self._base.complete(manifest, staged.tensors()))
        job.timings_ms = {**staged.timings_ms, "prepare_ms": (time.monotonic() - started) * 1e3}
        with self._lock:
            if self._job is job:
                self._memory = replace(given, held=staged)
                self.staged = manifest
                self.prepared = prepared
        if boxes is not None and prepared is None:
            self._proven = None  # the next one comes whole
            raise ChannelError(f"version {manifest.version} was staged in slices, which cannot be put in place")

    def _receive(
        self,
        channel: WeightChannel,
        manifest: WeightManifest,
        given: _Memory,
        boxes: Mapping[str, Box] | None,
        timeout_s: float,
        job: Job,
        received: Callable[[int], None],
    ) -> Staged:
        layout, measure = manifest.layout, self._measure
        if self._slicing is None or manifest.delta is not None or manifest.patch is not None:
            return receive(
                channel, manifest, given.held, self._device, timeout_s, job.digests, received,
                measure=measure, spare=given.spare,
            )  # fmt: skip
        given.slots = _slots(given.slots, layout.bucket_bytes, self._device)
        slices = None if boxes is None else BoxLayout(layout, boxes)
        if slices is None:
            buffer = new_buffer(layout, "cpu")
            take = partial(scatter_bucket, buffer)
        else:
            buffer = self._room_for(slices, given)
            take = partial(slices.scatter, buffer)
        timings_ms = receive_in_slots(
            channel, manifest, given.slots, take, timeout_s, job.digests, received, measure=measure
        )
        proofs = {} if slices is None else slices.digests(buffer)
        return Staged(manifest.version, layout, buffer, timings_ms, slices, proofs)

    def _room_for(self, slices: BoxLayout, given: _Memory) -> torch.Tensor:
        if given.held is not None and given.held.slices and given.held.buffer.numel() == slices.num_bytes:
            return given.held.buffer
        if given.spare is not None and given.spare.numel() >= slices.num_bytes:
            return given.spare[: slices.num_bytes]
        return torch.empty(slices.num_bytes, dtype=torch.uint8, device=self._device)

    def _boxes_for(self, manifest: WeightManifest) -> Mapping[str, Box] | None:
        """What to keep of this version; None = all of it."""
        boxes = None if self._slicing is None or manifest.patch is not None else self._slicing.boxes()
        known = boxes is not None and boxes is self._proven and fits(boxes, manifest.layout)
        return boxes if known and manifest.delta is None else None

    def _drop_what_is_not_needed(self, held: Staged, manifest: WeightManifest, job: Job) -> None:
        """After a load of a whole version that was compared: from now on slices are enough, if they give the same."""
        if self._slicing is None or held.slices is not None or manifest.patch is not None:
            return
        boxes = self._slicing.boxes()
        if boxes is None or not fits(boxes, manifest.layout):
            return
        slices = BoxLayout(manifest.layout, boxes)
        buffer = torch.empty(slices.num_bytes, dtype=torch.uint8)
        for bucket in manifest.layout.buckets:
            slices.scatter(buffer, bucket, bucket_bytes(held.buffer, bucket))
        if not self._slicing.live_are(manifest.version, slices.views(buffer)):
            log.warning("staging: whole versions. What this worker needs of them was not told right")
            return
        log.info("staging: %d of %d bytes of each version are kept", slices.num_bytes, manifest.layout.total_bytes)
        with self._lock:
            self._proven = boxes
            if self._job is job:
                self._memory.held = None  # no delta starts from slices


def _slots(known: list[torch.Tensor], num_bytes: int, device: torch.device) -> list[torch.Tensor]:
    if known and known[0].numel() >= num_bytes:
        return known
    return [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(AHEAD)]


def _close(channel: WeightChannel) -> None:
    try:
        channel.close()
    except ChannelError as error:
        # Nobody waits for this thread; what is left behind is one connection of a dead channel.
        log.warning("%s", error)
