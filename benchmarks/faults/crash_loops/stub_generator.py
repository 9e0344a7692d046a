"""A generator whose engine makes tokens up: the real daemon, session, leases and weight phases, without torch.

    python -m benchmarks.faults.crash_loops.stub_generator FOLDER NAME

It writes down what it sends and what is acknowledged (`ledger`), from the frames on its socket.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.errors import EngineError
from asyncrl.generator.assembly import _session
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.generator.engines.base import CheckReport, Completion, GenerationRequest, StageReport, SwapReport
from asyncrl.generator.identity import claim_identity
from asyncrl.host.processes import leave
from asyncrl.link.sockets import AsyncClientSocket
from asyncrl.link.weight_records import BitsInUse
from asyncrl.rewards.pool import RewardOutcome
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE, FinishReason, VersionSpan
from benchmarks.faults.crash_loops.ledger import GeneratorLedger
from benchmarks.faults.crash_loops.pace import Pace, paced_runner
from benchmarks.faults.crash_loops.settings import config_of, settings_of
from benchmarks.faults.crash_loops.stub_weights import canary_row


class NotedSocket(AsyncClientSocket):
    """A socket that tells the ledger of every frame."""

    def __init__(self, address: str, *, max_frame_bytes: int, ledger: GeneratorLedger) -> None:
        super().__init__(address, max_frame_bytes=max_frame_bytes)
        self._ledger = ledger

    def send(self, frame: bytes) -> bool:
        self._ledger.sends(frame)
        return super().send(frame)

    async def receive(self, timeout_s: float, known_connects: int | None = None) -> list[bytes]:
        frames = await super().receive(timeout_s, known_connects)
        for frame in frames:
            self._ledger.read(frame, time.monotonic())
        return frames


class StubEngine:
    """Implements `RolloutEngine`. A token takes token_s; the completions of a group come together."""

    def __init__(self, token_s: float, vocab: int, seed: int) -> None:
        self._token_s = token_s
        self._vocab = vocab
        self._chance = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._staged: tuple[int, tuple[int, ...]] | None = None
        self._digests: tuple[int, ...] = ()
        self._broken: set[str] = set()
        self.version: int | None = None
        self.tainted = False
        self.num_running = 0
        self.tokens_generated = 0

    def step_ms(self) -> dict[str, float]:
        """It makes no steps."""
        return {}

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to end."""

    def check_alive(self) -> None:
        """It lives."""

    async def probe(self, timeout_s: float) -> None:
        """It answers."""

    async def generate(self, request: GenerationRequest) -> list[Completion]:
        """Completions of random tokens, all under the version of their end."""
        self._broken.discard(request.request_id)
        length = self._chance.randint(2, request.max_new_tokens)
        self.num_running += request.num_rollouts
        try:
            await asyncio.sleep(length * self._token_s * self._chance.uniform(0.5, 1.5))
        finally:
            self.num_running -= request.num_rollouts
        if self.version is None or self.tainted or request.request_id in self._broken:
            raise EngineError("no weights, or aborted")
        completions = [self._completion(length, self.version) for _ in range(request.num_rollouts)]
        for _ in completions:
            request.on_sequence_end()
        self.tokens_generated += length * request.num_rollouts
        return completions

    def _completion(self, length: int, version: int) -> Completion:
        tokens = self._numbers.integers(0, self._vocab, length, dtype=TOKEN_DTYPE)
        logprobs = np.full(length, -1.0, LOGPROB_DTYPE)
        return Completion(tokens, logprobs, (VersionSpan(0, length, version),), FinishReason.STOP, "")

    async def abort(self, request_id: str) -> None:
        """The request fails at its end."""
        self._broken.add(request_id)

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        """What the trainer expects of these weights."""
        return [canary_row(self._digests, sequence) for sequence in sequences]

    async def join_channel(self, spec: Any, timeout_s: float) -> None:
        """There is no channel."""

    async def leave_channel(self) -> None:
        """There is none."""
        self._staged = None

    async def stage_weights(self, manifest: Any, timeout_s: float) -> StageReport:
        """Believes the manifest."""
        self._staged = manifest.version, manifest.digests
        return StageReport([list(manifest.digests)])

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        """Takes what was staged."""
        if self._staged is None or self._staged[0] != version:
            raise EngineError(f"version {version} is not staged")
        self.version, self._digests = self._staged
        self.tainted = False
        return SwapReport(version, {"pause_ms": 0.1, "apply_ms": 0.1})

    async def check_weights(self, version: int, timeout_s: float) -> CheckReport:
        """Nothing could be wrong."""
        return CheckReport([BitsInUse(version, 1, [], [])])

    def taint(self, why: str) -> None:
        """Nothing more is sampled under these."""
        self.tainted, self.version = True, None


class StubRewards:
    """Rewards drawn at random, at once."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    async def start(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to end."""

    async def score(self, completions: list[str], *_: object) -> list[RewardOutcome]:
        """One for each completion."""
        return [RewardOutcome({"stub": self._chance.random()}) for _ in completions]


async def serve(folder: Path, name: str) -> int:
    """One life of the generator."""
    config, settings = config_of(folder), settings_of(folder)
    identity = claim_identity(Path(config.run.dir) / "generators", name)
    ledger = GeneratorLedger(folder / "ledgers" / f"{name}.generator", identity.incarnation, _max_frame_bytes(config))
    ledger.began(time.monotonic())
    seed = int.from_bytes(os.urandom(4), "little")
    daemon = GeneratorDaemon(
        config,
        _session(config, identity),
        NotedSocket(config.transport.address, max_frame_bytes=_max_frame_bytes(config), ledger=ledger),
        StubEngine(settings.token_s, settings.vocab, seed),  # type: ignore[arg-type]
        StubRewards(seed),  # type: ignore[arg-type]
        parts=GeneratorParts(lease_runner=paced_runner(Pace(folder, settings))),
    )
    return await daemon.run()


def _max_frame_bytes(config: Any) -> int:
    return int(config.transport.max_frame_bytes)


if __name__ == "__main__":
    leave(asyncio.run(serve(Path(sys.argv[1]), sys.argv[2])))
