"""The nouns that every part of asyncrl shares: leases, rollouts, groups, versions, frontiers.

Arrays are numpy and little-endian: they go to the wire, to the journal and into a batch as they are.
Nothing here imports torch, zmq or vllm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

TOKEN_DTYPE = np.dtype("<i4")
LOGPROB_DTYPE = np.dtype("<f4")

MIN_ROLLOUTS_SHARE = 0.5  # of a group: with fewer scored rollouts it is not worth a gradient


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


class Setting(NamedTuple):
    """One thing that decides a run: a configuration key with its value as JSON, or a file with its digest."""

    name: str
    value: str


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
    user_text: str = ""  # of chat messages, what the user says last; empty where the prompt is a plain text
    ticket: bytes = b""  # to be given back with whatever becomes of the lease

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine samples for this lease: the rollouts, and a greedy completion if asked for."""
        return self.num_rollouts + self.greedy_baseline


# Of the reward and of each of its parts. The squares of rewards of any size a task has a use for stay far inside of
# float32; a reward of 1e38 would make every step of its batch infinite.
MAX_ABS_REWARD = 1e6
MAX_REWARD_PARTS = 16  # with names of 40 characters they still fit into what a rollout may weigh on the wire
MAX_PART_NAME = 40
REWARD_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}")
REWARD_PART_NAME_RULE = "up to 40 letters, digits, '.', '_' and '-', not beginning with '.' or '-'"


def is_part_name(name: str) -> bool:
    """Whether a part of a reward may be called so. In a mix the name of the task and "/" stand before it."""
    return len(name) <= MAX_PART_NAME and all(REWARD_PART_NAME.fullmatch(each) for each in name.split("/", 1))


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The reward: the sum of weight x value over all its parts; the weight is 1 where none is given."""
    return float(sum(weights.get(name, 1.0) * value for name, value in parts.items()))


def reward_problem(value: float, what: str = "reward") -> str:
    """Why `value` can be no reward, or no part of one, in words that begin with `what`; empty when it can."""
    if not math.isfinite(value):
        return f"{what} {value:g} is not finite"
    if abs(value) > MAX_ABS_REWARD:
        return f"{what} {value:g} is beyond {MAX_ABS_REWARD:g}, which no reward may be; scale it down"
    return ""


def reward_parts_problem(parts: Mapping[str, float]) -> str:
    """Why these cannot be the parts of a reward, in words; empty when they can."""
    if len(parts) > MAX_REWARD_PARTS:
        return f"the reward has {len(parts)} parts; at most {MAX_REWARD_PARTS} are allowed"
    for name, value in parts.items():
        if not is_part_name(name):
            return f"reward part {name!r:.100} must be named by {REWARD_PART_NAME_RULE}: metrics are named after it"
        if problem := reward_problem(value, f"reward part {name}"):
            return problem
    return ""


def means_of_parts(rollouts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each reward part over the rollouts that have it, by name, from the parts of each rollout.

    Example: {"math": 1}, {"code": 0}, {"math": 0} -> {"code": 0, "math": 0.5}.
    """
    values: dict[str, list[float]] = {}
    for parts in rollouts:
        for name, value in parts.items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(values[name]) / len(values[name]) for name in sorted(values)}


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
        """Completion tokens, the end token included."""
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled one of its tokens."""
        return min(span.version for span in self.version_spans)

    @property
    def newest_version(self) -> int:
        """The newest policy version that sampled one of its tokens."""
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
        """Completion tokens of all rollouts."""
        return sum(rollout.num_tokens for rollout in self.rollouts)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled a token of any rollout."""
        return min(rollout.oldest_version for rollout in self.rollouts)


def min_rollouts(group_size: int) -> int:
    """How many of the `group_size` rollouts of a training lease must have a reward for the group to be trained on.

    Half of them, and two at least, since rewards are compared within a group; a group of one needs its only rollout.
    """
    return min(group_size, max(2, math.ceil(group_size * MIN_ROLLOUTS_SHARE)))


class Frontier:
    """A set of integers >= 0 that fills up mostly in order: all of those below `watermark`, and `above`, a few beyond.

        frontier = Frontier()            # watermark 0, above {}
        frontier.add(0)                  # watermark 1, above {}
        frontier.add(2)                  # watermark 1, above {2}
        frontier.add(1)                  # watermark 3, above {}

    Members are never removed, so memory is that of the gaps. One frontier holds the settled ordinals of a run; another
    holds, for each generator, the numbers of its settled results.
    """

    __slots__ = ("above", "watermark")

    def __init__(self, watermark: int = 0, above: Iterable[int] = ()) -> None:
        self.watermark = watermark
        self.above: set[int] = set()
        for number in above:
            self.add(number)

    def add(self, number: int) -> None:
        """Adds one member; adding it again changes nothing."""
        if number >= self.watermark:
            self.above.add(number)
        self._advance()

    def add_below(self, number: int) -> None:
        """Adds every integer below `number`."""
        self.watermark = max(self.watermark, number)
        self.above = {member for member in self.above if member >= self.watermark}
        self._advance()

    def __contains__(self, number: int) -> bool:
        return 0 <= number < self.watermark or number in self.above

    def __len__(self) -> int:
        return self.watermark + len(self.above)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frontier):
            return NotImplemented
        return (self.watermark, self.above) == (other.watermark, other.above)

    __hash__ = None  # type: ignore[assignment]  # it changes, so it has no hash

    def __repr__(self) -> str:
        return f"Frontier({self.watermark}, {sorted(self.above)})"

    def missing(self, start: int, end: int) -> list[int]:
        """Those of [start, end) that are no members."""
        rest = range(max(start, self.watermark), end)
        return [number for number in rest if number not in self.above] if self.above else list(rest)

    def copy(self) -> Frontier:
        """A copy, which later additions to this frontier do not change."""
        return Frontier(self.watermark, self.above)

    def _advance(self) -> None:
        while self.watermark in self.above:
            self.above.remove(self.watermark)
            self.watermark += 1
