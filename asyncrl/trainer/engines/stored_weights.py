"""A model whose weights are still in their files: each rank reads the rows that it holds, so a host holds one model.

The model is built by transformers itself, on torch's meta device and from the shapes in the files' headers: it says
what is missing or has another shape, and which tensors of the files make which parameter, as when it loads weights.
What it fuses (experts are one parameter in memory, many tensors in files) is put together one parameter at a time.

Where that is not known to be right, `stored_model` says no, and the model is loaded whole.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from asyncrl.errors import ModelError
from asyncrl.host.model_folder import ModelFiles
from asyncrl.trainer.engines.lora import plain_name
from asyncrl.trainer.engines.part import local
from asyncrl.trainer.engines.shards import Extent, TensorFiles, cut, extent_of
from asyncrl.trainer.engines.trainable import named_parameters
from asyncrl.trainer.world import World
from asyncrl.weights.bytes.digest import digest

log = logging.getLogger(__name__)

COMPARED_ROWS = 4096  # of two tensors that may be one


def stored_model(auto_class: Any, files: ModelFiles, key: str) -> tuple[PreTrainedModel, StoredWeights] | None:
    """A model of `auto_class` (AutoModel, ...) without memory, and its weights, which are float32 when they are read.

    Buffers that are in no file are computed. None where the model must be loaded whole, which also tells what is wrong
    with it; the log says why. `key` names the model in messages.
    """
    try:
        found = _stored_model(auto_class, files, key)
    except _LoadWhole as reason:
        log.info("%s is loaded whole on every rank: %s", key, reason)
        return None
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        log.info("%s is loaded whole on every rank: %s: %s", key, type(error).__name__, error)
        return None
    return found


class _LoadWhole(Exception):
    """Why a model's weights cannot be read slice by slice."""


@dataclass
class _Source:
    """What a parameter is made of."""

    names: list[tuple[str | None, str]] = field(default_factory=list)  # (pattern of the converter, name in the files)
    converter: WeightConverter | None = None


class StoredWeights:
    """What the parameters and persistent buffers of one model are in its files, under their names in memory."""

    def __init__(self, model: PreTrainedModel, files: TensorFiles, key: str) -> None:
        self._model = model  # what its converters ask about it
        self._files = files
        self._key = key
        self._sources = _sources(model, files)
        # Of tied parameters files need to have one.
        self._first = _first_names(model, self._sources)

    def read(self, name: str, extent: Extent) -> Tensor:
        """The block `extent` of a parameter on the CPU, in the dtype of the file. Raises ModelError."""
        source = self._sources[self._first.get(name, name)]
        try:
            if source.converter is None:
                return self._files.read(source.names[0][1], extent)
            return cut(self._converted(name, source), extent)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self._key} cannot be loaded: {error}") from error

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Gives memory on `device` to what is on the meta device of the model or a copy of it, and reads it.

        Of a parameter that is sharded already this rank's rows are read. Raises ModelError.
        """
        made: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_meta:
                state[name] = made.setdefault(id(tensor), _with_memory(tensor, device))
        # Assigned by torch, and not by hand: what is sharded learns of its new tensors by it, and pads or pins them.
        model.load_state_dict(state, assign=True, strict=False)
        filled: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in state and id(tensor) not in filled:
                filled.add(id(tensor))
                extent = extent_of(tensor)
                local(tensor.detach()).copy_(self.read(plain_name(name), extent))
        tensors = [*model.parameters(), *model.buffers()]
        assert not any(tensor.is_meta for tensor in tensors), "a tensor of the model is without memory"
        assert len(filled) == len(made), f"{len(made) - len(filled)} tensors of the model were not read"

    def frozen_digests(self, model: PreTrainedModel, world: World) -> dict[str, int]:
        """`trainable.frozen_digests` of a model without memory: each rank reads its part, one parameter at a time.

        All ranks call this. Raises ModelError.
        """
        seen: set[int] = set()
        frozen: dict[str, Tensor] = {}
        for name, parameter in named_parameters(model):
            if not parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                frozen[name] = torch.empty(parameter.shape, device="meta")
        names = {name: number for number, name in enumerate(revert_weight_conversion(model, frozen))}
        found = torch.zeros(len(names), dtype=torch.int64)
        for number, (name, shape) in enumerate(frozen.items()):
            if number % world.size == world.rank:
                stored = revert_weight_conversion(model, {name: self.read(name, extent_of(shape))})
                for stored_name, tensor in stored.items():
                    found[names[stored_name]] = digest(tensor.float().contiguous())
        return dict(zip(names, world.sum(found).tolist(), strict=True))

    def _converted(self, name: str, source: _Source) -> Tensor:
        """A parameter that transformers makes of several tensors, whole."""
        converter = copy.deepcopy(source.converter)
        assert converter is not None
        for pattern, stored in source.names:
            whole = self._files.read(stored, _whole(self._files.shapes[stored])).float()
            converter.add_tensor(name, stored, pattern, whole)  # type: ignore[arg-type]  # takes tensors, too
        (value,) = converter.convert(name, model=self._model, config=self._model.config).values()
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two parameters of one shape have the same values in the files."""
        whole = extent_of(self._model.get_parameter(one))
        for start in range(0, whole.shape[0], COMPARED_ROWS):
            count = min(COMPARED_ROWS, whole.shape[0] - start)
            rows = Extent(whole.whole, (start, *whole.offsets[1:]), (count, *whole.shape[1:]))
            if not torch.equal(self.read(one, rows).float(), self.read(other, rows).float()):
                return False
        return True


def _stored_model(auto_class: Any, files: ModelFiles, key: str) -> tuple[PreTrainedModel, StoredWeights]:
    _check_files(files)
    tensors = TensorFiles(files.weight_files)
    twice = [name for name, count in tensors.counts.items() if count > 1]
    if twice:
        raise _LoadWhole(f"two of its files have {twice[0]}")
    state = {}
    for name, dtype in tensors.dtypes.items():
        if dtype is None:
            raise _LoadWhole(f"{name} is of a type that is not known")
        state[name] = torch.empty(tensors.shapes[name], dtype=dtype, device="meta")
    config = AutoConfig.from_pretrained(files.folder)
    with torch.device("meta"):
        kind = type(auto_class.from_config(copy.deepcopy(config)))
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        device_map={"": "meta"},
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise _LoadWhole(f"its files lack {min(info['missing_keys'])}")
    model.config.name_or_path = model.name_or_path = str(files.folder)
    weights = StoredWeights(model, tensors, key)
    _tie(model, weights)
    _compute_buffers(model)
    return model, weights


def _check_files(files: ModelFiles) -> None:
    """Raises _LoadWhole unless transformers would load exactly these files, as they are."""
    index, single = files.folder / "model.safetensors.index.json", files.folder / "model.safetensors"
    if index.is_file() == single.is_file():
        raise _LoadWhole("its folder does not hold either model.safetensors or an index")
    if (files.folder / "adapter_config.json").is_file():
        raise _LoadWhole("its folder holds adapters")
    for name in ("quantization_config", "transformers_weights"):
        if files.config.get(name):
            raise _LoadWhole(f"config.json has {name}")


def _sources(model: PreTrainedModel, files: TensorFiles) -> dict[str, _Source]:
    """What each entry of the model's state is made of, by the rules that transformers loads weights by."""
    rules: Any = model._weight_conversions or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, _Source] = {}
    for stored in sorted(files.shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name not in state:
            continue  # transformers has told of it
        source = sources.setdefault(name, _Source())
        source.names.append((pattern, stored))
        if pattern is not None:
            source.converter = of_pattern[pattern]
            if len(source.converter.target_patterns) > 1:
                raise _LoadWhole(f"{stored} is divided into several parameters")
        elif len(source.names) > 1 or files.shapes[stored] != tuple(state[name].shape):
            raise _LoadWhole(f"{name} is not {stored} alone")
    return sources


def _first_names(model: PreTrainedModel, sources: dict[str, _Source]) -> dict[str, str]:
    """For each entry of the model's state that its files do not have, the name of the same tensor that they have."""
    state = model.state_dict(keep_vars=True)
    stored = {id(state[name]): name for name in sources}
    names = {}
    for name, tensor in state.items():
        if name not in sources:
            if id(tensor) not in stored:
                raise _LoadWhole(f"nothing in its files makes {name}")
            names[name] = stored[id(tensor)]
    return names


def _tie(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Ties what the files have under both names, if the values are the same, as transformers does with weights."""
    for name, original in dict(model.all_tied_weights_keys or {}).items():
        parameter, source = model.get_parameter(name), model.get_parameter(original)
        if parameter is source:
            continue
        if parameter.shape != source.shape or not weights.are_equal(name, original):
            raise _LoadWhole(f"its configuration ties {name} and {original}, which differ")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, source)


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Gives memory and values to the buffers that are in no file, as transformers does when it loads weights."""
    marks: list[tuple[str, float]] = []
    for name, buffer in list(model.named_non_persistent_buffers()):
        if buffer.dtype == torch.bool or buffer.is_complex():
            raise _LoadWhole(f"the buffer {name} is {buffer.dtype}")
        mark = float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
        path, _, last = name.rpartition(".")
        module: Any = model.get_submodule(path)
        module._buffers[last] = torch.full(buffer.shape, mark, dtype=buffer.dtype, device="cpu")
        module._is_hf_initialized = False
        marks.append((name, mark))
    model.initialize_weights()
    for name, mark in marks:
        value = model.get_buffer(name)
        if value.is_meta or bool((value.isnan() if mark != mark else value == mark).any()):
            raise _LoadWhole(f"the buffer {name} is not computed from the configuration")
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in persistent:
            raise _LoadWhole(f"the buffer {name} is not computed from the configuration")


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _whole(shape: tuple[int, ...]) -> Extent:
    return Extent(shape, (0,) * len(shape), shape)
