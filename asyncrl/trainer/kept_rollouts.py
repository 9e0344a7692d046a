"""Rollouts of a step that are kept to be written: what the trainer made of their tokens, collected from all ranks.

    rank 0   chooses some of the batch; their indices travel with the plan
    each     notes the log-probs of its passes; at the end, what it has of those rollouts is summed over the ranks

On a step that keeps none, nothing is noted and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncrl.algorithms.reducer import Reducer
from asyncrl.report.rollouts.choice import Choice
from asyncrl.report.rollouts.records import KeptRollout
from asyncrl.trainer.batch import MicroBatchData, MiniBatchData
from asyncrl.trainer.plan import BatchPlan
from asyncrl.types import Group

_ROWS = 3  # log-probs at the start of the step, log-probs at the last pass, advantages


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """What the trainer made of one rollout's T tokens, each float32 [T]; None where it made no such thing of them.

    A rollout whose group has equal rewards has no pass, and so none of these, unless the loss has other terms.
    """

    old_logprobs: np.ndarray | None = None
    current_logprobs: np.ndarray | None = None
    advantages: np.ndarray | None = None


class TokenNotes:
    """Notes the log-probs of passes over the rollouts that a plan keeps."""

    def __init__(self, plan: BatchPlan) -> None:
        self._slot = {int(index): slot for slot, index in enumerate(plan.kept)}
        self._starts = np.cumsum([0, *plan.kept_tokens.tolist()])
        self._last: dict[int, Tensor] = {}  # by the id of a micro-batch's data, which lives as long as the step

    def take(self, data: MicroBatchData, logprobs: Tensor) -> None:
        """The actor's log-probs [N] at a pass over a micro-batch; those of a later pass replace them."""
        if self._slot and not data.is_dummy:
            self._last[id(data)] = logprobs.detach().clone()

    def collect(self, mini_batches: Sequence[MiniBatchData], ranks: Reducer, *, one_update: bool) -> list[TokenFigures]:
        """What all ranks noted of each rollout that is kept. All ranks call this at the end of a step.

        mini_batches  of this rank, prepared
        one_update    whether the step had one: its pass is then the one at the start of the step
        """
        if not self._slot:
            return []
        values = torch.zeros(_ROWS, int(self._starts[-1]), dtype=torch.float64)
        is_there = torch.zeros(_ROWS, len(self._slot), dtype=torch.float64)
        for mini_batch in mini_batches:
            for data in mini_batch.micro_batches:
                if not data.is_dummy:
                    self._add(data, values, is_there, one_update=one_update)
        total = ranks.sum(torch.cat([values.flatten(), is_there.flatten()]))
        values, is_there = total[: values.numel()].view_as(values), total[values.numel() :].view_as(is_there)
        return [self._figures(slot, values, is_there) for slot in range(len(self._slot))]

    def _add(self, data: MicroBatchData, values: Tensor, is_there: Tensor, *, one_update: bool) -> None:
        """Adds what is known of a micro-batch's tokens."""
        rollouts = enumerate(data.rollout_index.tolist())
        own = [(place, self._slot[index]) for place, index in rollouts if index in self._slot]
        if not own:
            return
        last = self._last.get(id(data))
        old = last if data.start_logprobs is None and one_update else data.start_logprobs
        rows = (old, None if one_update else last, data.advantages)
        sequence_index = data.sequence_index.cpu()
        known = [(row, tensor.detach().double().cpu()) for row, tensor in enumerate(rows) if tensor is not None]
        for place, slot in own:
            tokens = sequence_index == place
            for row, tensor in known:
                values[row, self._starts[slot] : self._starts[slot + 1]] = tensor[tokens]
                is_there[row, slot] = 1.0

    def _figures(self, slot: int, values: Tensor, is_there: Tensor) -> TokenFigures:
        own = values[:, self._starts[slot] : self._starts[slot + 1]].to(torch.float32).numpy()
        old, current, advantages = (own[row] if is_there[row, slot] else None for row in range(_ROWS))
        return TokenFigures(old, current, advantages)


def kept_rollouts(
    groups: Sequence[Group], plan: BatchPlan, choices: Sequence[Choice], figures: Sequence[TokenFigures]
) -> list[KeptRollout]:
    """The chosen rollouts of a batch with what the trainer made of them; `choices` are those of `plan.kept`."""
    every = [(group, place) for group in groups for place in range(len(group.rollouts))]
    kept = []
    for choice, made in zip(choices, figures, strict=True):
        group, place = every[choice.number]
        by_token = made.advantages
        differ = by_token is not None and bool((by_token != by_token[0]).any())
        advantage = None if by_token is None else float(by_token.mean(dtype=np.float64))
        if plan.advantages is not None:
            advantage = float(plan.advantages[choice.number])
        kept.append(
            KeptRollout(
                ordinal=group.key.ordinal,
                attempt=group.key.attempt,
                place=place,
                why=choice.why,
                prompt_ids=group.prompt_token_ids,
                rollout=group.rollouts[place],
                advantage=advantage,
                token_advantages=by_token if differ else None,
                old_logprobs=made.old_logprobs,
                current_logprobs=made.current_logprobs,
            )
        )
    return kept
