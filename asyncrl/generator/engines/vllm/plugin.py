"""The weight receiver inside every vLLM worker process.

vLLM loads `register` in each of its processes (entry point group `vllm.general_plugins`), so the receiver
exists on every tensor-parallel rank. Weights arrive in a staging buffer of the worker's own, in a thread
beside the engine's loop, and are verified there. Only the load from staging needs the engine to pause.

`WeightWorkerExtension` adds methods with return values to vLLM's worker class; `collective_rpc` calls them by
name. Arguments and results are plain dicts, numbers and strings, so vLLM's pickle fallback stays switched
off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.errors import ChannelError, EngineError
from asyncrl.generator.engines.vllm.direct_apply import DirectApply, PreparedCopy
from asyncrl.generator.engines.vllm.options import follow_parent
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import ChannelSpec, WeightManifest
from asyncrl.weights.base_weights import BaseWeights, complete_names
from asyncrl.weights.bytes.layout import tensor_views
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.staging import Staged, receive

log = logging.getLogger("vllm.asyncrl")  # below vLLM's logger, which its processes have configured

BACKEND = "asyncrl"
EXTENSION = "asyncrl.generator.engines.vllm.plugin.WeightWorkerExtension"


def register() -> None:
    """Entry point of the vLLM plug-in: make the staged receiver known. Called once or more per process."""
    follow_parent()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StagedWeightTransferEngine)


@dataclass
class Job:
    """Work of the receiver's thread. `state` goes from running to done or failed and stays there."""

    phase: str  # "join" or "stage"
    state: str = "running"
    error: str = ""
    received_bytes: int = 0
    total_bytes: int = 0
    digests: list[int] = field(default_factory=list)
    elapsed_ms: float = 0.0
    timings_ms: dict[str, float] = field(default_factory=dict)  # of its parts

    def to_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "state": self.state,
            "error": self.error,
            "received_bytes": self.received_bytes,
            "total_bytes": self.total_bytes,
            "digests": self.digests,
            "elapsed_ms": self.elapsed_ms,
            "timings_ms": self.timings_ms,
        }


class WeightReceiver:
    """One worker's membership of a weight channel, and its staging buffer. Knows nothing of vLLM.

    `begin_*` start a job in a thread and return at once; `poll` tells how the newest one goes. `leave`
    disowns a job under way: it fails by its own deadline and touches nothing that later jobs use.
    """

    def __init__(
        self,
        device: torch.device,
        base: BaseWeights,
        prepare: Callable[[WeightManifest, Iterator[tuple[str, torch.Tensor]]], PreparedCopy | None],
    ) -> None:
        """`base` completes what syncs leave out; `prepare` does what can be done for a swap before it."""
        self._device = device
        self._base = base
        self._prepare = prepare
        self._group: WeightChannel | None = None
        self._job = Job("join", state="done")
        self._held: Staged | None = None  # verified; outlives groups and `staged`, because deltas start from it
        self._lock = threading.Lock()  # between a job that publishes its result and `leave`
        self.staged: WeightManifest | None = None
        self.prepared: PreparedCopy | None = None  # reads the buffer, so that it lives no longer than `staged`

    def begin_join(self, spec: ChannelSpec) -> None:
        """Connect to a group, leaving the one before."""
        self.leave()
        group = self._group = WeightChannel(spec, self._device)
        self._begin("join", lambda job: group.join())

    def begin_stage(self, manifest: WeightManifest, timeout_s: float) -> None:
        """Receive `manifest` into the staging buffer and verify it."""
        group = self._group
        if group is None:
            raise ChannelError("stage: this worker is in no weight channel; join one first")
        if self._job.state == "running":
            raise ChannelError("stage: the job before it is still running; leave the group first")
        self.staged = self.prepared = None
        # The job owns the buffer until it succeeds: after a failure the transport may still write to it.
        held, self._held = self._held, None
        self._begin("stage", lambda job: self._stage(group, manifest, held, timeout_s, job))

    def refuse(self, phase: str, error: Exception) -> None:
        """A job that could not even begin."""
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
            self.staged = self.prepared = None
            self._job = Job("join", state="done")
            group, self._group = self._group, None
        if group is not None:
            # It breaks off what is under way and may then wait for a deadline of its own: the engine must not.
            threading.Thread(target=_close, args=(group,), name="asyncrl: close group", daemon=True).start()

    def _begin(self, name: str, work: Callable[[Job], None]) -> None:
        job = self._job = Job(name)

        def run() -> None:
            started = time.monotonic()
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a new thread's is that of rank 0
                work(job)
            except Exception as error:  # noqa: BLE001 - becomes the job's state, which the engine reads
                job.error = f"{type(error).__name__}: {error}"
            job.elapsed_ms = (time.monotonic() - started) * 1e3
            job.state = "failed" if job.error else "done"  # last: whoever sees it may read the rest

        threading.Thread(target=run, name=f"asyncrl: {name} weights", daemon=True).start()

    def _stage(
        self,
        group: WeightChannel,
        manifest: WeightManifest,
        held: Staged | None,
        timeout_s: float,
        job: Job,
    ) -> None:
        job.total_bytes = manifest.layout.total_bytes if manifest.delta is None else manifest.delta.num_bytes

        def received(num_bytes: int) -> None:
            job.received_bytes += num_bytes

        held = receive(group, manifest, held, self._device, timeout_s, job.digests, received)
        if self._job is not job:
            return  # disowned: the base may be that of another manifest by now
        started = time.monotonic()
        # After the last bucket: reading a base takes seconds, and the group's other members must not wait for it.
        self._base.prepare(manifest)
        prepared = self._prepare(manifest, self._base.complete(manifest, tensor_views(manifest.layout, held.buffer)))
        job.timings_ms = {**held.timings_ms, "prepare_ms": (time.monotonic() - started) * 1e3}
        with self._lock:
            if self._job is job:
                self._held, self.staged, self.prepared = held, manifest, prepared


def _close(group: WeightChannel) -> None:
    try:
        group.close()
    except ChannelError as error:
        # Nobody waits for this thread; what is left behind is one connection of a dead group.
        log.warning("%s", error)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """vLLM's dict for `init_transfer_engine`: a ChannelSpec."""

    spec: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """vLLM's dict for `receive_weights`: which staged version to load."""

    version: int


class StagedWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's weight transfer engine over a `WeightReceiver`: what vLLM calls receiving is a load from
    staging.

    The first version goes through vLLM's layerwise reload, as a checkpoint would: on CPUs the matrices are packed after
    each load, and for tensor parallelism each rank cuts its shard out of the full tensors. What comes later is copied
    to where that reload put it, see `direct_apply`; where that is not possible it is reloaded too.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.direct = DirectApply(model)
        base = BaseWeights(vllm_config.model_config.model, device)
        self.receiver = WeightReceiver(device, base, self.direct.prepare)
        self._reloading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.receiver.begin_join(from_plain(ChannelSpec, init_info.spec))

    @property
    def reloading(self) -> bool:
        """Whether the update under way is a reload."""
        return self._reloading

    def start_weight_update(self) -> None:
        if self.direct.usable(self.receiver.prepared):
            return
        self._reloading = True
        self.direct.begin()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        staged = self._staged(update_info.version)
        if not self._reloading:
            prepared = self.receiver.prepared
            assert prepared is not None
            self.direct.apply(prepared, staged)
            return
        loaded = self.direct.load(self.model.load_weights, self.receiver.tensors())
        missing = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - loaded
        missing |= self._missing_parts(complete_names(staged))
        if missing:
            raise EngineError(
                f"version {staged.version} does not carry {sorted(missing)[:5]} ({len(missing)} in all): send "
                "every parameter under all its names, tied ones too"
            )

    def _staged(self, version: int) -> WeightManifest:
        staged = self.receiver.staged
        if staged is None or staged.version != version:
            held = None if staged is None else staged.version
            raise EngineError(f"version {version} is not staged; staged is {held}")
        return staged

    def _missing_parts(self, names: set[str]) -> set[str]:
        """Parameters that vLLM keeps fused with one that was sent (q, k, v) and that were not sent
        themselves.

        vLLM counts a fused parameter as loaded when one part of it came, and leaves the rest uninitialised.
        """
        missing = set()
        for parts in getattr(self.model, "packed_modules_mapping", {}).values():
            for part in parts:
                for name in names:
                    if f".{part}." in name:
                        missing |= {name.replace(f".{part}.", f".{other}.") for other in parts} - names
        return missing

    def finish_weight_update(self) -> None:
        if self._reloading:
            self._end_reload()
            staged = self.receiver.staged
            assert staged is not None
            self.direct.end(staged, self.receiver.tensors())
        self.receiver.prepared = None  # in place, or of no use

    def recover(self) -> None:
        """After a failed load: give every layer its tensors back. Their values are a mixture, their shapes
        are right.

        Without it the layers stay on the meta device, and the next load would count the pieces of this one.
        """
        self.direct.failed()
        self.receiver.prepared = None
        if self._reloading:
            try:
                self._end_reload()  # once more, if it was this that failed
            finally:
                self._reloading = False

    def _end_reload(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = False

    def shutdown(self) -> None:
        self.receiver.leave()


class WeightWorkerExtension:
    """Methods added to vLLM's worker class. All return at once except `asyncrl_swap`, which loads.

    None raises: vLLM stops reading at the first worker that did, and takes what the next ones answered for their
    answers to the next call. A failure is a state of the job, or in what `asyncrl_swap` returns.
    """

    weight_transfer_engine: StagedWeightTransferEngine
    rank: int
    _weight_update_active: bool  # vLLM's

    def asyncrl_join(self, spec: dict[str, Any]) -> None:
        """Begin to join a weight channel. `spec` is that of the engine's first worker."""
        try:
            first = from_plain(ChannelSpec, spec)
            self.init_weight_transfer_engine({"spec": to_plain(first.for_rank(first.rank + self.rank))})  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - see above
            self.weight_transfer_engine.receiver.refuse("join", error)

    def asyncrl_stage(self, manifest: dict[str, Any], timeout_s: float) -> None:
        """Begin to receive a version into staging."""
        receiver = self.weight_transfer_engine.receiver
        try:
            receiver.begin_stage(from_plain(WeightManifest, manifest), timeout_s)
        except Exception as error:  # noqa: BLE001 - see above
            receiver.refuse("stage", error)

    def asyncrl_poll(self) -> dict[str, Any]:
        """How the newest join or stage goes: a `Job` as a dict."""
        return self.weight_transfer_engine.receiver.poll().to_dict()

    def asyncrl_swap(self, version: int, reload: bool) -> dict[str, Any]:
        """Load the staged version; with `reload` not by copying it in place. Generation must be paused."""
        started = time.monotonic()
        try:
            if reload:
                self.weight_transfer_engine.recover()
            self.start_weight_update()  # type: ignore[attr-defined]
            apply = "reload" if self.weight_transfer_engine.reloading else "direct"
            self.update_weights({"version": version})  # type: ignore[attr-defined]
            self.finish_weight_update()  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - any failure here is the state "tainted"
            return {"error": f"{type(error).__name__}: {error}{self._recover()}", "apply_ms": 0.0, "apply": ""}
        return {"error": "", "apply_ms": (time.monotonic() - started) * 1e3, "apply": apply}

    def _recover(self) -> str:
        """Makes the next load possible; empty, or why it may not be."""
        self._weight_update_active = False  # a failing `finish_weight_update` leaves it, and every later start refuses
        try:
            self.weight_transfer_engine.recover()
        except Exception as error:  # noqa: BLE001 - as above
            return f"; and the layers could not be put back: {type(error).__name__}: {error}"
        return ""

    def asyncrl_staged_version(self) -> int | None:
        """The version that a swap would load."""
        staged = self.weight_transfer_engine.receiver.staged
        return None if staged is None else staged.version

    def asyncrl_leave(self) -> None:
        """Leave the weight channel and drop what is staged."""
        self.weight_transfer_engine.receiver.leave()
