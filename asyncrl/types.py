"""The nouns that every part of asyncrl shares: leases, rollouts, groups, versions.

Arrays are numpy and little-endian: they go to the wire, to the journal and into a batch as they are.
Nothing here imports torch, zmq or vllm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")

MIN_ROLLOUTS_SHARE = 0.5  # of a lease's rollouts: a training group of fewer scored ones is not worth a gradient


class LeaseKind(StrEnum):
    """What the rollouts of a lease are for."""

    TRAIN = "train"
    EVAL = "eval"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the model emitted an end token
    LENGTH = "length"  # max_new_tokens was reached


class LeaseKey(NamedTuple):
    """Names one try at one prompt. `ordinal` counts prompts of its kind, `attempt` the tries at it from 0."""

    kind: LeaseKind
    ordinal: int
    attempt: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Completion tokens [start, stop) were sampled under policy `version`."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission to generate one group.

    deadline_s counts from the moment the lease is received: clocks of two hosts are never compared.
    pinned_version is set on eval leases: every token must come from exactly that version.
    seed is None unless sampling must be repeatable; rollout i then uses a seed derived from (seed, i).
    greedy_baseline asks for one greedy completion besides the rollouts, of which only the reward is kept.
    """

    key: LeaseKey
    issued_version: int
    deadline_s: float
    prompt_token_ids: np.ndarray  # int32 [P]
    payload: dict[str, Any]  # what the task's reward needs: a reference answer, ...
    num_rollouts: int
    max_new_tokens: int
    temperature: float  # 0 = greedy
    pinned_version: int | None = None
    seed: int | None = None
    greedy_baseline: bool = False

    @property
    def num_sequences(self) -> int:
        """What the engine samples for it."""
        return self.num_rollouts + self.greedy_baseline


@dataclass(slots=True)
class Rollout:
    """One completion, with what is needed to train on it off-policy."""

    token_ids: np.ndarray  # int32 [T], completion tokens as sampled, end token included
    behaviour_logprobs: np.ndarray  # float32 [T], log-probs of those tokens under the sampling policy
    version_spans: tuple[VersionSpan, ...]  # contiguous, in order, covering [0, T)
    finish_reason: FinishReason
    reward: float
    reward_parts: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.version_spans)

    @property
    def newest_version(self) -> int:
        return max(span.version for span in self.version_spans)

    def token_versions(self) -> np.ndarray:
        """Policy version of each token, int64 [T]."""
        versions = np.empty(self.num_tokens, dtype=np.int64)
        for span in self.version_spans:
            versions[span.start : span.stop] = span.version
        return versions


@dataclass(slots=True)
class Group:
    """The rollouts of one lease: completions of one prompt."""

    key: LeaseKey
    prompt_token_ids: np.ndarray  # int32 [P]
    rollouts: list[Rollout]
    baseline_reward: float | None = None  # of the greedy completion; None where the lease asked for none

    @property
    def num_tokens(self) -> int:
        return sum(rollout.num_tokens for rollout in self.rollouts)

    @property
    def oldest_version(self) -> int:
        return min(rollout.oldest_version for rollout in self.rollouts)
