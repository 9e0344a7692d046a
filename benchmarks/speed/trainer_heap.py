"""The trainer's step on a CPU with the heap that a rank is given (`heap_environment`) against glibc's own.

    python -m benchmarks.speed.trainer_heap [--quick]

Two processes with the same model, batch and threads make a step in turn, as in `learner_vs_trl`, with micro-batches of
2,048 tokens, which `asyncrl run` picks on cores. The largest resident size of each process stands beside the times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.speed.learner_vs_trl import CAP_IN_MEANS, GROUP_SIZE, PROMPT_TOKENS, Case, alternate, closing
from benchmarks.speed.memory_forecast import resident
from benchmarks.speed.models import SIZES, make_model
from benchmarks.speed.peer_lengths import LAWS, draw_lengths, write_batch

SIZE = "10M"
SETTINGS = ["learner.micro_batch_tokens=2048"]
GLIBCS_OWN = {"GLIBC_TUNABLES": ""}


def measure(law: str, options: argparse.Namespace, report: common.Report) -> None:
    """All pairs of one law of lengths."""
    rng = np.random.default_rng(options.seed)
    mean = options.mean_tokens
    lengths = draw_lengths(law, options.completions, mean=mean, cap=CAP_IN_MEANS * mean, rng=rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch, vocab = folder / "batch.npz", SIZES[SIZE].vocab
        write_batch(batch, lengths, vocab=vocab, prompt_tokens=PROMPT_TOKENS, group_size=GROUP_SIZE, rng=rng)
        model = make_model(folder / "model", SIZE)
        case = Case(folder, model, batch, len(lengths), int(lengths.max()), "float32", options.threads)
        with closing(case.asyncrl(SETTINGS)) as kept, closing(case.asyncrl(SETTINGS, GLIBCS_OWN)) as own:
            sides = {"kept": kept, "glibc's own": own}
            for worker in sides.values():
                worker.ask()
            answers = alternate(sides, options, report)
            peaks = {side: resident("VmHWM", worker.pid) / 1e6 for side, worker in sides.items()}
    what = f"{SIZE}, float32, {len(lengths)} completions of {law} lengths"
    for key, unit in (("seconds", "s a step"), ("cpu_seconds", "CPU seconds a step")):
        times = [[answer[key] for answer in answers[side]] for side in sides]
        report.pairs(what, unit, *times, "glibc's own heap", "< 1" if key == "seconds" else "")
    report.pairs(what, "MB at most", *([peak] for peak in peaks.values()), "glibc's own heap", "")


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=9)
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS), help="laws of completion lengths")
    parser.add_argument("--completions", type=int, default=64, help="of one batch (default %(default)s)")
    parser.add_argument("--mean-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = common.parse(parser)
    if options.quick:
        options.completions, options.mean_tokens = 16, 16
    report = common.Report("trainer_heap", options)
    for law in options.laws:
        measure(law, options, report)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
