"""What is trained of a model: everything, low-rank adapters beside frozen weights, or parameters by name.

Frozen parameters take no gradient, so they cost no optimizer state, and they are not published: generators have them
in their own copy of the initial model. Names are those of a Hugging Face checkpoint throughout; an adapter of
`X.weight` is `X.lora_A.weight` and `X.lora_B.weight`, as PEFT calls them in its files.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from asyncrl.config import UpdateConfig
from asyncrl.errors import ConfigError
from asyncrl.link.weight_records import Patch
from asyncrl.trainer.engines.lora import adapted_weights, inject_adapters, nearest_name, plain_name
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.patch import SyncSource

log = logging.getLogger(__name__)


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
            _check_names_of_files(model, selected)
            model.requires_grad_(False)
            for name, parameter in named_parameters(model):
                if name in selected:
                    parameter.requires_grad_(True)
        case "lora":
            inject_adapters(model, update, seed)
            _tell_of_experts(model)


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
    names = list(names)
    patterns = list(patterns)
    if not patterns:
        raise ConfigError("update.what=partial needs update.names: the parameters to train, for example model.norm.*")
    selected: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"update.names: {pattern!r} matches no parameter of the model; the nearest name is "
                f"{nearest_name(pattern, names)!r}"
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


def tensors_of(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of the parameters, with one tensor object for tied ones.

    `parameter.data` is a new object each time it is read, and a weight layout knows tied tensors by their identity.
    """
    known: dict[int, Tensor] = {}
    return [(name, known.setdefault(id(parameter), parameter.data)) for name, parameter in named]


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares with `model` every parameter that `model` does not train: only the others take memory."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def frozen_digests(model: PreTrainedModel) -> dict[str, int]:
    """Digest of each tensor that is not trained, by its name in the model's files, a tied one once. Reads them all.

    Experts are one parameter here and many tensors there.
    """
    seen: set[int] = set()
    frozen: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            frozen[name] = parameter.data
    stored = revert_weight_conversion(model, frozen)
    return {name: digest(tensor.float().contiguous()) for name, tensor in stored.items()}


def patched_source(model: PreTrainedModel, update: UpdateConfig, frozen: dict[str, int]) -> SyncSource:
    """What is published of a model that is trained in part, by adapters or by name.

    `update` is what was applied to the model; `frozen` are its `frozen_digests`.
    """
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


def _check_names_of_files(model: PreTrainedModel, names: set[str]) -> None:
    """Raises ConfigError for a parameter that files hold in pieces: generators could not put it among their own."""
    for name, parameter in named_parameters(model):
        if name in names and set(revert_weight_conversion(model, {name: parameter.data})) != {name}:
            raise ConfigError(
                f"update.names: {name} is stored in several tensors (experts), which a partial update cannot send; "
                "leave it out, or set update.what=full"
            )


def _tell_of_experts(model: PreTrainedModel) -> None:
    experts = [parameter.numel() for parameter in model.parameters() if parameter.dim() > 2]
    if experts:
        share = sum(experts) / sum(parameter.numel() for parameter in model.parameters())
        log.warning(
            "update.what=lora puts adapters beside linear layers: %d weights of experts, %.0f %% of the model, have "
            "none and stay as they are; update.what=full trains them", len(experts), 100 * share,
        )  # fmt: skip


def _tied_names(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(name, first name) of every parameter that has more than one."""
    first: dict[int, str] = {}
    tied = []
    for name, parameter in named_parameters(model):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied.append((name, original))
    return tied
