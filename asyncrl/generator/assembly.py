"""A generator from its configuration: claims an identity, builds the parts, runs the daemon, takes the parts down."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asyncrl.config import Config
from asyncrl.config.gpus import has_gpu, visible_gpus
from asyncrl.config.host_checks import is_on_gpu
from asyncrl.generator.daemon import GeneratorDaemon, GeneratorParts
from asyncrl.generator.engines.vllm.options import EngineOptions
from asyncrl.generator.identity import Identity, claim_identity
from asyncrl.generator.lease_runner import no_text
from asyncrl.host.addresses import rollout_addresses
from asyncrl.host.fingerprints import model_folder_fingerprint, tokenizer_fingerprint
from asyncrl.host.log_files import limit_logs
from asyncrl.host.model_config import known_context, read_model_config
from asyncrl.host.model_folder import find_model
from asyncrl.host.processes import StopSignal, pin_to
from asyncrl.host.tokenizer import load_tokenizer
from asyncrl.link import messages
from asyncrl.link.curve_keys import client_auth
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.sockets import AsyncClientSocket
from asyncrl.link.weight_records import Placement
from asyncrl.metrics.http_pages import HttpPages, Vitals
from asyncrl.rewards.parts import make_parts
from asyncrl.rewards.pool import RewardPool
from asyncrl.tasks.fingerprint import shared_settings

log = logging.getLogger(__name__)

LOG_CHECK_S = 10.0


def run_generator(config: Config, stop: StopSignal | None = None) -> int:
    """Runs one generator daemon to its end. Returns its exit code; raises AsyncRLError for what ended it.

    stop: what ends it early; None makes one of its own.
    """
    return serve_generator(config, take_identity(config), stop=stop)


def take_identity(config: Config) -> Identity:
    """Pins this process to its CPUs and claims the identity of the configuration, or a free one.

    Raises ConfigError when the machine lacks those CPUs, or another generator holds the identity.
    """
    pin_to(config.generator.cpus, "generator.cpus")
    identity = claim_identity(Path(config.run.dir) / "generators", config.generator.id)
    log.info("generator %s, incarnation %d", identity.generator_id, identity.incarnation)
    return identity


def serve_generator(
    config: Config, identity: Identity, parts: GeneratorParts | None = None, stop: StopSignal | None = None
) -> int:
    """Runs a generator under this identity, made of other `parts` where they are given. Returns its exit code.

    Raises AsyncRLError for what ended it.
    """
    return asyncio.run(_serve(config, identity, parts or GeneratorParts(), stop or StopSignal()))


async def _serve(config: Config, identity: Identity, parts: GeneratorParts, stop: StopSignal) -> int:
    """Builds the parts, runs the daemon, takes the parts down again."""
    daemon = build_generator(config, identity, parts)
    vitals = Vitals(f"generator-{identity.generator_id}", config.run.name, daemon.pulse, daemon.figures)
    pages = HttpPages.open(config.generator.http, "generator.http", vitals, Path(config.run.dir))
    asyncio.get_running_loop().add_reader(stop.fd, daemon.stop, "signal")
    logs = asyncio.create_task(_limit_logs(Path(config.run.dir) / "generators", f"{identity.generator_id}."))
    try:
        return await daemon.run()
    finally:
        logs.cancel()
        if pages is not None:
            pages.close()
        asyncio.get_running_loop().remove_reader(stop.fd)
        await daemon.rewards.close()
        await daemon.engine.close()


async def _limit_logs(folder: Path, prefix: str) -> None:
    """Keeps the logs of engine and reward models within their size."""
    while True:
        await asyncio.to_thread(limit_logs, folder, prefix)
        await asyncio.sleep(LOG_CHECK_S)


def build_generator(config: Config, identity: Identity, parts: GeneratorParts | None = None) -> GeneratorDaemon:
    """A generator and its parts, none of them started; inside a running event loop.

    The caller runs it, and afterwards closes its `rewards` and its `engine`.
    """
    parts = parts or GeneratorParts()
    rewards = RewardPool(
        config.task.path,
        config.task.args,
        config.generator.reward_workers,
        config.generator.reward_timeout_s,
        parts=config.reward.parts,
        weights=config.reward.weights,
        log_prefix=str(Path(config.run.dir) / "generators" / identity.generator_id),
    )
    return GeneratorDaemon(
        config,
        _session(config, identity),
        _connect(config),
        parts.engine(_engine_options(config, identity)),
        rewards,
        prompt_text=_prompt_text(config),
        parts=parts,
    )


def _prompt_text(config: Config) -> Callable[[np.ndarray], str]:
    """Gives parts of the reward the text of a prompt; the tokenizer is loaded only when one of them needs that."""
    if not any(part.needs_prompt for part in make_parts(config.reward.parts).values()):
        return no_text
    tokenizer = load_tokenizer(config.model.path)

    def text_of(token_ids: np.ndarray) -> str:
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str), "the text of one prompt is one text"
        return text

    return text_of


def _engine_options(config: Config, identity: Identity) -> EngineOptions:
    generator = config.generator
    on_gpu = is_on_gpu(generator.device, gpu_here=has_gpu())
    return EngineOptions(
        model_path=config.model.path,
        dtype=config.model.dtype,
        max_model_len=config.model.max_length,
        fits_context=_fits_context(config),
        max_sequences=generator.max_sequences,
        tensor_parallel_size=generator.tensor_parallel_size,
        kv_cache_bytes=None if on_gpu else int(generator.kv_cache_gib * 2**30),
        gpu_memory_fraction=generator.gpu_memory_fraction,
        device="cuda" if on_gpu else "cpu",
        enforce_eager=generator.compile == "never" or (generator.compile == "auto" and not on_gpu),
        threads=generator.threads,
        weights_timeout_s=config.weights.timeout_s,
        weights_host=config.weights.host,
        # Another stream for each generator and each of its lives, and for each run.seed.
        seed=zlib.crc32(f"{config.run.seed}/{identity.generator_id}/{identity.incarnation}".encode()),
        log_path=str(Path(config.run.dir) / "generators" / f"{identity.generator_id}.vllm.log"),
    )


def _fits_context(config: Config) -> bool:
    path = config.model.path
    context = known_context(read_model_config(Path(path), f"model.path={path}"))
    return context is not None and config.model.max_length <= context


def _placement(config: Config) -> Placement:
    """On which GPUs the engine will compute: vLLM gives its workers the first ones that are visible."""
    if not is_on_gpu(config.generator.device, gpu_here=has_gpu()):
        log.info("the engine computes on the CPU")
        return Placement.here()
    gpus = visible_gpus()[: config.generator.tensor_parallel_size]
    log.info("the engine computes on GPU %s", ", ".join(gpus))
    return Placement.here(gpus)


def _connect(config: Config) -> AsyncClientSocket:
    transport = config.transport
    address = rollout_addresses(transport.address, config.run.dir)[0].text
    return AsyncClientSocket(address, max_frame_bytes=transport.max_frame_bytes, auth=client_auth(transport))


def _session(config: Config, identity: Identity) -> GeneratorSession:
    hello = messages.Hello(
        protocol=messages.PROTOCOL_VERSION,
        generator_id=identity.generator_id,
        incarnation=identity.incarnation,
        max_run_epoch=0,
        model_fingerprint=model_folder_fingerprint(config.model.path),
        tokenizer_fingerprint=tokenizer_fingerprint(find_model(config.model.path).folder),
        task=config.task.path,
        num_workers=config.generator.tensor_parallel_size,
        first_unacked_seq=1,
        settings=shared_settings(config),
        placement=_placement(config),
    )
    return GeneratorSession(
        hello,
        run_name=config.run.name,
        outbox_bytes=config.generator.outbox_bytes,
        max_frame_bytes=config.transport.max_frame_bytes,
        now=time.monotonic(),
    )
