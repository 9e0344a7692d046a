"""vLLM's plug-in: a weight receiver inside every worker process, and the load from its staging buffer.

vLLM loads `register` in each of its processes (entry point group `vllm.general_plugins`), so the receiver exists on
every tensor-parallel rank. How weights arrive is told in `weights.receiver`; how they get into the model, here.

`WeightWorkerExtension` adds methods with return values to vLLM's worker class; `collective_rpc` calls them by name.
Arguments and results are plain dicts, numbers and strings, so that vLLM's pickle fallback stays switched off.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.errors import EngineError
from asyncrl.generator.engines.vllm.direct_apply import DirectApply, PreparedCopy
from asyncrl.generator.engines.vllm.expert_weights import aliases, forget_kernels
from asyncrl.generator.engines.vllm.options import follow_parent
from asyncrl.host.model_folder import find_model
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.weight_records import ChannelSpec, WeightManifest, aligned
from asyncrl.weights.base_weights import BaseWeights, complete_names
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.receiver import WeightReceiver

log = logging.getLogger("vllm.asyncrl")

BACKEND = "asyncrl"
EXTENSION = "asyncrl.generator.engines.vllm.plugin.WeightWorkerExtension"


def register() -> None:
    """Entry point of the vLLM plug-in: make the staged receiver known. Called once or more per process."""
    follow_parent()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StagedWeightTransferEngine)


def receive_with(transfer_engine: type[StagedWeightTransferEngine]) -> None:
    """Makes the workers of this process receive with `transfer_engine` from now on.

    A worker extension of one's own (`VLLMEngine(worker_extension=...)`) calls it when its module is imported, which
    is before the worker makes its transfer engine.
    """
    WeightTransferEngineFactory._registry.pop(BACKEND, None)
    WeightTransferEngineFactory.register_engine(BACKEND, transfer_engine)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """vLLM's dict for `init_transfer_engine`: a ChannelSpec."""

    spec: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """vLLM's dict for `receive_weights`: which staged version to load."""

    version: int


class StagedWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM's weight transfer engine over a `WeightReceiver`: what vLLM calls receiving is a load from staging.

    The first version goes through vLLM's layerwise reload, as a checkpoint would: on CPUs the matrices are packed after
    each load, and for tensor parallelism each rank cuts its shard out of the full tensors. What comes later is copied
    to where that reload put it, see `direct_apply`; where that is not possible it is reloaded too.

    vLLM gives the first four arguments; for the others see `WeightReceiver`.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
        *,
        open_channel: Callable[[ChannelSpec, torch.device], WeightChannel] = WeightChannel,
        measure: Callable[[torch.Tensor], int] = digest,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.direct = DirectApply(model)
        sliced = vllm_config.parallel_config.tensor_parallel_size > 1
        self.receiver: WeightReceiver[PreparedCopy] = WeightReceiver(
            device,
            BaseWeights(vllm_config.model_config.model, device),
            self.direct.prepare,
            slicing=self.direct if sliced else None,
            spare=_staging_memory(vllm_config, model, device),
            open_channel=open_channel,
            measure=measure,
        )
        self._reloading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Begin to join a weight channel; returns at once."""
        self.receiver.begin_join(from_plain(ChannelSpec, init_info.spec))

    @property
    def reloading(self) -> bool:
        """Whether the update under way is a reload."""
        return self._reloading

    def start_weight_update(self) -> None:
        """Begin to load what is staged: a reload, unless it can be copied in place."""
        if self.direct.usable(self.receiver.prepared):
            return
        if self.receiver.holds_slices:
            raise EngineError("slices are staged, and a reload needs whole tensors; stage all of the version")
        self._reloading = True
        self.direct.begin()
        forget_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load what is staged.

        Raises:
            EngineError: another version is staged, or it lacks parameters of the model.
        """
        staged = self._staged(update_info.version)
        if not self._reloading:
            prepared = self.receiver.prepared
            assert prepared is not None
            self.direct.apply(prepared, staged)
            return
        model: Any = self.model  # every model of vLLM's loads weights; nn.Module does not say so
        loaded = self.direct.load(model.load_weights, self.receiver.tensors())
        names = dict(aliases(self.model))
        written = {names[name] for name in loaded if name in names}
        missing = {name for name, parameter in names.items() if parameter not in written}
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
        """Parameters that vLLM keeps fused with one that was sent (q, k, v) and that were not sent themselves.

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
        """End a load; after a reload, plan how later versions can be copied in place."""
        if self._reloading:
            self._end_reload()
            staged = self.receiver.staged
            assert staged is not None
            self.direct.end(staged, _Again(self.receiver.tensors))
        self.receiver.prepared = None  # in place, or of no use

    def begin_check(self) -> None:
        """Begin to compare what is in use with what is staged. After a load; what takes long runs beside generation."""
        self.direct.read_packed()
        self.receiver.begin_check(self.direct.report)

    def recover(self) -> None:
        """After a failed load: give every layer its tensors back. Their values are a mixture, their shapes are right.

        Without it the layers stay on the meta device, and the next load would count the pieces of this one.
        """
        self.direct.failed()
        self.receiver.prepared = None
        if self._reloading:
            try:
                self._end_reload()  # once more, if the failure was in here
            finally:
                self._reloading = False

    def _end_reload(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = False

    def shutdown(self) -> None:
        """Leave the weight channel."""
        self.receiver.leave()


def _staging_memory(vllm_config: VllmConfig, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Room for a version, or for this worker's slices of it: made here, vLLM's profile counts it.

    vLLM makes the transfer engine when the model is loaded, and gives what is then left to the KV cache.
    """
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM has resolved it by now"
    workers = vllm_config.parallel_config.tensor_parallel_size
    shapes = find_model(vllm_config.model_config.model).shapes().values()
    # What has one dimension, as norms, every worker needs whole; of the rest each has its part, some of it replicated.
    sizes = [math.prod(shape) * dtype.itemsize // (workers if len(shape) > 1 else 1) for shape in shapes]
    num_bytes = sum(map(aligned, sizes))
    if workers > 1:
        num_bytes = max(num_bytes, sum(aligned(parameter.nbytes) for parameter in model.parameters()))
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # of both devices
        raise EngineError(
            f"there is no room for the staging buffer of {num_bytes / 2**30:.2f} GiB beside the weights on {device}: "
            f"{str(error).splitlines()[0]}; raise generator.tensor_parallel_size, or take a device with more memory"
        ) from error
    log.info("staging: %d bytes are reserved", num_bytes)
    return memory


class _Again:
    """Tensors that can be gone through more than once; they are made anew each time."""

    def __init__(self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._tensors()


class WeightWorkerExtension:
    """Methods added to vLLM's worker class. All return at once except `asyncrl_swap`, which loads.

    None raises: vLLM stops reading at the first worker that did, and takes what the next ones answered for their
    answers to the next call. So whatever fails, also by an error of our own or of vLLM's, becomes the state of the job
    or a part of what `asyncrl_swap` returns, and excepts here are broad.
    """

    weight_transfer_engine: StagedWeightTransferEngine
    rank: int
    _weight_update_active: bool  # vLLM's

    def asyncrl_join(self, spec: dict[str, Any]) -> None:
        """Begin to join a weight channel. `spec` is that of the engine's first worker."""
        try:
            first = from_plain(ChannelSpec, spec)
            self.init_weight_transfer_engine({"spec": to_plain(first.for_rank(first.rank + self.rank))})  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - no method raises, see the class
            self.weight_transfer_engine.receiver.refuse("join", error)

    def asyncrl_stage(self, manifest: dict[str, Any], timeout_s: float, whole: bool) -> None:
        """Begin to receive a version into staging; `whole`: it will be reloaded."""
        receiver = self.weight_transfer_engine.receiver
        try:
            receiver.begin_stage(from_plain(WeightManifest, manifest), timeout_s, whole=whole)
        except Exception as error:  # noqa: BLE001 - no method raises, see the class
            receiver.refuse("stage", error)

    def asyncrl_poll(self) -> dict[str, Any]:
        """How the newest join, stage or check goes: a `Job` as a dict."""
        return self.weight_transfer_engine.receiver.poll().to_dict()

    def asyncrl_swap(self, version: int, reload: bool) -> dict[str, Any]:
        """Load the staged version; with `reload` not by copying it in place. Generation must be paused.

        Begins to compare what is in use then; `asyncrl_poll` tells what came of it.
        """
        started = time.monotonic()
        try:
            if reload:
                self.weight_transfer_engine.recover()
            self.start_weight_update()  # type: ignore[attr-defined]
            apply = "reload" if self.weight_transfer_engine.reloading else "direct"
            self.update_weights({"version": version})  # type: ignore[attr-defined]
            self.finish_weight_update()  # type: ignore[attr-defined]
            self.weight_transfer_engine.begin_check()
        except Exception as error:  # noqa: BLE001 - as above; the engine takes it for tainted
            return {"error": f"{type(error).__name__}: {error}{self._recover()}", "apply_ms": 0.0, "apply": ""}
        return {"error": "", "apply_ms": (time.monotonic() - started) * 1e3, "apply": apply}

    def _recover(self) -> str:
        """Makes the next load possible; empty, or why it may not be."""
        self._weight_update_active = False  # a failing `finish_weight_update` leaves it, and every later start refuses
        try:
            self.weight_transfer_engine.recover()
        except Exception as error:  # noqa: BLE001 - as above, and the first error is told too
            return f"; and the layers could not be put back: {type(error).__name__}: {error}"
        return ""

    def asyncrl_staging_bytes(self) -> int:
        """Size of what is staged here."""
        return self.weight_transfer_engine.receiver.staging_bytes

    def asyncrl_staged_version(self) -> int | None:
        """The version that a swap would load."""
        staged = self.weight_transfer_engine.receiver.staged
        return None if staged is None else staged.version

    def asyncrl_leave(self) -> None:
        """Leave the weight channel and drop what is staged."""
        self.weight_transfer_engine.receiver.leave()
