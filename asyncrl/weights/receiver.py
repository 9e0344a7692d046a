"""The receiving end of a weight channel, in a process that runs a part of a rollout engine. Knows no engine.

A version arrives in a staging buffer of the receiver's own, in a thread beside the engine's loop, and is verified
there. Only the load from staging, which is the engine's affair, needs generation to pause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import BitsInUse, ChannelSpec, WeightManifest
from asyncrl.weights.base_weights import BaseWeights
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.layout import bucket_bytes, tensor_views
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.staging import Staged, receive

log = logging.getLogger("vllm.asyncrl")  # below vLLM's logger, which its processes have configured

NAMED = 8  # changed buckets in a report; damage that is everywhere need not fill a message

PreparedT = TypeVar("PreparedT")  # what an engine makes of a staged version before it is loaded
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


class WeightReceiver(Generic[PreparedT]):
    """One process's membership of a weight channel, and its staging buffer.

    `begin_*` start a job in a thread and return at once; `poll` tells how the newest one goes. `leave` disowns a job
    under way: it fails by its own deadline and touches nothing that later jobs use.

    Args:
        device: where the staging buffer lies.
        base: completes what syncs leave out.
        prepare: does what can be done for a load before the engine pauses; None when nothing can.
        open_channel, measure: how a channel is joined and a bucket's digest measured; other than the defaults where
            faults are injected.
    """

    def __init__(
        self,
        device: torch.device,
        base: BaseWeights,
        prepare: Callable[[WeightManifest, Iterator[tuple[str, torch.Tensor]]], PreparedT | None],
        *,
        open_channel: Callable[[ChannelSpec, torch.device], WeightChannel] = WeightChannel,
        measure: Callable[[torch.Tensor], int] = digest,
    ) -> None:
        self._device = device
        self._base = base
        self._prepare = prepare
        self._open_channel = open_channel
        self._measure = measure
        self._channel: WeightChannel | None = None
        self._job = Job("join", state="done")
        self._held: Staged | None = None  # verified; outlives channels and `staged`, because deltas start from it
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

    def begin_stage(self, manifest: WeightManifest, timeout_s: float) -> None:
        """Receive `manifest` into the staging buffer and verify it.

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
        held, self._held = self._held, None
        self._begin("stage", lambda job: self._stage(channel, manifest, held, timeout_s, job))

    def begin_check(self, compare: Callable[[int, Iterable[tuple[str, torch.Tensor]]], BitsInUse]) -> None:
        """Compare what is in use with what is staged, in the thread: `compare(version, tensors)`. After a load."""
        assert self.staged is not None
        assert self._held is not None
        manifest, buffer = self.staged, self._held.buffer
        tensors = self.tensors()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the thread has a stream of its own

        def work(job: Job) -> None:
            started = time.monotonic()
            found = compare(manifest.version, tensors)
            # What it was compared with has to be what the learner sent, still.
            places = zip(manifest.layout.buckets, manifest.digests, strict=True)
            changed = [
                f"staged bucket {index} (changed since it was verified)"
                for index, (bucket, expected) in enumerate(places)
                if self._measure(bucket_bytes(buffer, bucket)) != expected
            ]
            job.in_use = replace(found, differing=[*found.differing, *changed[:NAMED]])
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
        return self._base.complete(self.staged, tensor_views(self.staged.layout, self._held.buffer))

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
        held: Staged | None,
        timeout_s: float,
        job: Job,
    ) -> None:
        job.total_bytes = manifest.layout.total_bytes if manifest.delta is None else manifest.delta.num_bytes

        def received(num_bytes: int) -> None:
            job.received_bytes += num_bytes

        staged = receive(channel, manifest, held, self._device, timeout_s, job.digests, received, measure=self._measure)
        if self._job is not job:
            return  # disowned: the base may be that of another manifest by now
        started = time.monotonic()
        # After the last bucket: reading a base takes seconds, and the channel's other members must not wait for it.
        self._base.prepare(manifest)
        prepared = self._prepare(manifest, self._base.complete(manifest, tensor_views(manifest.layout, staged.buffer)))
        job.timings_ms = {**staged.timings_ms, "prepare_ms": (time.monotonic() - started) * 1e3}
        with self._lock:
            if self._job is job:
                self._held = staged
                self.staged = manifest
                self.prepared = prepared


def _close(channel: WeightChannel) -> None:
    try:
        channel.close()
    except ChannelError as error:
        # Nobody waits for this thread; what is left behind is one connection of a dead channel.
        log.warning("%s", error)
