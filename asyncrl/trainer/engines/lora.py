"""Low-rank adapters beside frozen weights (LoRA, Hu et al. 2021): put into a model, switched off, merged.

PEFT builds them, under names of its own; outside this module an adapter of `X.weight` is called `X.lora_A.weight` and
`X.lora_B.weight`, as in PEFT's files.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.config import UpdateConfig
from asyncrl.errors import ConfigError
from asyncrl.weights.bytes.patch import LORA_A, LORA_B, WEIGHT, AdaptedWeight

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"  # PEFT's name for the only adapter of a model


def inject_adapters(model: PreTrainedModel, update: UpdateConfig, seed: int) -> None:
    """Puts an adapter beside each linear layer that `update` targets and freezes everything else.

    `seed` draws the first values of A [rank, in]; B [out, rank] is zero, so that nothing changes yet. The global
    random state stays as it is. Raises ConfigError when a target names no linear layer below the head.
    """
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes a second, and only this mode needs it

    config = LoraConfig(
        r=update.lora_rank,
        lora_alpha=update.lora_alpha,  # type: ignore[arg-type]  # declared int; PEFT only divides it by the rank
        target_modules=_targets(model, update.lora_targets),
    )
    with _as_if_on_cpu(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws on the CPU and then moves
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()


@contextlib.contextmanager
def _as_if_on_cpu(model: nn.Module) -> Iterator[None]:
    """Inside, weights of linear layers that are on the meta device are one number on the CPU, seen everywhere.

    PEFT moves what it has drawn to where the weight is; on the meta device it would be lost.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.is_meta]
    weights = [layer.weight for layer in linear]
    for layer, weight in zip(linear, weights, strict=True):
        layer.weight = nn.Parameter(torch.empty((), dtype=weight.dtype).expand(weight.shape))
    try:
        yield
    finally:
        for layer, weight in zip(linear, weights, strict=True):
            layer.weight = weight.requires_grad_(layer.weight.requires_grad)


def adapter_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """(name, layer) of the layers that have an adapter; empty in a model without adapters."""
    candidates = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "base_layer")]
    if not candidates:
        return []
    from peft.tuners.lora import LoraLayer  # here: the import takes a second, and only such models need it

    return [(name, layer) for name, layer in candidates if isinstance(layer, LoraLayer)]


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no adapters. Not while a backward pass runs."""
    layers = [layer for _, layer in adapter_layers(model)]
    assert layers, "the model has no adapters"
    # Not by PEFT's `enable_adapters`, which also changes what requires a gradient: a sharded model takes note of that.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted_weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """The weights that have an adapter, by name; empty without adapters."""
    return {
        f"{name}{WEIGHT}": AdaptedWeight(
            layer.get_base_layer().get_parameter("weight").data,
            layer.lora_A[ADAPTER].get_parameter("weight").data,
            layer.lora_B[ADAPTER].get_parameter("weight").data,
            layer.scaling[ADAPTER],
        )
        for name, layer in adapter_layers(model)
    }


def merged_state(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's state dict as it would be without adapters, each merged into its weight.

    With `dtype`, tensors of a model with adapters, and those of another floating type, are copies on the CPU in that
    type, made one at a time: a second model beside the first may not fit on the device.
    """
    adapted = adapted_weights(model)
    state: dict[str, Tensor] = {}
    for long_name, tensor in model.state_dict().items():
        name = plain_name(long_name)
        if is_adapter(name):
            continue
        value = adapted[name].merged().to(tensor.dtype) if name in adapted else tensor
        if dtype is not None and value.is_floating_point() and (adapted or value.dtype != dtype):
            value = value.to("cpu", dtype)
        state[name] = value
    return state


def plain_name(name: str) -> str:
    """A name inside a model with adapters as it is outside.

    Example: `q_proj.base_layer.weight` -> `q_proj.weight`, `q_proj.lora_A.default.weight` -> `q_proj.lora_A.weight`.
    """
    for half in (".lora_A.", ".lora_B."):
        name = name.replace(f"{half}{ADAPTER}.", half)
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a name of `named_parameters` is one half of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def _targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Names of the linear layers to adapt: all below the head where none is given. Raises ConfigError."""
    head = model.get_output_embeddings()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            nearest = nearest_name(target, sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"update.lora_targets: {target!r} is the name of no linear layer of the model below its head; the "
                f"nearest name is {nearest!r}"
            )
    return list(targets) or layers


def nearest_name(wanted: str, names: list[str]) -> str:
    """The one of `names` that is most like `wanted`, for messages; "(none)" without names."""
    return (difflib.get_close_matches(wanted, names, n=1, cutoff=0.0) or ["(none)"])[0]
