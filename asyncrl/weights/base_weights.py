"""The part of a policy that does not travel: tensors of the initial model, kept beside the engine's own weights.

Every generator has the initial model's folder. When syncs carry only what is trained, a worker reads the rest from
there once, proves by digests that the learner froze the same values, and completes each sync with them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from asyncrl.errors import ModelError, ProtocolError
from asyncrl.host.model_folder import find_model
from asyncrl.link.weight_records import Patch, WeightManifest
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.patch import LORA_A, LORA_B, WEIGHT, fold_adapter

log = logging.getLogger("vllm.asyncrl")


class BaseWeights:
    """Tensors of one model folder on `device`, in the dtype they are stored in. Nothing is read before `prepare`."""

    def __init__(self, model_path: str, device: torch.device) -> None:
        self._model_path = model_path
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}
        self._verified: Patch | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}  # of every tensor in the folder, once it was looked at
        self._lock = threading.Lock()  # a job that was disowned may still be reading

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def prepare(self, manifest: WeightManifest) -> None:
        """Makes ready what completes `manifest`: reads it the first time, drops it when the manifest is complete.

        Raises:
            ProtocolError: the manifest carries a tensor that the model does not have, or has in another shape.
            ModelError: the folder lacks a tensor that is not sent, or holds other values than the learner.
        """
        patch = manifest.patch
        with self._lock:
            if patch is None:
                self._tensors, self._verified = {}, None
                return
            self._shapes = self._shapes or self._read_shapes()
            _check_carried(manifest, patch, self._shapes)
            if self._verified is None or self._verified.base != patch.base:
                self._tensors, self._verified = {}, None  # old and new need not fit into memory at once
                self._tensors = self._read(patch)
                log.info("%d bytes of the initial model stay here and are not sent", self.num_bytes)
            self._verified = patch

    def complete(
        self, manifest: WeightManifest, received: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the whole policy: the base, what was `received`, adapters folded in. After `prepare`.

        They come in the order of names, so that the tensors of a layer come together, and a folded weight lives no
        longer than its layer needs it.
        """
        patch, staged = manifest.patch, dict(received)
        if patch is None:
            yield from staged.items()
            return
        tied = dict(patch.tied)
        for name in sorted(complete_names(manifest)):
            original = tied.get(name, name)
            stem = original.removesuffix(WEIGHT)
            if original not in self._tensors:
                yield name, staged[original]
            elif patch.scale is not None and stem + LORA_A in staged:
                yield (
                    name,
                    fold_adapter(self._tensors[original], staged[stem + LORA_A], staged[stem + LORA_B], patch.scale),
                )
            else:
                yield name, self._tensors[original]

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, from the files' headers alone."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in find_model(self._model_path).weight_files:
            with _opened(path) as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes

    def _read(self, patch: Patch) -> dict[str, torch.Tensor]:
        wanted = dict(patch.base)
        tensors: dict[str, torch.Tensor] = {}
        for path in find_model(self._model_path).weight_files:
            with _opened(path, str(self._device)) as file:
                # clone: the file's pages may change under us when somebody copies another model over it.
                tensors |= {name: file.get_tensor(name).clone() for name in file.keys() if name in wanted}  # noqa: SIM118
        missing = sorted(wanted.keys() - tensors.keys())
        if missing:
            raise ModelError(
                f"model.path={self._model_path} lacks {len(missing)} tensors that the learner does not send, "
                f"{missing[0]} first; copy the learner's model folder again"
            )
        for name, expected in patch.base:
            if digest(tensors[name].float().contiguous()) != expected:
                raise ModelError(
                    f"model.path={self._model_path}: {name} has other values than in the learner's model, and it is "
                    "not sent because it is not trained; copy the learner's model folder"
                )
        return tensors


def complete_names(manifest: WeightManifest) -> set[str]:
    """Names of the whole policy that a manifest gives once it is completed."""
    names = {entry.name for entry in manifest.layout.tensors}
    patch = manifest.patch
    if patch is None:
        return names
    if patch.scale is not None:
        names = {name for name in names if not name.endswith((LORA_A, LORA_B))}
    return names | {name for name, _ in patch.base} | {name for name, _ in patch.tied}


def _check_carried(manifest: WeightManifest, patch: Patch, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ProtocolError unless every tensor of the manifest has its place in the model."""
    base = {name for name, _ in patch.base}
    for name, original in patch.tied:
        if original not in base:
            raise ProtocolError(f"weight patch: {name} is tied to {original}, which is not among the tensors that stay")
    is_half = (LORA_A, LORA_B) if patch.scale is not None else ()
    halves = {entry.name: entry.shape for entry in manifest.layout.tensors if entry.name.endswith(is_half)}
    for stem in sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in halves}):
        if stem + WEIGHT not in base or stem + WEIGHT not in shapes:
            raise ProtocolError(f"weight patch: {stem}{WEIGHT} has an adapter and is not among the tensors that stay")
        _check_adapter(stem, halves, shapes[stem + WEIGHT])
    entries = [entry for entry in manifest.layout.tensors if entry.name not in halves]
    # A tied tensor is known under one of its names, and both lie in one place.
    known_at = {entry.offset: shapes[entry.name] for entry in entries if entry.name in shapes}
    for entry in entries:
        shape = shapes.get(entry.name) or known_at.get(entry.offset)
        if shape is None:
            raise ProtocolError(f"weight patch: the model has no tensor {entry.name}, which the learner sends")
        if entry.shape != shape:
            raise ProtocolError(f"weight patch: the learner sends {entry.name} as {entry.shape}, the model has {shape}")


def _check_adapter(stem: str, halves: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> None:
    for suffix in (LORA_A, LORA_B):
        if stem + suffix not in halves:
            raise ProtocolError(f"weight patch: an adapter comes without {stem}{suffix}")
    lora_a, lora_b = halves[stem + LORA_A], halves[stem + LORA_B]
    if (len(lora_a), len(lora_b)) != (2, 2) or (lora_b[0], lora_a[1]) != shape or lora_b[1] != lora_a[0]:
        raise ProtocolError(f"weight patch: {stem}{WEIGHT} is {shape}, its adapter {lora_b} times {lora_a}")


def _opened(path: Path, device: str = "cpu") -> safe_open:
    try:
        return safe_open(path, framework="pt", device=device)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}; copy the model again") from error
