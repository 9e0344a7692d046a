"""Which example is trained when: a curriculum, and the shares of a mix. Pure functions of the index, without a list."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

from asyncrl.tasks.shuffle import shuffled_index

STAGES = 16  # in which the window of a curriculum grows
MAX_CYCLE = 10_000  # prompts after which the order of a mix repeats; finer shares are rounded to it


def epoch_index(index: int, size: int, *key: int | str) -> int:
    """Which of `size` examples is number `index` of an endless sequence of epochs, each a new shuffle of all."""
    epoch, place = divmod(index, size)
    return shuffled_index(place, size, *key, epoch)


def curriculum_index(index: int, size: int, length: int, seed: int) -> int:
    """Which of `size` examples, easiest first, is number `index` of a curriculum of `length` prompts.

    In STAGES equal stages the window grows from the easiest sixteenth to all examples; in each, the window is taken in
    shuffles without repetition. Behind it come epochs of all examples.
    """
    if index >= length:
        return epoch_index(index - length, size, "epoch", seed)
    stages = min(STAGES, length)
    stage = index * stages // length
    start = -(-stage * length // stages)
    window = -(-size * (stage + 1) // stages)
    return epoch_index(index - start, window, "curriculum", seed, stage)


class Shares:
    """Deals an endless sequence of places by weights.

    After any number n of places each has been dealt n x its share of them, rounded down or up; so any window of n
    places has it within two. It is Pfair scheduling on one processor: place j of a share s lies between j / s and
    (j + 1) / s, and of those that may come the one that must come first does (Baruah et al., "Proportionate Progress",
    1996).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = _whole(weights)  # in one cycle
        self._cycle: list[tuple[int, int]] = []  # who gets a place, and its number among theirs
        dealt = [0] * len(self.counts)
        length = sum(self.counts)
        for place in range(length):
            due = [
                (-(-(done + 1) * length // count), who)
                for who, (done, count) in enumerate(zip(dealt, self.counts, strict=True))
                if done * length // count <= place and done < count
            ]
            _, who = min(due)
            self._cycle.append((who, dealt[who]))
            dealt[who] += 1

    def of(self, index: int) -> tuple[int, int]:
        """Who gets place `index`, and how many they got before it."""
        cycle, place = divmod(index, len(self._cycle))
        who, number = self._cycle[place]
        return who, cycle * self.counts[who] + number


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the weights: exactly, unless these would add up to over MAX_CYCLE."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length > MAX_CYCLE:
        length = MAX_CYCLE
    counts = [max(1, round(share * length)) for share in shares]
    shared = gcd(*counts)
    return [count // shared for count in counts]
