"""Layers that compute from a packed copy of their weight: how one is made from a checkpoint, and what it holds.

On CPUs vLLM keeps that copy behind the attribute `cpu_linear`, where nobody can read it. Two things can be known of it
all the same: which bits it was packed from, if we packed it (`Packed`), and what it computes. A row that is 1 at one
place and 0 elsewhere gives a column of the weight, exactly, because nothing is rounded (`Pack.read`).

Such a layer must never compute in two threads at once: oneDNN's products keep their arguments in the layer's handler
and their scratch memory in one place for the whole process. A second thread spoils the results of both, and the heap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from asyncrl.generator.engines.vllm.load_recorder import Loaded
from asyncrl.weights.bytes.digest import digest

PACKED = "cpu_linear"  # the attribute that vLLM keeps a packed weight behind
READ_ROWS = 256  # columns of a weight that are read at once

PackedLinear = Callable[..., torch.Tensor]  # what vLLM puts behind `cpu_linear`


class Packed(NamedTuple):
    """What stands behind `cpu_linear`, and the digest of the weight that it was packed from."""

    linear: PackedLinear
    weight_digest: int


class ReadColumns(NamedTuple):
    """Columns of the weight that a layer computes with."""

    linear: PackedLinear  # what stood behind `cpu_linear`
    columns: Sequence[int]
    values: torch.Tensor  # [columns, rows of the weight]

    def are_of(self, weight: torch.Tensor) -> bool:
        """Whether they are those of `weight`: bit for bit, but for the sign of a zero."""
        for start in range(0, len(self.columns), READ_ROWS):
            stop = start + READ_ROWS
            chosen = torch.tensor(self.columns[start:stop])
            if not _same_values(self.values[start:stop], weight[:, chosen].T):
                return False
        return True


@dataclass(slots=True)
class Pack:
    """A layer that computes from a packed copy of its weight."""

    layer: torch.nn.Module
    weight: Loaded

    @property
    def live(self) -> PackedLinear | None:
        """What the layer computes with now."""
        return vars(self.layer).get(PACKED)

    def packed(self, weight: torch.Tensor) -> Packed:
        """What vLLM would put behind `cpu_linear` for this weight."""
        stand_in = torch.nn.Module()
        stand_in.weight = torch.nn.Parameter(weight, requires_grad=False)
        measured = digest(weight.contiguous())
        quant_method: Any = self.layer.quant_method  # a class of vLLM's for each kind of layer
        quant_method.process_weights_after_loading(stand_in)
        return Packed(vars(stand_in)[PACKED], measured)

    def read(self, linear: PackedLinear, columns: Sequence[int]) -> ReadColumns:
        """What `linear` computes with. In the engine's own thread, while it samples nothing."""
        like = self.weight.tensor
        device = self.weight.live.device
        values = torch.empty(len(columns), like.shape[0], dtype=like.dtype, device=device)
        for start in range(0, len(columns), READ_ROWS):
            chosen = torch.tensor(columns[start : start + READ_ROWS])
            probe = torch.zeros(len(chosen), like.shape[1], dtype=like.dtype, device=device)
            probe[torch.arange(len(chosen)), chosen] = 1
            values[start : start + READ_ROWS] = linear(probe, self.layer.weight, None)
        return ReadColumns(linear, columns, values)


class Assembly:
    """Puts weights together that each come from one or more checkpoint tensors."""

    def __init__(self) -> None:
        self._begun: dict[int, tuple[torch.Tensor, set[str]]] = {}  # the weight, and the tensors that it still lacks

    def add(self, loaded: Loaded, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The checkpoint's tensor `name` has come for this parameter. Returns the parameter once it is complete."""
        if id(loaded) not in self._begun:
            self._begun[id(loaded)] = new_weight(loaded), set(loaded.writes)
        weight, lacking = self._begun[id(loaded)]
        for target, source in loaded.pairs(weight, name, tensor):
            target.copy_(source)
        lacking.discard(name)
        if lacking:
            return None
        del self._begun[id(loaded)]
        return weight


def new_weight(loaded: Loaded) -> torch.Tensor:
    """Memory of a parameter, constants written. Of its own: a packed form may go on using it."""
    like = loaded.tensor
    weight = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=loaded.live.device).zero_()
    for write in loaded.constants:
        write.target.of(weight).fill_(write.constant)
    return weight


def _same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    if torch.equal(left, right):
        return True
    tiny = torch.finfo(right.dtype).tiny  # matrix units take subnormal numbers for zeros
    return torch.equal(*(torch.where(side.abs() < tiny, 0, side) for side in (left, right)))
