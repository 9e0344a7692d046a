"""How long things take and how long completions are: distributions that a simulated run draws from."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Distribution(Protocol):
    """Numbers to draw: seconds, or tokens."""

    def draw(self, rng: random.Random) -> float:
        """One number."""

    def times(self, factor: float) -> Distribution:
        """Every number so many times as large."""

    @property
    def mean(self) -> float:
        """The mean of all that could be drawn."""


@dataclass(frozen=True, slots=True)
class Constant:
    """The same number at each draw."""

    value: float

    def draw(self, rng: random.Random) -> float:
        """See `Distribution.draw`."""
        return self.value

    def times(self, factor: float) -> Constant:
        """See `Distribution.times`."""
        return Constant(factor * self.value)

    @property
    def mean(self) -> float:
        """See `Distribution.mean`."""
        return self.value


@dataclass(frozen=True, slots=True)
class Measured:
    """One of the numbers that were measured, each as likely as the others."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.values, "nothing was measured"

    def draw(self, rng: random.Random) -> float:
        """See `Distribution.draw`."""
        return self.values[int(rng.random() * len(self.values))]

    def times(self, factor: float) -> Measured:
        """See `Distribution.times`."""
        return Measured(tuple(factor * value for value in self.values))

    @property
    def mean(self) -> float:
        """See `Distribution.mean`."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal law, its draws cut at `most`. centre is its mean before the cut, sigma that of the logarithm."""

    centre: float
    sigma: float
    most: float

    def draw(self, rng: random.Random) -> float:
        """See `Distribution.draw`."""
        return min(self.most, rng.lognormvariate(math.log(self.centre) - self.sigma**2 / 2, self.sigma))

    def times(self, factor: float) -> LogNormal:
        """See `Distribution.times`."""
        return LogNormal(factor * self.centre, self.sigma, factor * self.most)

    @property
    def mean(self) -> float:
        """E[min(X, most)] = centre Phi(d - sigma) + most (1 - Phi(d)), with d the place of `most` in deviations."""
        if self.sigma == 0:
            return min(self.centre, self.most)
        deviations = (math.log(self.most / self.centre) + self.sigma**2 / 2) / self.sigma
        return self.centre * _normal_cdf(deviations - self.sigma) + self.most * (1 - _normal_cdf(deviations))


def measured(values: Sequence[float], otherwise: float) -> Distribution:
    """What was measured, or the constant `otherwise` where nothing was."""
    return Measured(tuple(values)) if values else Constant(otherwise)


def _normal_cdf(place: float) -> float:
    return (1 + math.erf(place / math.sqrt(2))) / 2
