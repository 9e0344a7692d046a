"""One weight sync, part by part, with sequences in flight, beside its floors.

    python -m benchmarks.speed.weight_sync [--quick]

    blocked    the time that publishing a version takes from the training: copying the parameters to a staging buffer,
               against one copy of the flat buffer
    transfer   rate at which the worker receives the buckets, from taking part to the last byte, against one
               torch.distributed.broadcast (gloo) of the same bytes to a bare child process of the worker
    staged     from the offer until the generator answers that every digest fits, against that broadcast
    pause      no token is sampled: the engine takes the staged weights; against three copies of the flat buffer and one
               decode step. And the standstill as the worker sees it, from the end of the last step before to the start
               of the first one after, against that of vLLM's own way: pause_generation(keep), a layerwise reload,
               resume_generation
    total      from the offer to the commit, the generator's canary included

The learner's end is the publisher with a policy of the same size, whose weights change before every sync. The generator
is kept full of leases all the time; syncs, reloads and bare broadcasts alternate. The bars on what depends on bytes are
for 10 million parameters: below, both sides are mostly threads that wait for a busy CPU.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncrl.generator.daemon import GeneratorParts
from asyncrl.generator.engines.vllm.engine import VLLMEngine
from asyncrl.host.processes import die_with_parent
from benchmarks import common
from benchmarks.speed.models import SIZES, make_model
from benchmarks.speed.rig import Rig, generator

SEQUENCES = 64
MAX_NEW_TOKENS = 256
RPC_TIMEOUT_S = 30.0
SENDER_WAITS_S = 0.02  # for the bare receiver, as it does for a worker, which takes part after its decode step
SETTLE_S = 1.0  # between two measurements, with sequences in flight
BAR_SIZE = "10M"
BUCKET_BYTES = 8 * 2**20  # smaller than the default, so that 10 million parameters take several
FIGURES = {
    "pause_ms": "pause: no token is sampled",
    "apply_ms": "of it, loading in the worker",
    "stage_ms": "receiving, digests and packing in the worker",
    "receive_ms": "of it, receiving",
    "verify_ms": "of it, digests",
    "prepare_ms": "of it, packing",
    "transfer_ms": "sending, waiting for the worker included",
    "step_ms": "a decode step",
    "between_ms": "between two steps without a swap",
    "canary_ms": "canary at the generator",
    "offer_ms": "digests and canary at the learner, beside the training",
    "total_ms": "total, offer to commit",
}


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)")
    options = common.parse(parser)
    if options.quick:
        options.sizes = ["0.8M"]
    options.learner_cpu, options.generator_cpu = common.cpus()
    common.pin(options.generator_cpu)
    report = common.Report("weight_sync", options)
    for size in options.sizes:
        report.begin()
        with tempfile.TemporaryDirectory() as folder:
            syncs, raws, reloads = asyncio.run(measure(size, Path(folder), options, report))
        add_rows(report, size, syncs, raws, reloads)
    report.finish()
    return 0


async def measure(
    size: str, folder: Path, options: Any, report: common.Report
) -> tuple[list[dict[str, float]], list[dict[str, float]], list[dict[str, float]]]:
    """Syncs, vLLM's reloads and bare broadcasts in turn; their durations."""
    from benchmarks.speed.step_watch import EXTENSION

    parts = GeneratorParts(engine=lambda engine_options: VLLMEngine(engine_options, worker_extension=EXTENSION))
    model = make_model(folder / "model", size)
    syncs, raws, reloads = [], [], []
    async with generator(
        folder / "run",
        model,
        learner_cpu=options.learner_cpu,
        sequences=SEQUENCES,
        max_new_tokens=MAX_NEW_TOKENS,
        compile_model=False,
        settings=[f"weights.bucket_bytes={BUCKET_BYTES}"],
        parts=parts,
    ) as rig:
        await start_receiver(rig, (await rig.peer.ask("sync"))["num_bytes"])
        await rig.peer.ask("flow", on=True, seconds=3 * SETTLE_S)
        await rig.peer.ask("raw_broadcast")  # connects
        await rig.daemon.engine._rpc("bench_watch", RPC_TIMEOUT_S)
        for pair in range(options.pairs):
            with common.watch() as watch:
                await rig.peer.ask("flow", on=True, seconds=SETTLE_S)
                syncs.append(await sync(rig))
                await rig.peer.ask("flow", on=True, seconds=SETTLE_S)
                reloads.append(await vllm_reload(rig))
                await rig.peer.ask("flow", on=True, seconds=SETTLE_S)
                raws.append(await rig.peer.ask("raw_broadcast"))
            report.watched(watch)
            print(f"{size}, pair {pair + 1}: pause {syncs[-1]['pause_ms']:.1f} ms", flush=True)
        await rig.peer.ask("flow", on=False)
    return syncs, raws, reloads


async def sync(rig: Rig) -> dict[str, Any]:
    """A sync through everything, with what the worker saw of its swap."""
    figures = await rig.peer.ask("sync")
    return {**figures, **await around(rig)}


async def vllm_reload(rig: Rig) -> dict[str, float]:
    """vLLM's own pause, reload and resume, of the weights that are in use."""
    engine = rig.daemon.engine
    await engine._llm.pause_generation(mode="keep", clear_cache=False)
    await engine._rpc("bench_reload", RPC_TIMEOUT_S)
    await engine._llm.resume_generation()
    return await around(rig)


async def around(rig: Rig) -> dict[str, float]:
    """What the worker saw, once it has stepped again."""
    await asyncio.sleep(SETTLE_S / 2)
    (seen,) = await rig.daemon.engine._rpc("bench_around", RPC_TIMEOUT_S)
    return seen


def add_rows(
    report: common.Report,
    size: str,
    syncs: list[dict[str, Any]],
    raws: list[dict[str, float]],
    reloads: list[dict[str, float]],
) -> None:
    """The rows of one model."""

    def of(rows: list[dict[str, float]], name: str) -> list[float]:
        return [row[name] for row in rows]

    num_bytes = syncs[0]["num_bytes"]
    what = f"{size} ({num_bytes / 1e6:.1f} MB)"
    blocked_bar, transfer_bar = ("<= 1.5", ">= 0.8") if size == BAR_SIZE else ("", "")
    report.pairs(
        f"{what} learner blocked", "ms", of(syncs, "blocked_ms"), of(raws, "memcpy_ms"), "one copy", blocked_bar
    )
    rates = [[num_bytes / 1e6 / ms for ms in of(rows, "receive_ms")] for rows in (syncs, raws)]
    report.pairs(f"{what} transfer", "GB/s", *rates, "gloo broadcast", transfer_bar)
    report.pairs(f"{what} staged", "ms", of(syncs, "staged_ms"), of(raws, "receive_ms"), "gloo broadcast")
    limits = [3 * raw["memcpy_ms"] + sync["step_ms"] for sync, raw in zip(syncs, raws, strict=True)]
    report.pairs(f"{what} pause", "ms", of(syncs, "pause_ms"), limits, "3 copies and a decode step", bar="<= 1")
    ours, theirs = of(syncs, "standstill_ms"), of(reloads, "standstill_ms")
    report.pairs(f"{what} standstill between two steps", "ms", ours, theirs, "vLLM's pause and reload")
    report.figure(f"{what} tokens computed twice or left out", "tokens", of(syncs, "off_course"))
    report.figure(f"{what} swaps by direct apply", "share", [float("direct_ms" in row) for row in syncs])
    for name, sentence in FIGURES.items():
        report.figure(f"{what} {sentence}", "ms", of(syncs, name))
    report.figure(f"{what} canary difference", "nats", of(syncs, "canary_diff"))


async def start_receiver(rig: Rig, num_bytes: float) -> None:
    """The bare receiver, connected to the learner's end. It ends with the engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A child of the worker: what gets a CPU is decided per session too, and both receivers must have the same share.
    command = [sys.executable, "-m", "benchmarks.speed.weight_sync", "--receiver", str(port), str(int(num_bytes))]
    folder = str(Path(__file__).parents[2])
    await rig.daemon.engine._rpc("bench_start_child", RPC_TIMEOUT_S, command, folder)
    await rig.peer.ask("raw_join", port=port)


def _receive_forever(port: str, num_bytes: str) -> None:
    """The bare receiver: takes each broadcast and answers with the ms it took. On the CPU of its parent."""
    import torch
    import torch.distributed as dist

    die_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
    flat, ready = torch.zeros(int(num_bytes), dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    while True:
        dist.recv(ready, src=0)
        time.sleep(SENDER_WAITS_S)
        started = time.perf_counter()
        dist.broadcast(flat, src=0)
        took_ms = (time.perf_counter() - started) * 1e3
        dist.send(torch.tensor([took_ms], dtype=torch.float64), dst=0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--receiver"]:
        _receive_forever(*sys.argv[2:])
    sys.exit(main())
