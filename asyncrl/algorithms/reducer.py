"""What a quantity over the whole batch needs of the other ranks, each of which holds some of the tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """Collectives: every rank calls them, in the same order, with tensors of the same dtype."""

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of all ranks' `values`."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum of all ranks' `values`."""
        ...

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """All ranks' `values` [N of each], one after the other, and where this rank's begin."""
        ...


class OneRank:
    """The reducer of a rank that has the whole batch."""

    def sum(self, values: Tensor) -> Tensor:
        """See `Reducer.sum`."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """See `Reducer.largest`."""
        return values

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """See `Reducer.gather`."""
        return values, 0
