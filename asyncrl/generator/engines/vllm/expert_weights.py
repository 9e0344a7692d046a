"""Experts of a mixture, which vLLM's CPU kernel keeps in a layout of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from asyncrl.generator.engines.vllm.load_recorder import Loaded


@dataclass(slots=True)
class Experts:
    """One weight of all experts of a layer, [experts, out, in], and the kernel's name for its layout."""

    weight: Loaded
    isa: str

    @classmethod
    def of(cls, loaded: Loaded) -> Experts | None:
        """None for a parameter that is kept otherwise."""
        kernel = _kernel(loaded.module)
        if kernel is None or loaded.tensor.dim() != 3 or loaded.live.shape != loaded.tensor.shape:
            return None
        return cls(loaded, kernel.isa)

    @property
    def live(self) -> torch.Tensor:
        """What the kernel reads."""
        return self.weight.live

    def kept(self, weight: torch.Tensor) -> torch.Tensor:
        """What vLLM keeps for this weight, in memory of its own."""
        from vllm._custom_ops import cpu_prepack_moe_weight

        return cpu_prepack_moe_weight(weight, self.isa)


def forget_kernels(model: torch.nn.Module) -> None:
    """To be called before a reload: vLLM lays experts out for a CPU kernel only where a layer has no kernel yet.

    With one it copies the weights as they come to where the kernel looks for its own layout, and computes nonsense.
    """
    for layer in model.modules():
        if _kernel(layer) is not None:
            method: Any = layer.quant_method
            method.moe_kernel = None


def aliases(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    """(name, identity) of every parameter under every path to it; a layer that is reached by two has two names.

    Two layers that share one parameter (a tied head) are not one: each may keep a copy, and each must be loaded.
    """
    for path, layer in model.named_modules(remove_duplicate=False):
        for name, _ in layer.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, (id(layer), name)


def _kernel(layer: torch.nn.Module) -> Any:
    """The CPU kernel of a layer of experts that needs a layout of its own; None for any other layer."""
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if getattr(experts, "_use_zentorch", True):  # no such kernel, or one that takes weights as they are
        return None
    return experts if isinstance(getattr(experts, "isa", None), str) else None
