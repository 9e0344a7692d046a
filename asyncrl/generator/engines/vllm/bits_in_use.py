"""Compares what a worker computes with after a swap with the bytes that were staged: every element of every parameter.

Which element comes from where is known from the first reload, which `LoadRecorder` watched: views of checkpoint tensors
on one side, views of parameters on the other. It is a fact of the model's code, so it holds for reloads and for copies
in place alike, and it owes nothing to the plan that copies are made by (`direct_apply`): what that plan forgets is
found here.

What the engine keeps in another form is computed once more from the staged bytes: casts, fused and sharded weights,
folded adapters, packed matrices (`packed_weights`), experts in the layout of a kernel (`expert_weights`). What can be
compared in no way is named in `not_compared`; for that, the canary is all there is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from asyncrl.generator.engines.vllm.expert_weights import Experts
from asyncrl.generator.engines.vllm.load_recorder import Loaded, LoadRecorder
from asyncrl.generator.engines.vllm.packed_weights import PACKED, Assembly, Pack, Packed, ReadColumns
from asyncrl.generator.engines.vllm.slices import in_boxes
from asyncrl.link.weight_records import BitsInUse
from asyncrl.weights.bytes.boxes import Box
from asyncrl.weights.bytes.digest import digest

_T = TypeVar("_T")

READ_BACK = 4  # columns of each packed weight that are read at every swap, others each time
NAMED = 8  # names in a report; a fault that is everywhere need not fill a message
# vLLM's methods that keep a weight as it was loaded, or pack it behind `cpu_linear`
_AS_LOADED = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class InUseCheck:
    """How every parameter of one worker's model can be compared. Make it with `of_reload`."""

    plain: list[Loaded] = field(default_factory=list)  # kept as loaded
    packs: list[Pack] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)  # parameter → why
    _ledger: dict[int, Packed] = field(default_factory=dict)  # by layer: what we know to be behind `cpu_linear`
    _read: dict[int, ReadColumns] = field(default_factory=dict)  # by layer: what the newest swap put in place
    _turn: int = 0

    @classmethod
    def of_reload(
        cls, model: torch.nn.Module, recorder: LoadRecorder, unlike: str, named: Iterable[tuple[str, torch.Tensor]]
    ) -> InUseCheck:
        """What can be compared after the first reload, which has just ended and brought `named`.

        `unlike` tells what else changed in it, see `SideEffects`. A parameter that is kept in a form we do not know
        differs at once, and is left to the canary; one of a layer that keeps weights as they are loaded is not: if it
        differs, it is wrong.
        """
        check = cls()
        if unlike:
            check.not_compared["(derived)"] = unlike
        unknown: list[Loaded] = []
        for loaded in recorder.loaded.values():
            if isinstance(getattr(loaded.module, loaded.name), torch.nn.Parameter) and loaded.tensor.numel():
                check._sort_in(loaded, recorder, unknown)
        known = {loaded.label for loaded in check._all()} | check.not_compared.keys()
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                label = f"{module_name}.{name}"
                if label not in known and parameter.numel():
                    check.not_compared[label] = "no loader wrote it"
        for label in cls(plain=unknown)._differing(named) if unknown else ():
            check.plain = [loaded for loaded in check.plain if loaded.label != label]
            check.not_compared[label] = "it is kept in a form of its own"
        return check

    def _sort_in(self, loaded: Loaded, recorder: LoadRecorder, unknown: list[Loaded]) -> None:
        if complaint := recorder.complaints.get(loaded.label):
            self.not_compared[loaded.label] = complaint
            return
        if lacking := num_unwritten(loaded):
            self.not_compared[loaded.label] = f"{lacking} of {loaded.tensor.numel()} elements come from no tensor"
            return
        if (experts := Experts.of(loaded)) is not None:
            self.experts.append(experts)
            return
        is_packed = loaded.name == "weight" and PACKED in vars(loaded.module)
        if is_packed:
            self.packs.append(Pack(loaded.module, loaded))
        if loaded.live.shape == loaded.tensor.shape and loaded.live.stride() == loaded.tensor.stride():
            self.plain.append(loaded)
            method = getattr(loaded.module, "quant_method", None)
            if method is not None and type(method).__name__ not in _AS_LOADED or recorder.not_understood:
                unknown.append(loaded)
        elif loaded.live.numel() or not is_packed:
            self.not_compared[loaded.label] = "it is kept in a form of its own"

    def in_boxes(self, boxes: Mapping[str, Box]) -> InUseCheck:
        """The same comparison with what boxes hold of the tensors. What is known of packed matrices is shared."""
        return InUseCheck(
            [in_boxes(loaded, boxes) for loaded in self.plain],
            [Pack(pack.layer, in_boxes(pack.weight, boxes)) for pack in self.packs],
            [Experts(in_boxes(expert.weight, boxes), expert.isa) for expert in self.experts],
            self.not_compared,
            self._ledger,
            self._read,
        )

    def share_read(self, other: InUseCheck) -> None:
        """Takes what `other` has read back of packed matrices."""
        self._read = other._read

    def note_packed(self, layer: torch.nn.Module, packed: Packed) -> None:
        """Tells what was put behind the layer's `cpu_linear`. It is believed only while it stands there."""
        self._ledger[id(layer)] = packed

    @property
    def num_compared(self) -> int:
        """Parameters, one that is packed besides counted once."""
        return len({loaded.label for loaded in self._all()})

    @torch.no_grad()
    def read_packed(self) -> None:
        """Reads back from every packed matrix what `report` compares: a few columns, or all that vLLM packed itself.

        Right after a swap, in the engine's own thread while it samples nothing (see `packed_weights`).
        """
        self._read = {}
        for pack in self.packs:
            if (live := pack.live) is None:
                continue
            num_columns = pack.weight.tensor.shape[1]
            known = self._ledger.get(id(pack.layer))
            columns: Sequence[int] = range(num_columns)  # vLLM packed it, in a reload
            if known is not None and known.linear is live:
                first = self._turn * READ_BACK
                columns = [(first + index) % num_columns for index in range(min(READ_BACK, num_columns))]
            self._read[id(pack.layer)] = pack.read(live, columns)
        self._turn += 1

    @torch.no_grad()
    def report(self, version: int, named: Iterable[tuple[str, torch.Tensor]]) -> BitsInUse:
        """Compares with the tensors of `version`. Reads every parameter; changes nothing. After `read_packed`.

        May run beside generation: no layer computes here.
        """
        differing = sorted(set(self._differing(named)))
        left_out = [f"{label}: {why}" for label, why in sorted(self.not_compared.items())]
        return BitsInUse(version, self.num_compared, differing[:NAMED], left_out[:NAMED])

    def _all(self) -> Iterator[Loaded]:
        yield from self.plain
        yield from (pack.weight for pack in self.packs)
        yield from (experts.weight for experts in self.experts)

    def _differing(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        plain = _by_source(self.plain, lambda loaded: loaded)
        packs = _by_source(self.packs, lambda pack: pack.weight)
        experts = _by_source(self.experts, lambda expert: expert.weight)
        assembly, seen = Assembly(), set[str]()
        for name, tensor in named:
            seen.add(name)
            for loaded in plain.get(name, ()):
                pairs = loaded.pairs(loaded.live, name, tensor)
                if not all(_same_bits(live, source.to(live.device, live.dtype)) for live, source in pairs):
                    yield loaded.label
            for pack in packs.get(name, ()):
                weight = assembly.add(pack.weight, name, tensor)
                if weight is not None and not self._packs_this(pack, weight):
                    yield pack.weight.label
            for expert in experts.get(name, ()):
                weight = assembly.add(expert.weight, name, tensor)
                if weight is not None and not _same_bits(expert.live, expert.kept(weight)):
                    yield expert.weight.label
        for loaded in self._all():
            if loaded.writes.keys() - seen:
                yield loaded.label
        for loaded in self.plain:
            if not all(bool((write.target.of(loaded.live) == write.constant).all()) for write in loaded.constants):
                yield loaded.label

    def _packs_this(self, pack: Pack, weight: torch.Tensor) -> bool:
        read, known = self._read.get(id(pack.layer)), self._ledger.get(id(pack.layer))
        if read is None or not read.are_of(weight):
            return False
        measured = digest(weight.contiguous())
        if known is not None and known.linear is read.linear:
            return known.weight_digest == measured
        self._ledger[id(pack.layer)] = Packed(read.linear, measured)  # all columns were read
        return len(read.columns) == weight.shape[1]


def num_unwritten(loaded: Loaded) -> int:
    """Elements of a parameter that no write of its loaders reached; what was written twice counts once."""
    like = loaded.tensor
    reached = torch.empty_strided(like.shape, like.stride(), dtype=torch.bool).zero_()
    for writes in (*loaded.writes.values(), loaded.constants):
        for write in writes:
            write.target.of(reached).fill_(True)
    return like.numel() - int(reached.sum())


def _by_source(items: list[_T], loaded_of: Callable[[_T], Loaded]) -> dict[str, list[_T]]:
    needing: dict[str, list[_T]] = defaultdict(list)
    for item in items:
        for source in loaded_of(item).writes:
            needing[source].append(item)
    return needing


def _same_bits(live: torch.Tensor, expected: torch.Tensor) -> bool:
    """As integers: a zero has a sign, and a NaN equals itself."""
    if live.shape != expected.shape or live.dtype != expected.dtype:
        return False
    integer = _INTEGERS[live.element_size()]
    return torch.equal(live.view(integer), expected.view(integer))
