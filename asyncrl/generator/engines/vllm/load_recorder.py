"""Watches vLLM load a checkpoint: which part of which checkpoint tensor goes into which part of a parameter.

Nothing here knows models. Every write of a weight loader into a parameter names the tensor it read and the slices on
both sides; fused projections, tensor-parallel shards, padding and casts are such writes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# The writes of a constant, and where among the call's arguments the value stands; None: it is 0.
_CONSTANTS = {torch.ops.aten.fill_.Scalar: 1, torch.ops.aten.zero_.default: None}


@dataclass(frozen=True, slots=True)
class View:
    """A strided part of a tensor, in elements from the tensor's first."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def within(cls, part: torch.Tensor, start: int) -> View:
        """What `part` is of the tensor whose first element is element `start` of their storage."""
        return cls(tuple(part.shape), part.stride(), int(part.storage_offset()) - start)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor of equal strides, without a copy."""
        return torch.as_strided(tensor, self.size, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a weight loader: `target` of the parameter became `part` of a checkpoint tensor, or a constant."""

    target: View
    part: View | None
    constant: float = 0.0


@dataclass(slots=True)
class Loaded:
    """A parameter as weight loaders see it, and what they wrote into it."""

    module: torch.nn.Module
    module_name: str
    name: str
    tensor: torch.Tensor  # on the meta device, or the live one where vLLM loads in place
    writes: dict[str, list[Write]] = field(default_factory=lambda: defaultdict(list))  # by checkpoint tensor
    constants: list[Write] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module_name}.{self.name}"

    @property
    def live(self) -> torch.Tensor:
        """The parameter that the model computes with now; vLLM may replace it at each load."""
        parameter = getattr(self.module, self.name)
        assert isinstance(parameter, torch.Tensor)
        return parameter.data

    def pairs(self, into: torch.Tensor, name: str, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) views for loading the checkpoint's tensor `name` into a parameter like this one."""
        for write in self.writes[name]:
            assert write.part is not None
            yield write.target.of(into), write.part.of(tensor)


class _Place(NamedTuple):
    """Where in its storage a checkpoint tensor begins."""

    start: int  # byte
    name: str
    dtype: torch.dtype


class LoadRecorder(TorchDispatchMode):
    """Watches `model.load_weights` during a layerwise reload. Make it after `initialize_layerwise_reload`.

    vLLM calls each loader on a parameter without memory first, to count what it loads. Those writes are recorded: the
    parameter's views are exact there, and the real ones come and go layer by layer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.loaded: dict[int, Loaded] = {}  # by storage; the tensors are kept, so that none is given out again
        self.problem = ""  # the first thing seen that copies could not repeat
        self.complaints: dict[str, str] = {}  # the same by parameter
        self.not_understood = False  # an operation that may have written anywhere
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the checkpoint's tensors by name
        self._sources: dict[int, list[_Place]] = defaultdict(list)  # by storage, in the order of their bytes
        self._pins: list[StorageWeakRef] = []  # frees the bytes and keeps the address, which is the key above
        for module_name, module in model.named_modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                # The first wins: a buffer may be another name of a parameter.
                self.loaded.setdefault(storage_key(tensor), Loaded(module, module_name, name, tensor))

    def watch(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs, which the recorder will know again by where they lie."""
        for name, tensor in named:
            watched = tensor
            places = self._sources[storage_key(watched)]
            if any(place.start == _start_byte(watched) for place in places):
                watched = tensor.clone()  # two names of one tensor: each needs a place of its own
                places = self._sources[storage_key(watched)]
            self._pins.append(StorageWeakRef(watched.untyped_storage()))
            places.append(_Place(_start_byte(watched), name, watched.dtype))
            places.sort(key=lambda place: place.start)
            self.shapes[name] = tuple(watched.shape)
            yield name, watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation of the load comes by here; those that write are noted."""
        try:
            self._note_writes(func, args, kwargs or {})
        except Exception as error:  # noqa: BLE001 - the load itself needs none of this
            self.not_understood = True
            self._complain(None, f"{func} is not understood: {type(error).__name__}: {error}")
        return func(*args, **(kwargs or {}))

    def _complain(self, loaded: Loaded | None, problem: str) -> None:
        self.problem = self.problem or problem
        if loaded is not None:
            self.complaints.setdefault(loaded.label, problem)

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for target in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(target, torch.Tensor):
                        self._note(func, target, args)

    def _note(self, func: Any, target: torch.Tensor, args: Any) -> None:
        """`func` writes into `target`: a note if that is a parameter, a complaint if a copy could not repeat it."""
        loaded = self.loaded.get(storage_key(target))
        if loaded is None:
            return
        view = View.within(target, int(loaded.tensor.storage_offset()))
        if func in _CONSTANTS:
            where = _CONSTANTS[func]
            _add(loaded.constants, Write(view, None, 0.0 if where is None else float(args[where])))
        elif func is torch.ops.aten.copy_.default:
            self._note_copy(loaded, view, target, args[1])
        else:
            self._complain(loaded, f"{loaded.label} is changed by {func} while it is loaded")

    def _note_copy(self, loaded: Loaded, view: View, target: torch.Tensor, source: torch.Tensor) -> None:
        if storage_key(source) == storage_key(target) and source.storage_offset() == target.storage_offset():
            return  # a parameter put back onto itself
        found = self._source_of(source)
        if found is None:
            self._complain(loaded, f"{loaded.label} is loaded from a tensor that was computed on the way")
            return
        name, part = found
        _add(loaded.writes[name], Write(view, part))

    def _source_of(self, tensor: torch.Tensor) -> tuple[str, View] | None:
        """Name of the checkpoint tensor that `tensor` is a view of, and which view; None if it is of none."""
        places = self._sources.get(storage_key(tensor))
        if not places:
            return None
        index = bisect_right(places, _start_byte(tensor), key=lambda place: place.start) - 1
        if index < 0 or places[index].dtype != tensor.dtype:
            return None
        place = places[index]
        return place.name, View.within(tensor, place.start // place.dtype.itemsize)


def _add(writes: list[Write], write: Write) -> None:
    if write not in writes:  # vLLM loads once to count, and where it loads in place, again
        writes.append(write)


def storage_key(tensor: torch.Tensor) -> int:
    """Names the memory that a tensor is a view of, for as long as that memory, or a weak reference to it, is kept."""
    return int(tensor.untyped_storage()._cdata)


def _start_byte(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()
