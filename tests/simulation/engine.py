"""A rollout engine and rewards for the simulation. The engine holds bytes, and says in its tokens which ones.

Weights are a few buckets of bytes. The canary sees the first bucket alone, the comparison of the bits in use all but
the first, and digests see everything that is staged. Each completion begins with a token that is its number, and
`Sampled` keeps under that number the weights that were in the engine at each of its tokens: what the checker holds
against the version spans.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import zlib
from dataclasses import dataclass, field

import numpy as np

from asyncrl.errors import ChannelError, DeadlineExceeded, EngineError
from asyncrl.generator.engines.base import CheckReport, Completion, GenerationRequest, StageReport, SwapReport
from asyncrl.link.weight_records import ALIGNMENT, BitsInUse
from asyncrl.rewards.pool import RewardOutcome
from asyncrl.types import FinishReason, VersionSpan

NUM_BUCKETS = 3
FIRST_SAMPLE = 1000  # prompts are made of smaller tokens
VOCAB = 1 << 30

Weights = tuple[bytes, ...]


def weights_of(policy: bytes) -> Weights:
    """The buckets of a policy."""
    return tuple((hashlib.sha256(policy + bytes([n])).digest() * 2)[:ALIGNMENT] for n in range(NUM_BUCKETS))


def digests_of(weights: Weights) -> tuple[int, ...]:
    return tuple(int.from_bytes(hashlib.sha256(bucket).digest()[:7], "little") for bucket in weights)


def canary_row(weights: Weights, tokens: list[int]) -> np.ndarray:
    """Log-probs of a sequence; of the first bucket alone."""
    seen = np.frombuffer(hashlib.sha256(weights[0] + bytes(tokens)).digest(), np.uint8)[: len(tokens) - 1]
    return -seen.astype(np.float32) / 256


@dataclass(slots=True)
class Sampled:
    """One completion, as its engine knows it."""

    generator: str
    incarnation: int
    request_id: str
    weights: list[Weights] = field(default_factory=list)  # that sampled each token


class Samples:
    """All completions of all engines, by their number."""

    def __init__(self) -> None:
        self.by_number: dict[int, Sampled] = {}

    def new(self, sampled: Sampled) -> int:
        number = FIRST_SAMPLE + len(self.by_number)
        self.by_number[number] = sampled
        return number


@dataclass(slots=True)
class WeightChannel:
    """A weight channel between the trainer of one life and some engines."""

    world_size: int
    joined: set[int] = field(default_factory=set)  # ranks
    waiting: dict[int, asyncio.Future[Weights]] = field(default_factory=dict)  # rank -> what it stages
    closed: bool = False

    def close(self, why: str) -> None:
        self.closed = True
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(ChannelError(why))
        self.waiting.clear()


@dataclass(slots=True)
class EngineFaults:
    """Shares of calls at which something goes wrong."""

    stage_error: float = 0.0
    flip_bit: float = 0.0  # in the staged bytes
    stale_swap: float = 0.0  # the swap leaves a bucket as it was and says that all went well
    swap_error: float = 0.0
    swap_hang: float = 0.0
    generate_error: float = 0.0
    reward_error: float = 0.0
    equal_rewards: float = 0.2
    token_s: float = 0.15
    slow_share: float = 0.1  # of groups that take ten times as long


class Engine:
    """Implements `RolloutEngine`. `channels` are those of the world, by prefix."""

    def __init__(
        self,
        generator: str,
        incarnation: int,
        *,
        samples: Samples,
        channels: dict[str, WeightChannel],
        faults: EngineFaults,
        chance: random.Random,
    ) -> None:
        self._who = generator, incarnation
        self._samples = samples
        self._channels = channels
        self._faults = faults
        self._chance = chance
        self._channel: tuple[WeightChannel, int] | None = None
        self._staged: tuple[int, Weights] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, str] = {}
        self.weights: Weights | None = None
        self.version: int | None = None
        self.tainted = False
        self.must_not_sample_since: float | None = None  # it was told that its weights are not proven
        self.sampled_while_forbidden: list[str] = []
        self.tokens_generated = 0
        self.num_swaps = 0  # that put weights in place

    @property
    def num_running(self) -> int:
        return len(self._running)

    def step_ms(self) -> dict[str, float]:
        return {}

    def _hits(self, share: float) -> bool:
        return self._chance.random() < share

    # -- life

    async def start(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.1, 2.0))

    async def close(self) -> None:
        await self.leave_channel()

    def check_alive(self) -> None:
        pass

    async def probe(self, timeout_s: float) -> None:
        pass

    # -- sampling

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        self._broken.pop(request.request_id, None)
        return [await self._complete(request) for _ in range(request.num_rollouts)]

    async def _complete(self, request: GenerationRequest) -> Completion:
        """Token by token, so that a swap may come in between."""
        faults = self._faults
        sampled = Sampled(*self._who, request.request_id)
        number = self._samples.new(sampled)
        versions: list[int] = []
        length = self._chance.randint(2, min(4, request.max_new_tokens))
        token_s = faults.token_s * (10 if self._hits(faults.slow_share) else 1)
        for _ in range(length):
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * token_s)
            while self.version is None and not self.tainted and self.weights is not None:
                await asyncio.sleep(0.02)  # a swap is going on: sampling stands still
            self._check(request.request_id)
            assert self.version is not None
            assert self.weights is not None
            if self.must_not_sample_since is not None:
                self.sampled_while_forbidden.append(request.request_id)
            versions.append(self.version)
            sampled.weights.append(self.weights)
        if self._hits(faults.generate_error):
            raise EngineError("simulated")
        request.on_sequence_end()
        self.tokens_generated += length
        return Completion(
            token_ids=np.array([number, *range(length - 1)], np.int32),
            logprobs=np.full(length, -1.0, np.float32),
            version_spans=_spans(versions),
            finish_reason=FinishReason.STOP,
            text=str(number),
        )

    def _check(self, request_id: str) -> None:
        if request_id in self._broken:
            raise EngineError(self._broken[request_id])
        if self.tainted or self.version is None:
            raise EngineError(f"the engine is {'tainted' if self.tainted else 'without weights'}")

    async def abort(self, request_id: str) -> None:
        self._broken[request_id] = "aborted"

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        await asyncio.sleep(0.01)
        if self.weights is None or self.tainted:
            raise EngineError("nothing to score with")
        return [canary_row(self.weights, sequence) for sequence in sequences]

    # -- weights

    async def join_channel(self, spec, timeout_s: float) -> None:
        await asyncio.sleep(self._chance.uniform(0.001, 0.1))
        channel = self._channels.get(spec.prefix)
        if channel is None or channel.closed:
            raise ChannelError(f"no channel {spec.prefix}")
        channel.joined.add(spec.rank)
        self._channel = channel, spec.rank

    async def leave_channel(self) -> None:
        if self._channel is not None:
            self._channel[0].close("a member left")
        self._channel = self._staged = None

    async def stage_weights(self, manifest, timeout_s: float) -> StageReport:
        self._staged = None
        if self._channel is None:
            raise ChannelError("in no channel")
        channel, rank = self._channel
        try:
            if self._hits(self._faults.stage_error) or channel.closed:
                raise ChannelError("simulated" if not channel.closed else "the channel is closed")
            future = channel.waiting[rank] = asyncio.get_running_loop().create_future()
            async with asyncio.timeout(timeout_s):
                weights = await future
        except TimeoutError:
            await self.leave_channel()
            raise DeadlineExceeded("nothing was broadcast") from None
        except (ChannelError, asyncio.CancelledError):
            await self.leave_channel()
            raise
        if self._hits(self._faults.flip_bit):
            weights = _with_a_bit_flipped(weights, self._chance)
        self._staged = manifest.version, weights
        return StageReport([list(digests_of(weights))])

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        if self._staged is None or self._staged[0] != version:
            raise EngineError(f"version {version} is not staged")
        staged = self._staged[1]
        before, self.version = self.weights, None
        if self._hits(self._faults.swap_hang):
            await asyncio.sleep(timeout_s)
            self.tainted = True
            raise DeadlineExceeded("the swap hangs")
        await asyncio.sleep(self._chance.uniform(0.005, 0.1))
        if self._hits(self._faults.swap_error):
            self.tainted = True
            raise EngineError("simulated")
        if before is not None and self._hits(self._faults.stale_swap):
            stale = self._chance.randrange(NUM_BUCKETS)
            self.weights = (*staged[:stale], before[stale], *staged[stale + 1 :])
        else:
            self.weights = staged
        self.version, self.tainted = version, False
        self.num_swaps += 1
        self.must_not_sample_since = None
        return SwapReport(version, {"pause_ms": 1.0, "apply_ms": 1.0})

    async def check_weights(self, version: int, timeout_s: float) -> CheckReport:
        await asyncio.sleep(self._chance.uniform(0.001, 0.05))
        if self._staged is None or self.weights is None or self._staged[0] != version:
            raise EngineError(f"version {version} was not swapped last")
        pairs = zip(self.weights[1:], self._staged[1][1:], strict=True)
        differing = [f"bucket {place}" for place, (used, staged) in enumerate(pairs, 1) if used != staged]
        return CheckReport([BitsInUse(version, NUM_BUCKETS - 1, differing, ["bucket 0"])])

    def taint(self, why: str) -> None:
        self.tainted, self.version = True, None


class Rewards:
    """Implements what a generator needs of `RewardPool`."""

    def __init__(self, faults: EngineFaults, chance: random.Random) -> None:
        self._faults = faults
        self._chance = chance

    async def start(self) -> None:
        await asyncio.sleep(0.05)

    async def close(self) -> None:
        pass

    async def score(self, completions, payload, prompt="", num_tokens=None) -> list[RewardOutcome]:
        await asyncio.sleep(self._chance.uniform(0.001, 0.05))
        equal = self._chance.random() < self._faults.equal_rewards
        outcomes = []
        for place, text in enumerate(completions):
            if self._chance.random() < self._faults.reward_error:
                outcomes.append(RewardOutcome(None, "reward_error", "simulated"))
            else:
                reward = 1.0 if equal else float(place) + zlib.crc32(text.encode()) % 7 / 10
                outcomes.append(RewardOutcome({"sim": reward}))
        return outcomes


def _spans(versions: list[int]) -> tuple[VersionSpan, ...]:
    spans: list[VersionSpan] = []
    for place, version in enumerate(versions):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(spans[-1].start, place + 1, version)
        else:
            spans.append(VersionSpan(place, place + 1, version))
    return tuple(spans)


def _with_a_bit_flipped(weights: Weights, chance: random.Random) -> Weights:
    place = chance.randrange(1, len(weights))  # where the canary does not look
    bucket = bytearray(weights[place])
    bucket[chance.randrange(len(bucket))] ^= 1 << chance.randrange(8)
    return (*weights[:place], bytes(bucket), *weights[place + 1 :])
