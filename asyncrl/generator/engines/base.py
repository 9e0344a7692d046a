"""What the generator needs from a rollout engine, and the records that pass between them.

An engine holds one copy of the policy. It samples completions, scores given sequences, and takes new weights
while it samples. vLLM is one implementation (`generator.engines.vllm.engine`); nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from asyncrl.link.weight_records import BitsInUse, ChannelSpec, WeightManifest
from asyncrl.types import FinishReason, VersionSpan


def nothing() -> None:
    """A callback that does nothing, for callers that need none."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Sample `num_rollouts` completions of one prompt.

    temperature 0 is greedy. seeds, one per rollout, make sampling repeatable under equal weights; None draws from the
    engine's own stream. on_sequence_end is called once for each sequence that has ended, by failure too.
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

    logprobs (natural logarithm) are those of the distribution that was sampled from, at the request's temperature; of a
    greedy completion, those at temperature 1. version_spans are contiguous and cover [0, T). text lacks special
    tokens such as the end token.
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
    # In the slowest worker: stage_ms, and its parts receive_ms, decode_ms (of a delta), verify_ms and prepare_ms
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SwapReport:
    """How long a swap held up generation, and what took the time."""

    version: int
    # pause_ms, in which no token was sampled; apply_ms, the part of it in which the slowest worker put the weights in
    # place, and the same once more under the name of how it did so: direct_ms or reload_ms
    timings_ms: dict[str, float]
    apply: str = "reload"  # "direct" when every worker copied the weights in place, "reload" when one had to load anew


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What every worker found that compared what it computes with with what was staged."""

    in_use: list[BitsInUse]
    timings_ms: dict[str, float] = field(default_factory=dict)  # check_ms in the slowest worker


class RolloutEngine(Protocol):
    """An engine that samples under a known policy version.

    It starts without one: `generate` and `score` raise EngineError until a first `stage_weights` and `swap_weights`
    have succeeded. A swap that fails half-way, or whose weights turn out to be wrong (`taint`), leaves the engine
    *tainted*: `version` is None, what was being sampled fails, and nothing is sampled until a stage and a swap succeed.

    Every `timeout_s` bounds its call; when it expires, DeadlineExceeded names what was waited for. What holds of every
    engine is tested by tests/generator/engines/test_conformance.py.
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

    def step_ms(self) -> dict[str, float]:
        """What a step takes, by part (`step_times.PARTS`); empty while nothing is known of that."""
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
        """Log-probs of given sequences, at temperature 1.

        Args:
            sequences: token ids of each; L, the length, is 2 at least.
            timeout_s: of the whole call.

        Returns:
            float32 [L-1] for each sequence: of its tokens 1 to L-1, each given those before it.

        Raises:
            EngineError: the engine died, is tainted or has no version yet.
            DeadlineExceeded: not all are scored in time.
            NonFiniteError: a log-prob is not finite.
        """
        ...

    def check_alive(self) -> None:
        """Return unless the engine is known to have died; waits for nothing.

        Raises:
            EngineError: it died.
        """
        ...

    async def probe(self, timeout_s: float) -> None:
        """Return if the engine still samples; a tainted one, or one in a swap, only has to answer.

        Raises:
            EngineError: it died.
            DeadlineExceeded: it does not answer.
        """
        ...

    async def join_channel(self, spec: ChannelSpec, timeout_s: float) -> None:
        """Connect all workers to a weight channel; `spec.rank` is the first worker's. Generation goes on.

        After a failure the channel is left.

        Raises:
            ChannelError: a worker could not join.
            DeadlineExceeded: a worker did not tell in time how joining went.
            EngineError: the engine died.
        """
        ...

    async def stage_weights(self, manifest: WeightManifest, timeout_s: float) -> StageReport:
        """Receive a version into the workers' staging buffers and verify its digests. Generation goes on.

        After a failure nothing is staged and the channel is left; the weights in use are untouched.

        Raises:
            ChannelError: a member vanished, or a digest is not that of the manifest.
            DeadlineExceeded: a worker did not tell in time how staging went.
            EngineError: the engine died.
        """
        ...

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        """Pause, load the staged version, resume. Running sequences keep their tokens and go on under it.

        Raises:
            EngineError: `version` is not staged, and nothing has changed; or loading failed, and the engine is tainted.
            DeadlineExceeded: the engine is tainted, unless it did not even tell which version it has staged.
        """
        ...

    async def check_weights(self, version: int, timeout_s: float) -> CheckReport:
        """Compare the bits in use with those staged, all of them, after a swap to `version`. Generation goes on.

        What is found wrong is in the report; it is for the learner to judge it.

        Raises:
            EngineError: the engine died, or `version` was not what was swapped last.
            DeadlineExceeded: a worker did not tell in time what it found.
        """
        ...

    def taint(self, why: str) -> None:
        """The weights in use are not those of their version: fail what is being sampled and sample nothing more.

        A later sync may bring the same version again, this time right: what was begun before must not go on under it.
        """
        ...

    async def leave_channel(self) -> None:
        """Disconnect all workers from their weight channel, if they have one, and drop what is staged."""
        ...

    async def close(self) -> None:
        """End the engine's processes. Idempotent."""
        ...
