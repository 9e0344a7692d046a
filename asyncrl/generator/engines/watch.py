"""Finds an engine that no longer works although its processes are there."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from asyncrl.errors import DeadlineExceeded
from asyncrl.generator.engines.base import RolloutEngine
from asyncrl.generator.weight_phases import WeightSync

PROBE_EVERY_S = 10.0  # an engine that finished nothing for this long is probed
PROBE_TIMEOUT_S = 5.0


async def watch_engine(engine: RolloutEngine, sync: WeightSync, *, probe_every_s: float = PROBE_EVERY_S) -> NoReturn:
    """Raises EngineError or DeadlineExceeded once the engine is dead or wedged, and never returns otherwise.

    It watches with and without leases: an engine that hung in a swap gets none, and every sync with it fails.
    """
    tokens = -1
    while True:
        await asyncio.sleep(probe_every_s)
        before, tokens = tokens, engine.tokens_generated
        if tokens == before and not sync.swapping:
            await _probe(engine, sync)


async def _probe(engine: RolloutEngine, sync: WeightSync) -> None:
    num_loads = sync.num_loads
    try:
        await engine.probe(PROBE_TIMEOUT_S)
    except DeadlineExceeded:
        # A swap stops the engine for as long as it takes, and has a deadline of its own.
        if not sync.swapping and sync.num_loads == num_loads:
            raise
