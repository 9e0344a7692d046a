"""The learner's step against that of TRL's GRPOTrainer: the same model, the same batch, the same threads.

    python -m benchmarks.speed.learner_vs_trl [--quick] [--peers FOLDER]

TRL is installed into an environment of its own, under runs/benchmarks/peers if no folder is named. Both sides are
processes that keep their model and optimizer and make a step when they are told to, in turn. Token ids, log-probs of
the behaviour policy and advantages come from one file; the first loss and gradient norm of both must agree, so both
compute the same. A step is all of it: from token ids on the host, padding or packing included, to the optimizer.

TRL gets its best settings: before the pairs, each attention and each number of rows that divides the batch is tried,
and the fastest is kept. asyncrl runs as it does by default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.config.loading import load_config, to_yaml
from asyncrl.host.processes import heap_environment
from benchmarks import common
from benchmarks.speed.models import SIZES, make_model
from benchmarks.speed.peer_environment import DEFAULT_FOLDER, Side, peer_python
from benchmarks.speed.peer_lengths import LAWS, draw_lengths, write_batch

BARS = {"equal": ">= 1.3", "lognormal": ">= 2.5"}
WORKER = Path(__file__).parent / "trl_worker.py"
PROMPT_TOKENS, GROUP_SIZE, CAP_IN_MEANS = 32, 8, 7
CLIP_LOW, CLIP_HIGH, LR = 0.2, 0.28, 1e-6
ATTENTIONS = ("sdpa", "eager")
TRIAL_STEPS = 3
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides train on, and how."""

    folder: Path
    model: Path
    batch: Path
    completions: int
    longest: int
    dtype: str
    threads: int

    def trl(self, peers: Path, attention: str, rows: int) -> Side:
        """TRL's side, ready for its first step."""
        spec = {
            "model": str(self.model),
            "threads": self.threads,
            "dtype": self.dtype,
            "attention": attention,
            "rows": rows,
            "completions": self.completions,
            "group_size": GROUP_SIZE,
            "max_new_tokens": self.longest,
            "lr": LR,
            "clip_low": CLIP_LOW,
            "clip_high": CLIP_HIGH,
            "batch": str(self.batch),
            "prompts": ["一"] * (self.completions // GROUP_SIZE),
            "output": str(self.folder / "trl"),
        }
        path = self.folder / "trl.json"
        path.write_text(json.dumps(spec))
        return _ready(Side([peers, WORKER, path], self.folder / "trl.log", self.threads))

    def asyncrl(self, settings: list[str], heap: dict[str, str] | None = None) -> Side:
        """asyncrl's side, ready for its first step; its heap is that of a trainer's rank unless `heap` says another."""
        overrides = [
            "run.name=benchmark",
            f"run.dir={self.folder / 'run'}",
            f"model.path={self.model}",
            f"model.dtype={self.dtype}",
            f"model.max_length={PROMPT_TOKENS + self.longest}",
            f"sampling.group_size={GROUP_SIZE}",
            f"sampling.max_new_tokens={self.longest}",
            "algorithm.correction=none",
            "algorithm.i_know=true",  # old and new policy are the same here: no ratio runs away
            f"algorithm.clip_low={CLIP_LOW}",
            f"algorithm.clip_high={CLIP_HIGH}",
            f"learner.groups_per_step={self.completions // GROUP_SIZE}",
            f"learner.lr={LR}",
            f"learner.threads={self.threads}",
            "learner.device=cpu",
            *settings,
        ]
        path = self.folder / "config.yaml"
        path.write_text(to_yaml(load_config(None, overrides)))
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.speed.learner_worker", path, self.batch]
        environment = (heap_environment() if heap is None else heap) | {"PYTHONPATH": os.getcwd()}
        return _ready(Side(command, self.folder / "asyncrl.log", self.threads, **environment))


def _ready(side: Side) -> Side:
    assert side.answer() == {"ready": True}
    return side


@contextmanager
def closing(side: Side) -> Iterator[Side]:
    """The side, which is ended after the body."""
    try:
        yield side
    finally:
        side.close()


def best_trl(case: Case, peers: Path, options: argparse.Namespace) -> tuple[str, int, dict[str, float]]:
    """(attention, rows of a pass) of TRL's fastest step, and the seconds of all that were tried."""
    tried: dict[tuple[str, int], float] = {}
    for attention in options.attentions:
        for rows in (rows for rows in options.rows if case.completions % rows == 0):
            with closing(case.trl(peers, attention, rows)) as side:
                side.ask()
                tried[attention, rows] = min(side.ask()["seconds"] for _ in range(TRIAL_STEPS))
            print(f"TRL, {attention}, {rows} rows a pass: {tried[attention, rows]:.2f} s", flush=True)
    attention, rows = min(tried, key=lambda key: tried[key])
    return attention, rows, {f"{name}, {count} rows": seconds for (name, count), seconds in tried.items()}


def require_agreement(ours: dict[str, Any], theirs: dict[str, Any], dtype: str) -> str:
    """A sentence about loss and norm of the first step. Raises RuntimeError when they are not the same."""
    differences = {
        name: abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3) for name in ("loss", "grad_norm")
    }
    text = ", ".join(f"{name} {ours[name]:.7g} and {theirs[name]:.7g}" for name in differences)
    if max(differences.values()) > TOLERANCES[dtype]:
        raise RuntimeError(f"the sides do not compute the same: {text}")
    return f"first step: {text}"


def measure(law: str, dtype: str, options: argparse.Namespace, peers: Path, report: common.Report) -> None:
    """All pairs of one law of lengths."""
    rng = np.random.default_rng(options.seed)
    cap = CAP_IN_MEANS * options.mean_tokens
    lengths = draw_lengths(law, options.completions, mean=options.mean_tokens, cap=cap, rng=rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = folder / "batch.npz"
        vocab = SIZES[options.size].vocab
        write_batch(batch, lengths, vocab=vocab, prompt_tokens=PROMPT_TOKENS, group_size=GROUP_SIZE, rng=rng)
        model = make_model(folder / "model", options.size)
        case = Case(folder, model, batch, len(lengths), int(lengths.max()), dtype, options.threads)
        attention, rows, tried = best_trl(case, peers, options)
        with closing(case.trl(peers, attention, rows)) as theirs, closing(case.asyncrl(options.settings)) as ours:
            sides = {"asyncrl": ours, "TRL": theirs}
            first = {side: worker.ask() for side, worker in sides.items()}
            agreement = require_agreement(first["asyncrl"], first["TRL"], dtype)
            answers = alternate(sides, options, report)
    what = f"{options.size}, {dtype}, {len(lengths)} completions of {law} lengths (mean {lengths.mean():.0f})"
    for key, unit in (("seconds", "tokens/s"), ("cpu_seconds", "tokens per CPU second")):
        rates = [[answer["tokens"] / answer[key] for answer in answers[side]] for side in ("asyncrl", "TRL")]
        report.pairs(what, unit, *rates, "TRL", BARS[law] if key == "seconds" else "")
    report.note(f"{what}: {agreement}; TRL with {attention} attention, {rows} rows a pass")
    report.note(f"TRL's seconds a step, as tried: {tried}")


def alternate(
    sides: dict[str, Side], options: argparse.Namespace, report: common.Report
) -> dict[str, list[dict[str, Any]]]:
    """Steps of both sides in turn, after one more that is not counted."""
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for worker in sides.values():
        worker.ask()
    report.begin()
    for pair in range(options.pairs):
        for side in sides if pair % 2 == 0 else reversed(sides):
            with common.watch() as watch:
                answers[side].append(sides[side].ask())
            report.watched(watch)
        seconds = {side: answers[side][-1]["seconds"] for side in sides}
        print(f"pair {pair + 1}: {seconds}, load {os.getloadavg()[0]:.1f}", flush=True)
    return answers


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=15)
    parser.add_argument("--peers", type=Path, default=DEFAULT_FOLDER, help="where TRL is installed (%(default)s)")
    parser.add_argument("--size", choices=SIZES, default="10M", help="model (default %(default)s)")
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS), help="laws of completion lengths")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCES, default=["float32"])
    parser.add_argument("--completions", type=int, default=64, help="of one batch (default %(default)s)")
    parser.add_argument("--mean-tokens", type=int, default=64, help="mean length; lognormal ones are cut at 7 of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 8, 16, 32, 64], help="TRL's rows of a pass, tried")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="configuration of asyncrl's side")
    options = common.parse(parser)
    if options.quick:
        options.size, options.completions, options.mean_tokens = "0.8M", 16, 16
        options.rows, options.attentions = [16], ["sdpa"]
    if options.completions % GROUP_SIZE:
        parser.error(f"--completions {options.completions}: must be a multiple of the group size {GROUP_SIZE}")
    peers = peer_python(options.peers)
    report = common.Report("learner_vs_trl", options)
    for dtype in options.dtypes:
        for law in options.laws:
            measure(law, dtype, options, peers, report)
    report.note(f"load average at the end: {os.getloadavg()}")
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
