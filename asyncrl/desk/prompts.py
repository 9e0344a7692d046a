"""The prompt that each lease is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from asyncrl.replay.lease_book import LeaseBook
from asyncrl.tasks.prompts import Prompt
from asyncrl.types import LeaseKey, LeaseKind


class TrainPrompts(Protocol):
    """Where training prompts come from: `tasks.prompts.PromptSource`."""

    def train(self, ordinal: int) -> Prompt:
        """The prompt of a training ordinal; the same one each time."""
        ...


class LeasedPrompts:
    """Training prompts by ordinal, held-out ones by their place in the evaluation that the lease book has now."""

    def __init__(self, source: TrainPrompts, evals: Sequence[Prompt], leases: LeaseBook) -> None:
        self._source = source
        self._evals = evals
        self._leases = leases

    @property
    def num_evals(self) -> int:
        """Prompts of one evaluation; 0 when nothing is evaluated."""
        return len(self._evals)

    def of(self, key: LeaseKey) -> Prompt:
        """The prompt of a lease. An eval lease must belong to the current evaluation."""
        if key.kind is LeaseKind.TRAIN:
            return self._source.train(key.ordinal)
        assert self._leases.evaluation is not None, "eval leases belong to an evaluation"
        return self._evals[self._leases.evaluation.prompt_index(key.ordinal)]
