"""What a step of an engine takes: a line fitted to the steps that it made, in the run as it is.

A step that samples a token for each of n sequences, and computes p prompt tokens of those that are new, takes

    fixed + n * sequence + p * what a prompt token takes

Some steps take much longer than their sequences ask for: other processes had the cores, a canary was scored. None takes
much less. So the line is that of a quantile, a quarter of the steps lie below it, and not that of least squares, which
slow steps would lift. Steps with few sequences are rare in a busy engine and say most about the fixed part: the newest
steps of each number of sequences are kept, and not the newest of all.

Prompts are told as what each new sequence adds on average, less what the prefix cache saved it.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

KEPT_STEPS = 128  # of each class of numbers of sequences
CLASSES_PER_OCTAVE = 4
MIN_STEPS = 64
REFIT_STEPS = 2000  # at most from one fit to the next, and a quarter of all before: a fit takes some 10 ms
MIN_SPREAD = 2.0  # 95 / 5 percent quantile of their numbers of sequences: with less the parts cannot be told apart
QUANTILE = 0.25
ROUNDS = 30
MAX_STEP_S = 60.0  # the process was stopped, or the host slept
PARTS = ("fixed", "sequence", "new_sequence")


class StepTimes:
    """Keeps steps of one engine, and fits the line to them."""

    def __init__(self) -> None:
        self._ended_at: float | None = None
        self._kept: dict[int, deque[tuple[float, int, int, int]]] = {}
        self._count = 0  # steps that told something
        self._fit_at = MIN_STEPS  # the count at the next fit
        self._line_ms: dict[str, float] = {}

    def ended(self, at: float, sequences: int, prompt_tokens: int, *, continued: int) -> None:
        """A step ended that sampled for `sequences`, of which `continued` had a token before.

        at: seconds of a monotonic clock. A step that continues none may have begun after a pause and tells nothing.
        """
        began_at, self._ended_at = self._ended_at, at
        if began_at is None or not continued or not 0.0 < at - began_at < MAX_STEP_S:
            return
        place = int(CLASSES_PER_OCTAVE * math.log2(sequences))
        kept = self._kept.setdefault(place, deque(maxlen=KEPT_STEPS))
        kept.append((at - began_at, sequences, prompt_tokens, sequences - continued))
        self._count += 1

    def interrupted(self) -> None:
        """The engine stands still: its next step does not follow the last one at once."""
        self._ended_at = None

    def fit_ms(self) -> dict[str, float]:
        """The parts of the line in ms, by name; empty while the steps do not tell them apart."""
        if self._count >= self._fit_at:
            self._fit_at = self._count + min(REFIT_STEPS, self._count // 4)
            self._line_ms = self._fitted_ms()
        return self._line_ms

    def _fitted_ms(self) -> dict[str, float]:
        steps = np.array([step for kept in self._kept.values() for step in kept], dtype=np.float64)
        durations, sequences, prompt_tokens, new = steps.T
        few, many = np.quantile(sequences, (0.05, 0.95))
        if many < MIN_SPREAD * few:
            return {}
        line = quantile_line(np.column_stack([np.ones(len(steps)), sequences, prompt_tokens]), durations, QUANTILE)
        line[2] *= prompt_tokens.sum() / max(1.0, new.sum())
        return dict(zip(PARTS, (1e3 * line).tolist(), strict=True))


def quantile_line(columns: np.ndarray, figures: np.ndarray, quantile: float) -> np.ndarray:
    """The line below which a part `quantile` of the figures lies at any place, none of its terms below 0.

    Distances count as shares of the line, since what takes longer also varies more. Iterated least squares, where each
    figure weighs the inverse of its distance: no figure far off pulls the line.

    columns: float64 [N, terms]; figures: float64 [N], above 0. Returns float64 [terms].
    """
    used = np.flatnonzero(columns.any(axis=0))
    line = np.zeros(columns.shape[1])
    while len(used):
        line[:] = 0.0
        line[used] = _signed_line(columns[:, used], figures, quantile)
        if (line[used] >= 0.0).all():
            break
        used = np.delete(used, np.argmin(line[used] * columns[:, used].mean(axis=0)))
    return line


def _signed_line(columns: np.ndarray, figures: np.ndarray, quantile: float) -> np.ndarray:
    scale = figures
    weights = np.ones(len(figures))
    line = np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights) / scale
        line = np.linalg.lstsq(columns * root[:, None], figures * root, rcond=None)[0]
        there = np.maximum(columns @ line, 0.01 * figures)
        scale = there
        off = (figures - there) / there
        weights = np.where(off > 0, quantile, 1 - quantile) / np.maximum(np.abs(off), 1e-3)
    return line
