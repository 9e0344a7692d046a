"""The generator's end for benchmarks: a real daemon with its engine, rewards and link, in the calling process."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from asyncrl.config.loading import load_config, to_yaml
from asyncrl.generator.assembly import build_generator
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.generator.identity import claim_identity
from benchmarks.speed.learner_peer import PROMPT_TOKENS, LearnerPeer

GROUP_SIZE = 8
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Rig:
    """A generator with weights, and the learner's end it is connected to."""

    daemon: GeneratorDaemon
    peer: LearnerPeer


@asynccontextmanager
async def generator(
    folder: Path,
    model: Path,
    *,
    learner_cpu: int,
    sequences: int,
    max_new_tokens: int,
    compile_model: bool,
    settings: Sequence[str] = (),
    parts: GeneratorParts | None = None,
) -> AsyncIterator[Rig]:
    """Starts both ends; `settings` are lines of configuration on top, `parts` the daemon's where it has others.

    The caller's process, and with it the engine, must be pinned already.
    """
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - before anything runs in the loop
    overrides = [
        "run.name=benchmark",
        f"run.dir={folder}",
        f"model.path={model}",
        f"model.max_length={PROMPT_TOKENS + max_new_tokens}",
        f"sampling.group_size={GROUP_SIZE}",
        f"sampling.max_new_tokens={max_new_tokens}",
        f"generator.max_sequences={sequences}",
        "generator.kv_cache_gib=0.5",
        "generator.device=cpu",
        f"generator.compile={'always' if compile_model else 'never'}",
        *settings,
    ]
    config = load_config(None, overrides)
    config_file = folder / "config.yaml"
    config_file.write_text(to_yaml(config))
    peer = await LearnerPeer.start(config_file, learner_cpu)
    config = dataclasses.replace(config, transport=dataclasses.replace(config.transport, address=peer.address))
    daemon = build_generator(config, claim_identity(folder / "generators", "benchmark"), parts)
    running = asyncio.create_task(daemon.run())
    try:
        async with _alive(running):
            await peer.ask("ready")
            await peer.ask("sync")
            yield Rig(daemon, peer)
    finally:
        daemon.stop("the benchmark is over", run_finished=True)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await running
        finally:
            await daemon.rewards.close()
            await daemon.engine.close()
            await peer.close()


@asynccontextmanager
async def _alive(running: asyncio.Task[int]) -> AsyncIterator[None]:
    """Ends the body when the daemon ends: it would wait for an answer that cannot come."""
    body = asyncio.current_task()
    assert body is not None
    ended = False

    def end(task: asyncio.Task[int]) -> None:
        nonlocal ended
        ended = True
        body.cancel()

    running.add_done_callback(end)
    try:
        yield
    except asyncio.CancelledError:
        if ended and body.uncancel() == 0:
            running.result()
            raise RuntimeError("the generator ended in the middle of the benchmark") from None
        raise
    finally:
        running.remove_done_callback(end)
