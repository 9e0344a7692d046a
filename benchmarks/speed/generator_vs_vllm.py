"""Generator throughput against raw vLLM: what leases, rewards, versions and the link cost.

    python -m benchmarks.speed.generator_vs_vllm [--quick]

One engine, two ways to drive it, in turn:

    raw     AsyncLLM.generate with the same sampling parameters, always as many sequences in flight, the tokens unused
    leases  the generator daemon: leases over the socket, groups decoded, scored by reward workers, sent back, checked
            by the learner's end on the other CPU, acknowledged

Each phase is the same fixed amount of work, from the first submission to the last completion (at the learner's end), so
that both pay for filling and emptying the engine. Lengths follow a known law: all --max-new-tokens, or geometric with
half of that as mean before the cap.

Tokens per second of wall time are the result. Tokens per second of CPU time (daemon, engine and reward workers) stand
beside it: they change less when others use the machine, and do not see waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.speed.learner_peer import FIRST_TOKEN, PROMPT_TOKENS
from benchmarks.speed.models import SIZES, make_model
from benchmarks.speed.rig import GROUP_SIZE, Rig, generator

BAR = ">= 0.90, aim 0.97"
LENGTHS = ("fixed", "geometric")


@dataclass(frozen=True, slots=True)
class Phase:
    """Completion tokens, and what they took at the generator's end."""

    tokens: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_seconds


@dataclass(slots=True)
class Setting:
    """One engine: a model, a number of sequences in flight, a law of lengths."""

    size: str
    sequences: int
    lengths: str
    max_new_tokens: int
    groups: int  # of one phase
    raw: list[Phase] = field(default_factory=list)  # one per pair
    leases: list[Phase] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.size}, {self.sequences} sequences, {self.lengths} lengths"


class RawDriver:
    """Drives the engine's AsyncLLM without anything of asyncrl in between."""

    def __init__(self, rig: Rig, setting: Setting, *, grouped: bool) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._llm = rig.daemon.engine._llm
        self._setting = setting
        self._vocab = SIZES[setting.size].vocab
        self._prompts = np.random.default_rng(1)
        self._ids = itertools.count()
        self._grouped = grouped
        self._params = SamplingParams(
            n=GROUP_SIZE if grouped else 1,
            temperature=1.0,
            max_tokens=setting.max_new_tokens,
            stop_token_ids=rig.daemon.engine._stop_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.tokens = 0

    async def phase(self) -> tuple[int, float]:
        """Completion tokens of `setting.groups` groups, and seconds."""
        self.tokens = 0
        started = time.perf_counter()
        width = GROUP_SIZE if self._grouped else 1
        slots = asyncio.Semaphore(self._setting.sequences // width)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._setting.groups):
                prompt = self._prompts.integers(FIRST_TOKEN, self._vocab, PROMPT_TOKENS).tolist()
                for _ in range(GROUP_SIZE // width):
                    tasks.create_task(self._request(prompt, slots))
        return self.tokens, time.perf_counter() - started

    async def _request(self, prompt: list[int], slots: asyncio.Semaphore) -> None:
        async with slots:
            tokens: Any = {"type": "token", "prompt_token_ids": prompt}
            async for output in self._llm.generate(tokens, self._params, f"raw/{next(self._ids)}"):
                self.tokens += sum(len(sample.token_ids) for sample in output.outputs)


async def measure(setting: Setting, folder: Path, options: Any, report: common.Report) -> None:
    """Alternating phases on one engine; fills in the setting's lists."""
    mean = None if setting.lengths == "fixed" else setting.max_new_tokens / 2
    model = make_model(folder / "model", setting.size, mean_tokens=mean)
    async with generator(
        folder / "run",
        model,
        learner_cpu=options.learner_cpu,
        sequences=setting.sequences,
        max_new_tokens=setting.max_new_tokens,
        compile_model=options.compile,
    ) as rig:
        raw = RawDriver(rig, setting, grouped=options.raw == "groups")
        await raw.phase()  # the first phases compile and fill caches
        await rig.peer.ask("generate", groups=setting.groups)
        for pair in range(options.pairs):
            # Each side goes first in every other pair: neither always meets the machine as the other left it.
            for side in ("raw", "leases") if pair % 2 == 0 else ("leases", "raw"):
                with common.watch() as watch:
                    cpu_seconds = common.cpu_seconds(without=rig.peer.pid)
                    if side == "raw":
                        tokens, seconds = await raw.phase()
                    else:
                        done = await rig.peer.ask("generate", groups=setting.groups)
                        tokens, seconds = done["tokens"], done["seconds"]
                    cpu_seconds = common.cpu_seconds(without=rig.peer.pid) - cpu_seconds
                (setting.raw if side == "raw" else setting.leases).append(Phase(tokens, seconds, cpu_seconds))
                report.watched(watch)
            say(setting, pair, report)


def say(setting: Setting, pair: int, report: common.Report) -> None:
    """One line per pair, for whoever waits."""
    ours, raw = setting.leases[-1], setting.raw[-1]
    print(
        f"{setting.name}, pair {pair + 1}: leases {ours.rate:,.0f} and raw {raw.rate:,.0f} tokens/s, "
        f"ratio {ours.rate / raw.rate:.3f}, by CPU time {ours.cpu_rate / raw.cpu_rate:.3f}; "
        f"others took up to {report.others_share:.0%} of the CPU",
        flush=True,
    )


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models (default: all)")
    parser.add_argument("--sequences", nargs="+", type=int, default=[64, 128], help="sequences in flight")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS), help="laws of lengths")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--waves", type=int, default=4, help="groups of a phase, in fillings of the engine")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (generator.compile=always)")
    parser.add_argument(
        "--raw",
        choices=("sequences", "groups"),
        default="sequences",
        help="the raw side submits sequences one by one, or whole groups with n=8 (default %(default)s, the faster)",
    )
    options = common.parse(parser)
    if options.quick:
        options.sizes, options.sequences, options.lengths, options.waves = ["0.8M"], [32], ["fixed"], 2
    for count in options.sequences:
        if count % GROUP_SIZE:
            parser.error(f"--sequences {count}: must be a multiple of the group size {GROUP_SIZE}")
    options.learner_cpu, generator_cpu = common.cpus()
    common.pin(generator_cpu)
    report = common.Report("generator_vs_vllm", options)
    for size, sequences, lengths in itertools.product(options.sizes, options.sequences, options.lengths):
        groups = options.waves * sequences // GROUP_SIZE
        report.begin()
        setting = Setting(size, sequences, lengths, options.max_new_tokens, groups)
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(setting, Path(folder), options, report))
        rates = [[phase.rate for phase in side] for side in (setting.leases, setting.raw)]
        report.pairs(setting.name, "tokens/s", *rates, "raw vLLM", BAR)
        rates = [[phase.cpu_rate for phase in side] for side in (setting.leases, setting.raw)]
        report.pairs(setting.name, "tokens per CPU second", *rates, "raw vLLM")
    report.note("no journal at the learner's end: a result is acknowledged when it is decoded and checked")
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
