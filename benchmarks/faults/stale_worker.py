"""A worker of the real vLLM that can be told to leave one thing old in the next swap. Runs in the engine's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from asyncrl.generator.engines.vllm.packed_weights import PACKED
from asyncrl.generator.engines.vllm.plugin import StagedWeightTransferEngine, WeightWorkerExtension, receive_with

PutBack = Callable[[], bool]  # puts an old value back; False if it is the new one, so that nothing would be old


class StaleTransferEngine(StagedWeightTransferEngine):
    """Puts one old value back between a swap and the comparison of what is in use."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stale_index: int | None = None
        self.told = ""
        self._put_back: tuple[str, PutBack] | None = None

    def start_weight_update(self) -> None:
        """Remembers what is to stay."""
        self._put_back = None
        if self.stale_index is not None:
            places = list(places_of(self.model))
            label, remember = places[self.stale_index % len(places)]
            self._put_back = label, remember()
            self.stale_index = None
        super().start_weight_update()

    def begin_check(self) -> None:
        """Puts it back."""
        self.told = ""
        if self._put_back is not None:
            label, put_back = self._put_back
            self.told = label if put_back() else ""
        super().begin_check()


def places_of(model: torch.nn.Module) -> list[tuple[str, Callable[[], PutBack]]]:
    """All that the model computes with: packed weights first, then parameters with elements."""
    places: list[tuple[str, Callable[[], PutBack]]] = []
    for path, layer in model.named_modules():
        if PACKED in vars(layer):
            places.append((f"{path}.weight", lambda layer=layer: _packed(layer)))  # type: ignore[misc]
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.numel():
                places.append((f"{path}.{name}", lambda layer=layer, name=name: _plain(layer, name)))  # type: ignore[misc]
    return places


def _packed(layer: torch.nn.Module) -> PutBack:
    old = vars(layer)[PACKED]
    columns = getattr(layer, "input_size_per_partition", None) or getattr(layer, "embedding_dim", 0)
    dtype = next(parameter.dtype for parameter in layer.parameters(recurse=False))
    probe = torch.eye(columns, dtype=dtype)
    before = old(probe, layer.weight, None)

    def put_back() -> bool:
        if torch.equal(before, vars(layer)[PACKED](probe, layer.weight, None)):
            return False
        setattr(layer, PACKED, old)
        return True

    return put_back


def _plain(layer: torch.nn.Module, name: str) -> PutBack:
    old = getattr(layer, name).detach().clone()

    def put_back() -> bool:
        live = getattr(layer, name)
        if torch.equal(live, old):
            return False
        live.data.copy_(old)
        return True

    return put_back


receive_with(StaleTransferEngine)


class StaleWorker(WeightWorkerExtension):
    """The orders."""

    weight_transfer_engine: StaleTransferEngine

    def stale_next(self, index: int) -> str:
        """The next swap leaves one thing old; `index` chooses which."""
        self.weight_transfer_engine.stale_index = index
        return ""

    def stale_told(self) -> str:
        """What the last swap left old; empty if it is the same in both versions."""
        return self.weight_transfer_engine.told
