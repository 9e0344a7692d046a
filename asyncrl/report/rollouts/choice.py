"""Which steps have rollouts written, and which rollouts of a batch: the best, the worst, and others at random."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np


class Why(StrEnum):
    """Why a rollout was kept."""

    BEST = "best"
    WORST = "worst"
    RANDOM = "random"
    EVALUATED = "evaluated"  # the answer to a held-out prompt


class Choice(NamedTuple):
    """One rollout of a batch, by its number in it, and why it was chosen."""

    number: int
    why: Why


def is_due(step: int, last_step: int, every: int) -> bool:
    """Whether rollouts of the step that makes version `step` are written; every=0 is never."""
    return every > 0 and (step in (1, last_step) or step % every == 0)


def choose(rewards: np.ndarray, advantages: np.ndarray | None, count: int, seed: Sequence[int]) -> list[Choice]:
    """Chooses `count` of R rollouts, or all where there are fewer. The same arguments choose the same ones.

    rewards     float [R]
    advantages  float [R]; among equal rewards the larger magnitude counts as better, and as worse; None: not known

    About a third has the best rewards, as many of the others the worst, and the rest is random. Ties that are left are
    broken at random. Each rollout is chosen once; the best come first, then the worst, then the random ones.

    Example: rewards (0, 1, 2, 3, 4, 5), count 3 -> 5 best, 0 worst, and one of 1, 2, 3, 4 at random.
    """
    size = len(rewards)
    count = min(count, size)
    extremes = min((count + 1) // 3 if count > 1 else 0, size // 2)
    order = np.random.default_rng(list(seed)).permutation(size)
    place = np.argsort(order)  # of each rollout in the random order
    weight = np.zeros(size) if advantages is None else np.abs(advantages)
    best = np.lexsort((place, -weight, -rewards))[:extremes].tolist()
    taken = set(best)
    worst = [index for index in np.lexsort((place, -weight, rewards)).tolist() if index not in taken][:extremes]
    taken.update(worst)
    others = [index for index in order.tolist() if index not in taken][: count - len(taken)]
    chosen = ((best, Why.BEST), (worst, Why.WORST), (others, Why.RANDOM))
    return [Choice(index, why) for indices, why in chosen for index in indices]
