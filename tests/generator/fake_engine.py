"""An engine that does what a test says, for the code around it.

It holds no weights and claims nothing of what a `RolloutEngine` must do: `engines/test_conformance.py`, which states
that, runs against real engines alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from asyncrl.errors import EngineError
from asyncrl.generator.engines.base import CheckReport, Completion, StageReport, SwapReport
from asyncrl.link.weight_records import BitsInUse
from asyncrl.types import FinishReason, VersionSpan


def completion(text: str = "ok", spans: tuple[tuple[int, int, int], ...] = ((0, 2, 0),)) -> Completion:
    length = spans[-1][1]
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        version_spans=tuple(VersionSpan(*span) for span in spans),
        finish_reason=FinishReason.STOP,
        text=text,
    )


class FakeEngine:
    """`sample` makes the completions of a request; `fail` holds the error of a method that must fail."""

    def __init__(self, sample: Callable[[Any], list[Completion]] | None = None):
        self.sample = sample or (lambda request: [completion() for _ in range(request.num_rollouts)])
        self.fail: dict[str, BaseException] = {}
        self.calls: list[tuple[str, Any]] = []
        self.requests: list[Any] = []
        # generate, stage_weights and swap_weights wait for theirs.
        self.held_up: asyncio.Event | None = None
        self.stage_held_up: asyncio.Event | None = None
        self.swap_held_up: asyncio.Event | None = None
        self.aborted: list[str] = []
        self.tainted = False
        self.tokens_generated = 0

    def step_ms(self) -> dict[str, float]:
        return {}

    def _called(self, name: str, argument: Any = None) -> None:
        self.calls.append((name, argument))
        if name in self.fail:
            raise self.fail[name]

    async def generate(self, request: Any) -> list[Completion]:
        self.requests.append(request)
        if self.held_up is not None:
            await self.held_up.wait()
        self._called("generate", request.request_id)
        return self.sample(request)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def join_channel(self, spec: Any, timeout_s: float) -> None:
        self._called("join", spec.prefix)

    async def leave_channel(self) -> None:
        self._called("leave")

    async def stage_weights(self, manifest: Any, timeout_s: float) -> StageReport:
        self._called("stage", manifest.version)
        if self.stage_held_up is not None:
            await self.stage_held_up.wait()
        return StageReport([[11, 22]], {"stage_ms": 1.0})

    async def swap_weights(self, version: int, timeout_s: float) -> SwapReport:
        self._called("swap", version)
        if self.swap_held_up is not None:
            await self.swap_held_up.wait()
        self.tainted = False
        return SwapReport(version, {"pause_ms": 2.0, "apply_ms": 1.0})

    async def check_weights(self, version: int, timeout_s: float) -> CheckReport:
        self._called("check", version)
        return CheckReport([BitsInUse(version, 3, [], [])], {"check_ms": 0.5})

    def taint(self, why: str) -> None:
        self._called("taint", why)
        self.tainted = True

    async def score(self, sequences: list[list[int]], timeout_s: float) -> list[np.ndarray]:
        self._called("score", sequences)
        return [np.full(len(sequence) - 1, -0.5, dtype=np.float32) for sequence in sequences]


def dead() -> EngineError:
    return EngineError("the engine died")
