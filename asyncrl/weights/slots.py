"""A sender's staging buffers. Rank 0 decides what each is for; all senders number them alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asyncrl.link.weight_records import DeltaInfo
from asyncrl.weights.bytes.delta import Delta
from asyncrl.weights.bytes.snapshot import SnapshotBuffer


@dataclass(slots=True)
class Slot:
    """One staging buffer and what it holds."""

    number: int
    buffer: SnapshotBuffer
    version: int | None = None
    canary_logprobs: list[np.ndarray] = field(default_factory=list)
    snapshot_ms: float = 0.0
    delta: Delta | None = None  # of what is sent from here, to this version from the one sent before
    delta_info: DeltaInfo | None = None  # of all senders; None when one of them has no delta
    encode_ms: float = 0.0
    sent: bool = False  # whole or as a delta, to at least one channel
    readers: int = 0  # channels that send from it, or will

    def forget_delta(self) -> None:
        """Lets go of up to half a model."""
        self.delta = self.delta_info = None
