"""What is trained of a model: everything, low-rank adapters beside frozen weights, or parameters by name.

Frozen parameters take no gradient, so they cost no optimizer state, and they are not published: generators have them
in their own copy of the initial model. Names are those of a Hugging Face checkpoint throughout; an adapter of
`X.weight` is `X.lora_A.weight` and `X.lora_B.weight`, as PEFT calls them in its files.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asyncrl.config.schema import UpdateConfig
from asyncrl.errors import ConfigError
from asyncrl.weights.bytes.layout import digest
from asyncrl.weights.bytes.patch import LORA_A, LORA_B, WEIGHT, AdaptedWeight, Patch, SyncSource

ADAPTER = "default"  # PEFT's name for the only adapter of a model


def apply_update(model: PreTrainedModel, update: UpdateConfig, seed: int = 0) -> None:
    """Freezes what `update` does not train, and puts adapters into the model; `seed` draws their first values.

    A fresh adapter changes nothing: its B is zero.

    Raises ConfigError when a pattern or a target names nothing in this model.
    """
    match update.what:
        case "full":
            return
        case "partial":
            selected = select_names([name for name, _ in named_parameters(model)], update.names)
            model.requires_grad_(False)
            for name, parameter in named_parameters(model):
                if name in selected:
                    parameter.requires_grad_(True)
        case "lora":
            _inject_adapters(model, update, _targets(model, update.lora_targets), seed)


def describe_update(update: UpdateConfig) -> str:
    """What of `update` must be the same for a checkpoint to be loaded, in words."""
    if update.what == "lora":
        targets = ", ".join(update.lora_targets) or "all layers"
        return f"lora of rank {update.lora_rank}, alpha {update.lora_alpha:g} on {targets}"
    return f"partial on {', '.join(update.names)}" if update.what == "partial" else update.what


def select_names(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of the shell patterns, case-sensitively.

    Raises ConfigError when there is no pattern, or one that matches nothing.
    """
    names, patterns, selected = list(names), list(patterns), set()
    if not patterns:
        raise ConfigError("update.what=partial needs update.names: the parameters to train, for example model.norm.*")
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"update.names: {pattern!r} matches no parameter of the model; the nearest name is "
                f"{_nearest(pattern, names)!r}"
            )
        selected |= matched
    return selected


def named_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) in a fixed order, adapters included; a tied parameter comes under each of its names."""
    state = model.state_dict(keep_vars=True)
    named = [(plain_name(name), value) for name, value in state.items() if isinstance(value, nn.Parameter)]
    by_name = dict(named)
    for tied, original in (model.all_tied_weights_keys or {}).items():
        if tied not in by_name:
            named.append((tied, by_name[original]))
    return named


def plain_name(name: str) -> str:
    """A name inside a model with adapters as it is outside.

    Example: `q_proj.base_layer.weight` -> `q_proj.weight`, `q_proj.lora_A.default.weight` -> `q_proj.lora_A.weight`.
    """
    for half in (".lora_A.", ".lora_B."):
        name = name.replace(f"{half}{ADAPTER}.", half)
    return name.replace(".base_layer.", ".")


def tensors_of(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
    """The parameters' tensors, one object for tied ones: `parameter.data` is a new object each time it is read, and
    a weight layout knows tied tensors by their identity.
    """
    known: dict[int, Tensor] = {}
    return [(name, known.setdefault(id(parameter), parameter.data)) for name, parameter in named]


def is_adapter(name: str) -> bool:
    """Whether a name of `named_parameters` is one half of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def adapted_weights(model: PreTrainedModel) -> dict[str, AdaptedWeight]:
    """The weights that have an adapter, by name; empty without adapters."""
    return {
        f"{name}{WEIGHT}": AdaptedWeight(
            layer.base_layer.weight.data,
            layer.lora_A[ADAPTER].weight.data,
            layer.lora_B[ADAPTER].weight.data,
            layer.scaling[ADAPTER],
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "base_layer")
    }


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict as it would be without adapters, each merged into its weight."""
    adapted = adapted_weights(model)
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    return {
        name: adapted[name].merged().to(tensor.dtype) if name in adapted else tensor
        for name, tensor in state.items()
        if not is_adapter(name)
    }


@contextlib.contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model computes as if it had no adapters. Not while a backward pass runs."""
    layers = [layer for layer in model.modules() if hasattr(layer, "base_layer")]
    assert layers, "the model has no adapters"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares with `model` every parameter that `model` does not train: only the others take memory."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def frozen_digests(model: PreTrainedModel) -> dict[str, int]:
    """Digest of each parameter that is not trained, by name, a tied one once. Reads them all."""
    seen: set[int] = set()
    digests = {}
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            digests[name] = digest(parameter.data.float().contiguous())
    return digests


def sync_source(model: PreTrainedModel, update: UpdateConfig, frozen: dict[str, int]) -> SyncSource:
    """What is published of a model that `update` was applied to; `frozen` are its `frozen_digests`."""
    if update.what == "full":
        return SyncSource(tensors_of(named_parameters(model)))
    named = tensors_of((name, parameter) for name, parameter in named_parameters(model) if parameter.requires_grad)
    adapted = adapted_weights(model)
    merged = update.what == "lora" and update.lora_sync == "merged"
    if merged:
        named = [(name, weight.weight) for name, weight in adapted.items()]
    carried = {name for name, _ in named}
    patch = Patch(
        base=tuple((name, value) for name, value in frozen.items() if name not in carried),
        tied=tuple((name, original) for name, original in _tied_names(model) if original not in carried),
        scale=update.lora_alpha / update.lora_rank if adapted and not merged else None,
    )
    return SyncSource(named, adapted if merged else {}, patch)


def _tied_names(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(name, first name) of every parameter that has more than one."""
    first: dict[int, str] = {}
    tied = []
    for name, parameter in named_parameters(model):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied.append((name, original))
    return tied


def _targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Names of the linear layers to adapt: all below the head where none is given. Raises ConfigError."""
    head = model.get_output_embeddings()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            nearest = _nearest(target, sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"update.lora_targets: {target!r} is the name of no linear layer of the model below its head; the "
                f"nearest name is {nearest!r}"
            )
    return list(targets) or layers


def _inject_adapters(model: PreTrainedModel, update: UpdateConfig, targets: list[str], seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # here: it takes a second, and only this mode needs it

    config = LoraConfig(r=update.lora_rank, lora_alpha=update.lora_alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws on the CPU and then moves
        inject_adapter_in_model(config, model, ADAPTER)
    model.eval()


def _nearest(wanted: str, names: list[str]) -> str:
    return (difflib.get_close_matches(wanted, names, n=1, cutoff=0.0) or ["(none)"])[0]
