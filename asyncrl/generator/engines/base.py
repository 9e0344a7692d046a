"""What the generator needs from a rollout engine, and the records that pass between them.

An engine holds one copy of the policy. It samples completions, scores given sequences, and takes new weights
while it samples. vLLM is one implementation (`generator.engines.vllm.engine`); nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from asyncrl.types import FinishReason, VersionSpan

if TYPE_CHECKING:
    from asyncrl.weights.channels.channel import ChannelSpec, WeightManifest


def nothing() -> None:
    """The callback of who wants none."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Sample `num_rollouts` completions of one prompt.

    temperature 0 is greedy. seeds, one per rollout, make sampling repeatable under equal weights; None draws
    from the engine's own stream. on_sequence_end is called for each sequence that has ended, also by failure.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    num_rollouts: int
    max_new_tokens: int
    temperature: float
    seeds: tuple[int, ...] | None = None
    on_sequence_end: Callable[[], None] = field(default=nothing, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion of T tokens.

    logprobs are those of the distribution that was sampled from, at the request's temperature (greedy: at
    temperature 1). version_spans are contiguous and cover [0, T). text has no special tokens.
    """

    token_ids: np.ndarray  # int32 [T], end token included
    logprobs: np.ndarray  # float32 [T]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True, slots=True)
class StageReport:
    """What the workers measured on the staged bytes: per worker, one digest per bucket."""

    digests: list[list[int]]
    # In the slowest worker: stage_ms, and its parts receive_ms, decode_ms (of a delta), verify_ms, prepare_ms
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SwapReport:
    """How long a swap held up generation, and where."""

    version: int
    # pause_ms: no token was sampled; apply_ms: part of it, in the slowest worker, and again as direct_ms or reload_ms
    timings_ms: dict[str, float]
    apply: str = "reload"  # "direct" when every worker copied the weights in place, "reload" when one had to load anew

    @property
    def pause_ms(self) -> float:
        return self.timings_ms["pause_ms"]

    @property
    def apply_ms(self) -> float:
        return self.timings_ms["apply_ms"]


class RolloutEngine(Protocol):
    """An engine that samples under a known policy version.

    It starts without one: `generate` and `score` raise EngineError until the first `stage_weights` and
    `swap_weights` succeeded. A swap that fails half-way, or whose weights turn out to be wrong (`taint`), leaves the
    engine *tainted*: `version` is None, what was being sampled fails, and nothing is sampled until a full stage and
    swap succeed.

    Every `timeout_s` bounds the call; when it expires, asyncrl.errors.DeadlineExceeded names what was waited
    for.
    """

    @property
    def version(self) -> int | None:
        """Policy version of the next sampled token; None before the first swap, during one, and if tainted."""
        ...

    @property
    def tainted(self) -> bool:
        """Whether the weights must not be sampled from: a mixture of versions, or not those of any."""
        ...

    @property
    def num_running(self) -> int:
        """Sequences that were submitted and have not ended."""
        ...

    @property
    def tokens_generated(self) -> int:
        """Tokens of finished completions since the start."""
        ...

    async def start(self) -> None:
        """Load the model, without weights of any version, and warm up."""
        ...

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Sample all rollouts of a request, in order of their seeds.

        Raises:
            EngineError: the engine died, is tainted or has no version yet, or the request was aborted.
            NonFiniteError: a log-prob is not finite.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Make `generate` of this request fail with EngineError. Unknown ids are ignored."""
        ...

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        """Log-probs at temperature 1 of tokens 1..L-1 of each sequence given those before: float32 [L-1]
        each.

        Raises:
            EngineError, DeadlineExceeded, NonFiniteError.
        """
        ...

    def check_alive(self) -> None:
        """Return unless the engine is known to have died; waits for nothing.

        Raises:
            EngineError: it died.
        """
        ...

    async def probe(self, timeout_s: float) -> None:
        """Return if the engine still samples (or, when tainted, still answers).

        Raises:
            EngineError, DeadlineExceeded: it does not.
        """
        ...

    async def join_channel(self, spec: ChannelSpec, timeout_s: float) -> None:
        """Connect all workers to a weight channel; `spec.rank` is the first worker's. Generation goes on.

        Raises:
            ChannelError, DeadlineExceeded, EngineError.
        """
        ...

    async def stage_weights(self, manifest: WeightManifest, timeout_s: float) -> StageReport:
        """Receive a version into the workers' staging buffers and verify its digests. Generation goes on.

        After a failure nothing is staged and the group is left; the weights in use are untouched.

        Raises:
            ChannelError: a member vanished, or a digest is not that of the manifest.
            DeadlineExceeded, EngineError.
        """
        ...

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        """Pause, load the staged version, resume. Running sequences keep their tokens and go on under it.

        Raises:
            EngineError: `version` is not staged (nothing has changed), or loading failed (the engine is
            tainted). DeadlineExceeded: the engine is tainted, unless it did not even tell what it has staged.
        """
        ...

    def taint(self, why: str) -> None:
        """The weights in use are not those of their version: fail what is being sampled and sample nothing more.

        A later sync may bring the same version again, then rightly: what was begun before must not live to see it.
        """
        ...

    async def leave_channel(self) -> None:
        """Disconnect all workers from their weight channel and drop what is staged. Without one: nothing."""
        ...

    async def close(self) -> None:
        """End the engine's processes. Idempotent."""
        ...
