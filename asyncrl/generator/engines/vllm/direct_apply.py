"""Weight swaps by plain copies: where every element of a checkpoint ends up in a worker's model, measured once.

vLLM's layerwise reload rebuilds every layer at every load, and that is nearly all of a pause. Here one reload is
watched: each write of vLLM's own weight loaders into a parameter names the checkpoint tensor it read and the slices on
both sides. Fused projections, tensor-parallel shards, padding and casts are such writes; nothing is known of models.

On CPUs a layer computes from a packed copy of its weight, behind the attribute `cpu_linear`. Packing costs ten times a
memory copy, so it is done in staging, beside generation, by vLLM's own call on a stand-in for the layer; a swap puts
the new `cpu_linear` in the old one's place.

A plan is used when it reproduces the reload it was read off: parameters bit for bit, packed weights by the bits of what
they compute (Freivalds 1977). Otherwise swaps stay reloads, and the reason is in the log.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.weights.bytes.layout import WeightManifest, digest
from asyncrl.weights.bytes.patch import LORA_A, WEIGHT

log = logging.getLogger("vllm.asyncrl")
_T = TypeVar("_T")

PACKED = "cpu_linear"  # the attribute that vLLM keeps a packed weight behind
PROBE_ROWS = 8
_CONSTANTS = {torch.ops.aten.fill_.Scalar: 1, torch.ops.aten.zero_.default: None}  # where the value is among the args


class PlanRefused(Exception):
    """This model, or this manifest, is not one for plain copies. The message says why."""


@dataclass(frozen=True, slots=True)
class View:
    """A strided part of a tensor, in elements from the tensor's first."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def within(cls, part: torch.Tensor, start: int) -> View:
        """What `part` is of the tensor whose first element is element `start` of their storage."""
        return cls(tuple(part.shape), part.stride(), part.storage_offset() - start)

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
        return f"{self.module_name}.{self.name}"

    @property
    def live(self) -> torch.Tensor:
        return getattr(self.module, self.name).data

    @property
    def num_written(self) -> int:
        """Elements that loaders wrote."""
        return sum(math.prod(write.target.size) for writes in self.writes.values() for write in writes) + sum(
            math.prod(write.target.size) for write in self.constants
        )

    def pairs(self, into: torch.Tensor, name: str, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) views for loading the checkpoint's tensor `name` into a parameter like this one."""
        for write in self.writes[name]:
            assert write.part is not None
            yield write.target.of(into), write.part.of(tensor)


class LoadRecorder(TorchDispatchMode):
    """Watches `model.load_weights` during a layerwise reload. Make it after `initialize_layerwise_reload`.

    vLLM calls each loader on a parameter without memory first, to count what it loads. Those writes are recorded: the
    parameter's views are exact there, and the real ones come and go layer by layer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.loaded: dict[int, Loaded] = {}  # by storage; the tensors are kept, so that none is given out again
        self.problem = ""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._sources: dict[int, list[tuple[int, str, torch.dtype]]] = defaultdict(list)  # byte in storage, name
        self._pins: list[StorageWeakRef] = []  # frees the bytes and keeps the address, which is the key above
        for module_name, module in model.named_modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                # The first wins: a buffer may be another name of a parameter.
                self.loaded.setdefault(_storage_key(tensor), Loaded(module, module_name, name, tensor))

    def watch(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs, which the recorder will know again by where they lie."""
        for name, tensor in named:
            places = self._sources[_storage_key(tensor)]
            if any(start == _start_byte(tensor) for start, _, _ in places):
                tensor = tensor.clone()  # two names of one tensor: each needs a place of its own
                places = self._sources[_storage_key(tensor)]
            self._pins.append(StorageWeakRef(tensor.untyped_storage()))
            places.append((_start_byte(tensor), name, tensor.dtype))
            places.sort(key=lambda place: place[0])
            self.shapes[name] = tuple(tensor.shape)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            self._note_writes(func, args, kwargs or {})
        except Exception as error:  # noqa: BLE001 - the load itself needs none of this
            self.problem = self.problem or f"{func} is not understood: {type(error).__name__}: {error}"
        return func(*args, **(kwargs or {}))

    def _note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    self._note(func, tensor, args)

    def _note(self, func: Any, target: Any, args: Any) -> None:
        loaded = self.loaded.get(_storage_key(target)) if isinstance(target, torch.Tensor) else None
        if loaded is None:
            return
        view = View.within(target, loaded.tensor.storage_offset())
        if func in _CONSTANTS:
            where = _CONSTANTS[func]
            writes, write = loaded.constants, Write(view, None, 0.0 if where is None else float(args[where]))
        elif func is torch.ops.aten.copy_.default:
            source = args[1]
            if _storage_key(source) == _storage_key(target) and source.storage_offset() == target.storage_offset():
                return  # a parameter put back onto itself
            found = self._source_of(source)
            if found is None:
                self.problem = self.problem or f"{loaded.label} is loaded from a tensor that was computed on the way"
                return
            writes, write = loaded.writes[found[0]], Write(view, found[1])
        else:
            self.problem = self.problem or f"{loaded.label} is changed by {func} while it is loaded"
            return
        if write not in writes:  # vLLM loads once to count, and where it loads in place, again
            writes.append(write)

    def _source_of(self, tensor: torch.Tensor) -> tuple[str, View] | None:
        places = self._sources.get(_storage_key(tensor))
        if not places:
            return None
        index = bisect_right(places, _start_byte(tensor), key=lambda place: place[0]) - 1
        if index < 0 or places[index][2] != tensor.dtype:
            return None
        start, name, dtype = places[index]
        return name, View.within(tensor, start // dtype.itemsize)


@dataclass(slots=True)
class Pack:
    """A layer that computes from a packed copy of its weight."""

    layer: torch.nn.Module
    weight: Loaded

    def new_weight(self) -> torch.Tensor:
        """Memory of the layer's weight, constants written. Of its own: the packed form may go on using it."""
        like = self.weight.tensor
        device = self.layer.weight.device
        weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device).zero_()
        for write in self.weight.constants:
            write.target.of(weight).fill_(write.constant)
        return weight

    def packed(self, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
        """What vLLM would put behind `cpu_linear` for this weight."""
        stand_in = torch.nn.Module()
        stand_in.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.layer.quant_method.process_weights_after_loading(stand_in)  # type: ignore[union-attr, operator]
        return vars(stand_in)[PACKED]


@dataclass(slots=True)
class Prepared:
    """A staged version, ready to be put in place."""

    plan: Plan
    basis: object  # what the live weights must still be, see `DirectApply.usable`
    copies: list[tuple[torch.Tensor, torch.Tensor]]  # (live, staged)
    packs: list[tuple[Pack, Callable[..., torch.Tensor]]]


class Plan:
    """Where the tensors of a checkpoint go. `shapes` are those of its tensors by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], plain: list[Loaded], packs: list[Pack]) -> None:
        self.shapes = shapes
        self._plain = plain
        self._packs = packs

    @property
    def num_copies(self) -> int:
        return sum(len(writes) for loaded in self._plain for writes in loaded.writes.values())

    @property
    def num_packs(self) -> int:
        return len(self._packs)

    @torch.no_grad()
    def prepare(self, named: Iterable[tuple[str, torch.Tensor]], unchanged: set[str], basis: object) -> Prepared:
        """Makes a version ready while the one before is in use; nothing that is in use is changed.

        `unchanged` names tensors that are live already: what rests on them alone is left out.

        Raises:
            PlanRefused: names or shapes are not those the plan was made from.
        """
        plain = _by_source(self._plain, lambda loaded: loaded, unchanged)
        packs = _by_source(self._packs, lambda pack: pack.weight, unchanged)
        copies: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        begun: dict[int, tuple[torch.Tensor, set[str]]] = {}  # weights being put together, and what they still lack
        prepared, seen = Prepared(self, basis, [], []), set()
        for name, tensor in named:
            if self.shapes.get(name) != tuple(tensor.shape):
                raise PlanRefused(f"{name} is {tuple(tensor.shape)}, the plan has {self.shapes.get(name)}")
            seen.add(name)
            for loaded in plain.get(name, ()) if name not in unchanged else ():
                for live, source in loaded.pairs(loaded.live, name, tensor):
                    place = _place(live), _place(source)  # two names of one tensor are copied once
                    # Cast now: a folded adapter's float32 result need not live until the swap.
                    copies[place] = live, source.to(live.dtype)
            for pack in packs.get(name, ()):
                weight, lacking = begun.get(id(pack)) or (pack.new_weight(), set(pack.weight.writes))
                begun[id(pack)] = weight, lacking
                for target, source in pack.weight.pairs(weight, name, tensor):
                    target.copy_(source)
                lacking.discard(name)
                if not lacking:
                    prepared.packs.append((pack, pack.packed(begun.pop(id(pack))[0])))
        if missing := self.shapes.keys() - seen:
            raise PlanRefused(f"{sorted(missing)[0]} does not come ({len(missing)} tensors in all)")
        prepared.copies.extend(copies.values())
        if prepared.copies and prepared.copies[0][0].is_cuda:
            # The engine's thread reads on a stream of its own.
            torch.cuda.current_stream(prepared.copies[0][0].device).synchronize()
        return prepared

    @torch.no_grad()
    def verify(self, prepared: Prepared) -> None:
        """Compares with the weights in use, which came by a reload of the same version. Raises PlanRefused."""
        for live, staged in prepared.copies:
            if not _same_bits(live, staged.to(live.dtype)):
                raise PlanRefused(f"a parameter of shape {tuple(live.shape)} has other values after a reload")
        for pack, packed in prepared.packs:
            weight, like = pack.layer.weight, pack.weight.tensor
            probe = torch.randn(PROBE_ROWS, like.shape[1]).to(like.dtype)
            if not _same_bits(vars(pack.layer)[PACKED](probe, weight, None), packed(probe, weight, None)):
                raise PlanRefused(f"{pack.weight.label} computes other values after a reload")


def make_plan(model: torch.nn.Module, recorder: LoadRecorder, unlike: str) -> Plan:
    """The plan of a reload that has just ended.

    Args:
        recorder: it watched that reload.
        unlike: what else changed in it, see `SideEffects`.

    Raises:
        PlanRefused: something happened to the weights that copies cannot repeat.
    """
    if problem := recorder.problem or unlike:
        raise PlanRefused(problem)
    plain, packs, kept = [], [], set()
    for loaded in recorder.loaded.values():
        if not isinstance(getattr(loaded.module, loaded.name), torch.nn.Parameter):
            continue  # a buffer: if one changes, it is a side effect
        if loaded.num_written != loaded.tensor.numel():
            raise PlanRefused(f"{loaded.num_written} of {loaded.tensor.numel()} elements of {loaded.label} are copied")
        is_packed = loaded.name == "weight" and PACKED in vars(loaded.module)
        if is_packed:
            packs.append(Pack(loaded.module, loaded))
        if loaded.live.shape == loaded.tensor.shape and loaded.live.stride() == loaded.tensor.stride():
            plain.append(loaded)
        elif loaded.live.numel() or not is_packed:
            raise PlanRefused(f"{loaded.label} is loaded as {_shape(loaded.tensor)} and kept as {_shape(loaded.live)}")
        kept.add(loaded.label)
    for label, parameter in _parameters(model):
        if label not in kept and parameter.numel():
            raise PlanRefused(f"{label} is a parameter that no loader sees")
    return Plan(recorder.shapes, plain, packs)


class SideEffects:
    """What a reload changes besides parameters: tensors and functions that layers derive from their weights.

    Make one before a reload; `found` after it names the first such change, or is empty. A plan would leave it behind.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._before = dict(_derived(model))

    def found(self) -> str:
        after = dict(_derived(self._model))
        for path in self._before.keys() | after.keys():
            (old, old_digest), (new, new_digest) = self._before.get(path, (None, 0)), after.get(path, (None, 0))
            if old is not new or old_digest != new_digest:
                return f"{path} is made anew at every load"
        return ""


class DirectApply:
    """One worker's plan, and whether it may be used now.

    A swap is `begin`, `load` and `end` of a reload, or `apply` of what `prepare` made ready; `failed` after either
    broke off.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._plan: Plan | None = None
        self._refused = ""  # once and for all: what refused a plan is in the model's code
        self._effects: SideEffects | None = None
        self._recorder: LoadRecorder | None = None
        self._applied: WeightManifest | None = None  # whose weights are live, when that is certain

    def prepare(self, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]) -> Prepared | None:
        """In staging, beside generation. None: this version goes through a reload."""
        plan, applied = self._plan, self._applied
        if plan is None:
            return None
        try:
            return plan.prepare(named, unchanged_names(applied, manifest), applied)
        except PlanRefused as refusal:
            log.warning("apply: reload. Version %d: %s", manifest.version, refusal)
            return None
        except Exception as error:  # noqa: BLE001 - a reload needs none of this; the next version may fare better
            log.warning("apply: reload. Version %d: %s: %s", manifest.version, type(error).__name__, error)
            return None

    def usable(self, prepared: Prepared | None) -> bool:
        """Whether what was prepared fits to the weights that are live now."""
        return prepared is not None and prepared.plan is self._plan and prepared.basis is self._applied

    @torch.no_grad()
    def apply(self, prepared: Prepared, manifest: WeightManifest) -> None:
        """Puts a version in place. Generation must be paused."""
        self._applied = None
        for live, staged in prepared.copies:
            live.copy_(staged, non_blocking=True)
        for pack, packed in prepared.packs:
            setattr(pack.layer, PACKED, packed)
        self._applied = manifest

    def begin(self) -> None:
        """Before `initialize_layerwise_reload`."""
        self.failed()
        try:
            self._effects = None if self._refused else SideEffects(self._model)
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse(error)

    def load(
        self, load: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]], named: Iterable[tuple[str, torch.Tensor]]
    ) -> set[str]:
        """`load(named)`, a model's `load_weights`, watched."""
        if self._effects is None:
            return load(named)
        self._recorder = LoadRecorder(self._model)
        with self._recorder:
            return load(self._recorder.watch(named))

    def end(self, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """After `finalize_layerwise_reload`: a plan for the swaps to come, when it gives what the reload gave."""
        self._applied = manifest
        recorder, effects, self._recorder, self._effects = self._recorder, self._effects, None, None
        if recorder is None or effects is None:
            return
        try:
            plan = make_plan(self._model, recorder, effects.found())
            plan.verify(plan.prepare(named, set(), None))
        except Exception as error:  # noqa: BLE001 - the reload is complete and right, whatever we fail to make of it
            self._refuse(error)
            return
        self._plan = plan
        log.info(
            "apply: direct. %d copies and %d packed layers give version %d as a reload gave it, bit for bit",
            plan.num_copies, plan.num_packs, manifest.version,
        )  # fmt: skip

    def _refuse(self, error: Exception) -> None:
        self._plan = None
        self._refused = str(error) if isinstance(error, PlanRefused) else f"{type(error).__name__}: {error}"
        log.warning("apply: reload. Weights cannot be copied directly: %s", self._refused)

    def failed(self) -> None:
        """The live weights are a mixture: the next version goes through a reload, which proves the plan again."""
        self._plan, self._applied, self._recorder, self._effects = None, None, None, None


def unchanged_names(applied: WeightManifest | None, manifest: WeightManifest) -> set[str]:
    """Names whose tensors are equal under both manifests because neither carries or adapts them."""
    if applied is None or applied.patch is None or manifest.patch is None:
        return set()
    names = {name for name, _ in set(applied.patch.base) & set(manifest.patch.base)}
    for each in (applied, manifest):
        names -= {entry.name.removesuffix(LORA_A) + WEIGHT for entry in each.layout.tensors}
    tied = set(applied.patch.tied) & set(manifest.patch.tied)
    return names | {name for name, original in tied if original in names}


def _derived(model: torch.nn.Module) -> Iterator[tuple[str, tuple[Any, int]]]:
    """(path, (tensor or function, digest)) of what modules hold besides parameters and submodules."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{module_name}.{name}", (None, _content(buffer))  # put back by vLLM, so that only its values count
        for name, value in vars(module).items():
            if name in (PACKED, "kv_cache") or name.startswith("_"):
                continue
            inner = {} if isinstance(value, torch.nn.Module | type) else getattr(value, "__dict__", {})
            for path, held in [(name, value), *((f"{name}.{key}", each) for key, each in inner.items())]:
                if isinstance(held, torch.Tensor):
                    yield f"{module_name}.{path}", (held, _content(held))
                elif callable(held) and not isinstance(held, torch.nn.Module | type):
                    yield f"{module_name}.{path}", (held, 0)


def _content(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else digest(tensor.detach().contiguous())


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under every name it has, so that a tied one comes with each of its layers."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{module_name}.{name}", parameter


def _by_source(items: list[_T], loaded_of: Callable[[_T], Loaded], unchanged: set[str]) -> dict[str, list[_T]]:
    """Checkpoint name → what needs it, without what rests on `unchanged` names alone."""
    needing: dict[str, list[_T]] = defaultdict(list)
    for item in items:
        sources = loaded_of(item).writes.keys()
        if sources - unchanged:
            for source in sources:
                needing[source].append(item)
    return needing


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _start_byte(tensor: torch.Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return digest(left.contiguous()) == digest(right.contiguous())
