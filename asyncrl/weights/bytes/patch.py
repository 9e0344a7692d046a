"""Weight syncs that carry only what is trained: where the rest is, and how an adapter becomes a weight.

Receivers have the initial model in a folder of their own. A manifest with a `Patch` carries some tensors of the
policy; the others are the folder's, unchanged, and the patch tells which those are and what their bytes must be.
Needs torch only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asyncrl.errors import ProtocolError

WEIGHT, LORA_A, LORA_B = ".weight", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Patch:
    """What completes the tensors of a manifest to a policy.

    base: (name, digest) of the tensors of the initial model that do not travel; the digest is that of their values
        in float32, in whatever dtype the folder stores them.
    tied: (name, original) of tensors that are another one of the base under a second name.
    scale: None, or: the manifest carries pairs `X.lora_A.weight` [rank, in] and `X.lora_B.weight` [out, rank], each
        of which folds into the base tensor `X.weight` [out, in], see `fold_adapter`.
    """

    base: tuple[tuple[str, int], ...]
    tied: tuple[tuple[str, str], ...] = ()
    scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: fit for msgpack."""
        return {"base": [list(pair) for pair in self.base], "tied": [list(pair) for pair in self.tied]} | (
            {} if self.scale is None else {"scale": self.scale}
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Patch:
        """Read what a peer sent. Raises ProtocolError when a field is missing or malformed."""
        try:
            scale = data.get("scale")
            return cls(
                base=tuple((str(name), int(digest)) for name, digest in data["base"]),
                tied=tuple((str(name), str(original)) for name, original in data["tied"]),
                scale=None if scale is None else float(scale),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"weight patch is malformed: {error!r}; both daemons must run one version") from error


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
    """weight + scale * lora_b @ lora_a, float32 [out, in] (Hu et al. 2021, LoRA, section 4.1).

    Learner and generators call this one function on float32 values, so that they hold the same weights.
    """
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)
