"""Lengths of completions for comparisons with peers, and batches of token ids that have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LAWS = ("equal", "lognormal")
FIRST_TOKEN = 2  # after padding and end
NOISE_NATS = 0.1  # of old log-probs around those of a policy that finds all tokens alike: some ratios are clipped


def draw_lengths(law: str, count: int, *, mean: int, cap: int, rng: np.random.Generator) -> np.ndarray:
    """`count` lengths, int64: all `mean`, or lognormal with sigma 1 and that mean, at least 1 and at most `cap`."""
    if law == "equal":
        return np.full(count, mean, dtype=np.int64)
    assert law == "lognormal", law
    drawn = rng.lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(np.rint(drawn), 1, cap).astype(np.int64)


def lognormal_shares(*, mean: int, cap: int) -> np.ndarray:
    """Probability of each length 1..cap under `draw_lengths("lognormal", ...)`, float64 [cap]; they add up to 1."""
    from math import erf, log, sqrt

    edges = [0.5 * (1.0 + erf((log(edge) - log(mean) + 0.5) / sqrt(2.0))) for edge in np.arange(1.5, cap)]
    shares: np.ndarray = np.diff(np.array([0.0, *edges, 1.0]))
    return shares


def write_batch(
    path: Path, lengths: np.ndarray, *, vocab: int, prompt_tokens: int, group_size: int, rng: np.random.Generator
) -> None:
    """A batch as both sides read it: arrays of one row per completion, or of one value per completion token, flat.

    Advantages are rewards less their group's mean, over the group's standard deviation.
    """
    total = int(lengths.sum())
    prompts = rng.integers(FIRST_TOKEN, vocab, (len(lengths) // group_size, prompt_tokens))
    rewards = np.tile(np.arange(group_size) % 2, len(prompts)).astype(np.float64)
    table = rewards.reshape(-1, group_size)
    centred = table - table.mean(axis=1, keepdims=True)
    np.savez(
        path,
        lengths=lengths,
        prompts=np.repeat(prompts, group_size, axis=0).astype(np.int32),
        tokens=rng.integers(FIRST_TOKEN, vocab, total).astype(np.int32),
        old_logprobs=(rng.normal(-np.log(vocab), NOISE_NATS, total)).astype(np.float32),
        rewards=rewards,
        advantages=(centred / table.std(axis=1, ddof=1, keepdims=True)).ravel(),
    )
