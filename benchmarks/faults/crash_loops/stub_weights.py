"""Weights of a few bytes: what the stub trainer offers and the stub engines hold, without a transfer.

The bytes of a version follow from the trainer's chain, and its digests and canary follow from the bytes. A stub engine
"receives" a version by believing the manifest: these runs are about results and acknowledgements, not about weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from asyncrl.link.weight_records import ALIGNMENT, WeightLayout, WeightManifest
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE

NUM_BUCKETS = 2
CANARY = (3, 1, 4, 1, 5)


def manifest_of(version: int, chain: bytes) -> WeightManifest:
    """The manifest of a version whose weights follow from `chain`."""
    digests = tuple(
        int.from_bytes(hashlib.sha256(chain + bytes([n])).digest()[:7], "little") for n in range(NUM_BUCKETS)
    )
    buckets = tuple((n * ALIGNMENT, (n + 1) * ALIGNMENT) for n in range(NUM_BUCKETS))
    return WeightManifest(version, WeightLayout(NUM_BUCKETS * ALIGNMENT, (), buckets), digests)


def canary_row(digests: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Log-probs of a sequence, float32 [tokens - 1], under the weights with these digests."""
    seen = hashlib.sha256(repr((tuple(digests), tuple(tokens))).encode()).digest()[: len(tokens) - 1]
    return -np.frombuffer(seen, np.uint8).astype(LOGPROB_DTYPE) / 256


def canary_tokens() -> bytes:
    """The one sequence of the canary."""
    return np.array(CANARY, TOKEN_DTYPE).tobytes()
