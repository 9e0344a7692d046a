"""Weight swaps by plain copies: where every element of a checkpoint ends up in a worker's model, measured once.

vLLM's layerwise reload rebuilds every layer at every load, and that is nearly all of a pause. Here one reload is
watched (`load_recorder`), and what was seen becomes a plan of copies.

On CPUs a layer computes from a packed copy of its weight, behind the attribute `cpu_linear`. Packing costs ten times a
memory copy, so it is done in staging, beside generation, by vLLM's own call on a stand-in for the layer; a swap puts
the new `cpu_linear` in the old one's place.

A plan is used when it reproduces the reload it was read off: parameters bit for bit, packed weights by the bits of what
they compute (Freivalds 1977). Otherwise swaps stay reloads, and the reason is in the log.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from asyncrl.generator.engines.vllm.bits_in_use import InUseCheck, num_unwritten
from asyncrl.generator.engines.vllm.expert_weights import Experts
from asyncrl.generator.engines.vllm.load_recorder import Loaded, LoadRecorder
from asyncrl.generator.engines.vllm.packed_weights import PACKED, Assembly, Pack, Packed
from asyncrl.generator.engines.vllm.slices import boxes_of, in_boxes
from asyncrl.link.weight_records import BitsInUse, WeightManifest
from asyncrl.weights.bytes.boxes import Box
from asyncrl.weights.bytes.digest import digest
from asyncrl.weights.bytes.patch import LORA_A, WEIGHT

log = logging.getLogger("vllm.asyncrl")
_T = TypeVar("_T")

PROBE_ROWS = 8

CopyPair = tuple[torch.Tensor, torch.Tensor]  # live, staged


class PlanRefused(Exception):
    """Plain copies do not do for a model or a manifest. The message says why."""


@dataclass(slots=True)
class PreparedCopy:
    """A staged version, ready to be put in place."""

    plan: CopyPlan
    basis: object  # what the live weights must still be, see `DirectApply.usable`
    copies: list[CopyPair]
    packs: list[tuple[Pack, Packed]]


class CopyPlan:
    """Where the tensors of a checkpoint go. `shapes` are those of its tensors by name."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], plain: list[Loaded], packs: list[Pack], experts: list[Experts]
    ) -> None:
        self.shapes = shapes
        self._plain = plain
        self._packs = packs
        self._experts = experts

    def boxes(self) -> dict[str, Box] | None:
        """What of each tensor this worker needs; None where that cannot be told."""
        return boxes_of(self.shapes, self._all())

    def in_boxes(self, boxes: Mapping[str, Box]) -> CopyPlan:
        """The same plan, from what the boxes hold of the tensors."""
        return CopyPlan(
            {name: box.held_shape for name, box in boxes.items()},
            [in_boxes(loaded, boxes) for loaded in self._plain],
            [Pack(pack.layer, in_boxes(pack.weight, boxes)) for pack in self._packs],
            [Experts(in_boxes(expert.weight, boxes), expert.isa) for expert in self._experts],
        )

    def _all(self) -> Iterator[Loaded]:
        yield from self._plain
        yield from (pack.weight for pack in self._packs)
        yield from (expert.weight for expert in self._experts)

    @property
    def num_copies(self) -> int:
        """Copies of a swap in which every tensor is new."""
        return sum(len(writes) for loaded in self._plain for writes in loaded.writes.values())

    @property
    def num_packs(self) -> int:
        """Layers that compute from a packed weight."""
        return len(self._packs)

    @torch.no_grad()
    def prepare(self, named: Iterable[tuple[str, torch.Tensor]], unchanged: set[str], basis: object) -> PreparedCopy:
        """Makes a version ready while the one before is in use; nothing that is in use is changed.

        `unchanged` names tensors that are live already: what rests on them alone is left out.

        Raises:
            PlanRefused: names or shapes are not those the plan was made from.
        """
        plain = _by_source(self._plain, lambda loaded: loaded, unchanged)
        packs = _by_source(self._packs, lambda pack: pack.weight, unchanged)
        experts = _by_source(self._experts, lambda expert: expert.weight, unchanged)
        copies: dict[tuple[_Span, _Span], CopyPair] = {}  # by place: two names of one tensor are copied once
        kept: list[CopyPair] = []
        packed: list[tuple[Pack, Packed]] = []
        assembly = Assembly()
        seen: set[str] = set()
        for name, tensor in named:
            self._check_shape(name, tensor)
            seen.add(name)
            if name not in unchanged:
                for loaded in plain.get(name, ()):
                    copies |= _copies_to(loaded, name, tensor)
            packed += [
                (pack, pack.packed(weight))
                for pack in packs.get(name, ())
                if (weight := assembly.add(pack.weight, name, tensor)) is not None
            ]
            kept += [
                (expert.live, expert.kept(weight))
                for expert in experts.get(name, ())
                if (weight := assembly.add(expert.weight, name, tensor)) is not None
            ]
        if missing := self.shapes.keys() - seen:
            raise PlanRefused(f"{min(missing)} does not come ({len(missing)} tensors in all)")
        prepared = PreparedCopy(self, basis, [*copies.values(), *kept], packed)
        _wait_for_casts(prepared.copies)
        return prepared

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        if self.shapes.get(name) != tuple(tensor.shape):
            raise PlanRefused(f"{name} is {tuple(tensor.shape)}, the plan has {self.shapes.get(name)}")

    @torch.no_grad()
    def verify(self, prepared: PreparedCopy) -> None:
        """Compares with the weights in use, which came by a reload of the same version. Raises PlanRefused."""
        for live, staged in prepared.copies:
            if not _same_bits(live, staged.to(live.dtype)):
                raise PlanRefused(f"a parameter of shape {tuple(live.shape)} has other values after a reload")
        for pack, packed in prepared.packs:
            weight, like = pack.layer.weight, pack.weight.tensor
            probe = torch.randn(PROBE_ROWS, like.shape[1]).to(like.dtype)
            if not _same_bits(vars(pack.layer)[PACKED](probe, weight, None), packed.linear(probe, weight, None)):
                raise PlanRefused(f"{pack.weight.label} computes other values after a reload")


def make_plan(model: torch.nn.Module, recorder: LoadRecorder, unlike: str) -> CopyPlan:
    """The plan of a reload that has just ended.

    Args:
        model: the one that was loaded.
        recorder: it watched that reload.
        unlike: what else changed in it, see `SideEffects`.

    Raises:
        PlanRefused: something happened to the weights that copies cannot repeat.
    """
    if problem := recorder.problem or unlike:
        raise PlanRefused(problem)
    plain: list[Loaded] = []
    packs: list[Pack] = []
    experts: list[Experts] = []
    kept: set[str] = set()
    for loaded in recorder.loaded.values():
        if not isinstance(getattr(loaded.module, loaded.name), torch.nn.Parameter):
            continue  # a buffer: if one changes, it is a side effect
        if lacking := num_unwritten(loaded):
            copied = loaded.tensor.numel() - lacking
            raise PlanRefused(f"{copied} of {loaded.tensor.numel()} elements of {loaded.label} are copied")
        if (expert := Experts.of(loaded)) is not None:
            experts.append(expert)
            kept.add(loaded.label)
            continue
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
    return CopyPlan(recorder.shapes, plain, packs, experts)


class SideEffects:
    """What a reload changes besides parameters: tensors and functions that layers derive from their weights.

    Make one before a reload; `found` after it names the first such change, or is empty. A plan would leave it behind.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._before = dict(_derived(model))

    def found(self) -> str:
        """A sentence on the first thing that is another object now, or holds other values; empty if there is none."""
        after = dict(_derived(self._model))
        for path in self._before.keys() | after.keys():
            old = self._before.get(path, _NOTHING)
            new = after.get(path, _NOTHING)
            if old.held is not new.held or old.digest != new.digest:
                return f"{path} is made anew at every load"
        return ""


@dataclass(frozen=True, slots=True)
class _Sliced:
    """A plan, and the comparison with what is live, from boxes of the tensors."""

    of: CopyPlan  # from whole tensors
    boxes: Mapping[str, Box]
    plan: CopyPlan
    in_use: InUseCheck


class DirectApply:
    """One worker's plan, and whether it may be used now.

    A swap is `begin`, `load` and `end` of a reload, or `apply` of what `prepare` made ready. `failed` is called after
    either of them broke off.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._plan: CopyPlan | None = None
        self._refused = ""  # once and for all: what refused a plan is in the model's code
        self._effects: SideEffects | None = None
        self._recorder: LoadRecorder | None = None
        self._applied: WeightManifest | None = None  # whose weights are live, when that is certain
        self.in_use: InUseCheck | None = None  # how all that is live can be compared; from the first reload on
        self._sliced: _Sliced | None = None  # the same from what this worker needs of the tensors alone
        self._from_slices = False  # what is live came by `_sliced`

    def boxes(self) -> Mapping[str, Box] | None:
        """See `Slicing`. Made once for each plan."""
        plan, in_use = self._plan, self.in_use
        if plan is None or in_use is None:
            return None
        if self._sliced is None or self._sliced.of is not plan:
            boxes = plan.boxes()
            if boxes is None:
                return None
            self._sliced = _Sliced(plan, boxes, plan.in_boxes(boxes), in_use.in_boxes(boxes))
        return self._sliced.boxes

    def live_are(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """See `Slicing`."""
        sliced = self._sliced
        return sliced is not None and not sliced.in_use.report(version, named).differing

    def prepare_slices(
        self, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]
    ) -> PreparedCopy | None:
        """See `Slicing`."""
        sliced = self._sliced
        if sliced is None or sliced.of is not self._plan:
            return None
        return self._prepare(sliced.plan, manifest, named)

    def prepare(self, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]) -> PreparedCopy | None:
        """In staging, beside generation. None: this version goes through a reload."""
        return None if self._plan is None else self._prepare(self._plan, manifest, named)

    def _prepare(
        self, plan: CopyPlan, manifest: WeightManifest, named: Iterable[tuple[str, torch.Tensor]]
    ) -> PreparedCopy | None:
        applied = self._applied
        try:
            return plan.prepare(named, unchanged_names(applied, manifest), applied)
        except PlanRefused as refusal:
            log.warning("apply: reload. Version %d: %s", manifest.version, refusal)
            return None
        except Exception as error:  # noqa: BLE001 - a reload needs none of this; the next version may fare better
            log.warning("apply: reload. Version %d: %s: %s", manifest.version, type(error).__name__, error)
            return None

    def usable(self, prepared: PreparedCopy | None) -> bool:
        """Whether what was prepared fits to the weights that are live now."""
        if prepared is None or self._plan is None or prepared.basis is not self._applied:
            return False
        return prepared.plan is self._plan or self._is_sliced(prepared.plan)

    def _is_sliced(self, plan: CopyPlan) -> bool:
        """Whether this is the plan from slices that belongs to the plan there is now."""
        sliced = self._sliced
        return sliced is not None and sliced.of is self._plan and plan is sliced.plan

    @torch.no_grad()
    def apply(self, prepared: PreparedCopy, manifest: WeightManifest) -> None:
        """Puts a version in place. Generation must be paused."""
        self._applied = None
        for live, staged in prepared.copies:
            live.copy_(staged, non_blocking=True)
        for pack, packed in prepared.packs:
            setattr(pack.layer, PACKED, packed.linear)
            if self.in_use is not None:
                self.in_use.note_packed(pack.layer, packed)
        self._from_slices = self._is_sliced(prepared.plan)
        self._applied = manifest

    def begin(self) -> None:
        """Before `initialize_layerwise_reload`."""
        self.failed()
        try:
            self._effects = None if self._refused else SideEffects(self._model)
        except Exception as error:  # noqa: BLE001 - a reload needs none of this
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
        self._from_slices = False
        recorder = self._recorder
        effects = self._effects
        self._forget_reload()
        if recorder is None or effects is None:
            return
        try:
            unlike = effects.found()
            if self.in_use is None:
                self.in_use = InUseCheck.of_reload(self._model, recorder, unlike, named)
            plan = make_plan(self._model, recorder, unlike)
            plan.verify(plan.prepare(named, set(), None))
        except Exception as error:  # noqa: BLE001 - the reload is complete and right, whatever we fail to make of it
            self._refuse(error)
            return
        self._plan = plan
        log.info(
            "apply: direct. %d copies and %d packed layers give version %d as a reload gave it, bit for bit",
            plan.num_copies, plan.num_packs, manifest.version,
        )  # fmt: skip

    def read_packed(self) -> None:
        """Reads back what `report` cannot read beside generation. Right after a load, while it is paused."""
        if self.in_use is not None:
            self.in_use.read_packed()
            if self._sliced is not None:
                self._sliced.in_use.share_read(self.in_use)

    def report(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> BitsInUse:
        """Whether what is live now is `version`, whose tensors are `named`. Beside generation."""
        if self.in_use is None:
            return BitsInUse(version, 0, [], [f"all parameters: {self._refused}"])
        if self._from_slices and self._sliced is not None:
            return self._sliced.in_use.report(version, named)
        return self.in_use.report(version, named)

    def _refuse(self, error: Exception) -> None:
        self._plan = None
        self._refused = str(error) if isinstance(error, PlanRefused) else f"{type(error).__name__}: {error}"
        log.warning("apply: reload. Weights cannot be copied directly: %s", self._refused)

    def failed(self) -> None:
        """The live weights are a mixture: the next version goes through a reload, which proves the plan again."""
        self._plan = None
        self._applied = None
        self._forget_reload()

    def _forget_reload(self) -> None:
        self._recorder = None
        self._effects = None


def unchanged_names(applied: WeightManifest | None, manifest: WeightManifest) -> set[str]:
    """Names whose tensors are equal under both manifests because neither carries or adapts them."""
    if applied is None or applied.patch is None or manifest.patch is None:
        return set()
    names = {name for name, _ in set(applied.patch.base) & set(manifest.patch.base)}
    for carrier in (applied, manifest):
        names -= {entry.name.removesuffix(LORA_A) + WEIGHT for entry in carrier.layout.tensors}
    tied = set(applied.patch.tied) & set(manifest.patch.tied)
    return names | {name for name, original in tied if original in names}


class _Derived(NamedTuple):
    """What a module holds besides parameters and submodules, and the digest of its content if it is a tensor."""

    held: object
    digest: int


_NOTHING = _Derived(None, 0)


def _derived(model: torch.nn.Module) -> Iterator[tuple[str, _Derived]]:
    """Tensors and functions that modules hold besides parameters and submodules, by their path."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            # vLLM puts buffers back, so that only their values count.
            yield f"{module_name}.{name}", _Derived(None, _content(buffer))
        for name, value in vars(module).items():
            if name in (PACKED, "kv_cache") or name.startswith("_"):
                continue
            for path, held in _with_attributes(name, value):
                if isinstance(held, torch.Tensor):
                    yield f"{module_name}.{path}", _Derived(held, _content(held))
                elif callable(held) and not isinstance(held, torch.nn.Module | type):
                    yield f"{module_name}.{path}", _Derived(held, 0)


def _with_attributes(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A value and, unless it is a module or a class, what it holds itself."""
    yield name, value
    if not isinstance(value, torch.nn.Module | type):
        for key, attribute in getattr(value, "__dict__", {}).items():
            yield f"{name}.{key}", attribute


def _content(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else digest(tensor.detach().contiguous())


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under every name it has, so that a tied one comes with each of its layers."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{module_name}.{name}", parameter


class _Span(NamedTuple):
    """The memory that a view covers."""

    address: int
    shape: torch.Size
    stride: tuple[int, ...]


def _span(tensor: torch.Tensor) -> _Span:
    return _Span(tensor.data_ptr(), tensor.shape, tensor.stride())


def _copies_to(loaded: Loaded, name: str, tensor: torch.Tensor) -> dict[tuple[_Span, _Span], CopyPair]:
    """What of the checkpoint's tensor `name` is copied into this parameter, by where it lies and where it goes."""
    # Cast now: a folded adapter's float32 result need not live until the swap.
    return {
        (_span(live), _span(source)): (live, source.to(live.dtype))
        for live, source in loaded.pairs(loaded.live, name, tensor)
    }


def _wait_for_casts(copies: list[CopyPair]) -> None:
    """On a GPU the engine's thread, which will copy, reads on a stream of its own."""
    if copies and copies[0][0].is_cuda:
        torch.cuda.current_stream(copies[0][0].device).synchronize()


def _by_source(items: list[_T], loaded_of: Callable[[_T], Loaded], unchanged: set[str]) -> dict[str, list[_T]]:
    """Checkpoint name → what needs it, without what rests on `unchanged` names alone."""
    needing: dict[str, list[_T]] = defaultdict(list)
    for item in items:
        sources = loaded_of(item).writes.keys()
        if sources - unchanged:
            for source in sources:
                needing[source].append(item)
    return needing


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return digest(left.contiguous()) == digest(right.contiguous())
