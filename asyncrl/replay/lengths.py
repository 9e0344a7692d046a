"""Histogram of completion lengths, fine enough to compare deciles, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_BINS_PER_OCTAVE = 8
_EDGES = np.unique(np.floor(2.0 ** (np.arange(24 * _BINS_PER_OCTAVE + 1) / _BINS_PER_OCTAVE)).astype(np.int64))


class LengthHistogram:
    """Counts lengths in tokens: a bin per length up to 11, then bins about 9 % wide, to 16 million tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_EDGES), dtype=np.int64)

    def add(self, lengths: Iterable[int]) -> None:
        """Counts each length; 0 counts as 1."""
        bins = np.searchsorted(_EDGES, np.maximum(np.fromiter(lengths, dtype=np.int64), 1), side="right") - 1
        np.add.at(self._counts, bins, 1)

    def by_decile_of(self, population: LengthHistogram) -> list[float]:
        """Spreads these counts over the deciles of `population`, shortest tenth first; they sum to the total.

        A bin that lies across several deciles (many equal lengths) is shared among them by how much of each it covers,
        so that counts drawn from the population at random come out even.
        """
        deciles = np.zeros(10)
        upper = np.cumsum(population._counts) / max(population._counts.sum(), 1) * 10
        lower = np.concatenate(([0.0], upper[:-1]))
        for index in np.flatnonzero(self._counts):
            width = upper[index] - lower[index]
            assert width > 0, "counted here but not in the population"
            overlap = np.minimum(upper[index], np.arange(1, 11)) - np.maximum(lower[index], np.arange(10))
            deciles += self._counts[index] * np.maximum(overlap, 0.0) / width
        return [float(count) for count in deciles]
