"""Weight syncs that carry only what is trained: where the rest is, and how an adapter becomes a weight.

Receivers have the initial model in a folder of their own. A manifest with a `Patch` carries some tensors of the
policy; the others are the folder's, unchanged, and the patch tells which those are and what their bytes must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from asyncrl.link.weight_records import Patch
from asyncrl.storage.checkpoint_files import LORA_A, LORA_B

__all__ = ["LORA_A", "LORA_B", "WEIGHT", "AdaptedWeight", "SyncSource", "fold_adapter"]

# How names of tensors end, as LORA_A and LORA_B.
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class AdaptedWeight:
    """A frozen weight and the adapter that is trained beside it, by reference."""

    weight: torch.Tensor  # [out, in]
    lora_a: torch.Tensor  # [rank, in]
    lora_b: torch.Tensor  # [out, rank]
    scale: float

    def merged(self) -> torch.Tensor:
        """The weight with its adapter as it is now, float32."""
        return fold_adapter(self.weight, self.lora_a, self.lora_b, self.scale)


@dataclass(frozen=True, slots=True)
class SyncSource:
    """What a learner publishes: (name, tensor) pairs, read again at every snapshot.

    Tensors named in `adapted` are published merged. Without a `patch` the pairs are the whole policy.
    """

    named: list[tuple[str, torch.Tensor]]
    adapted: Mapping[str, AdaptedWeight] = field(default_factory=dict)
    patch: Patch | None = None


@torch.no_grad()
def fold_adapter(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """The weight with its adapter folded in, float32 [out, in] (Hu et al. 2021, LoRA, section 4.1).

        weight + scale * lora_b @ lora_a

    Learner and generators call this one function on float32 values, so that they hold the same weights.
    """
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)
