"""How small and how fast lossless deltas are: training steps on a bfloat16 model, each followed by a sync in memory.

    python -m benchmarks.speed.weight_delta [--quick]

A random model of the Llama type (weights of standard deviation 0.02) in float32 masters under AdamW; its bfloat16
snapshot is compared with the one before, and the delta is applied to a copy of that one, which then must have the same
bytes as the new snapshot. No network: what is measured is encoding and applying, against one copy of the same bytes.

What drives the updates is a choice, and decides how much changes:

    text    the loss of the model on random tokens, new ones at each step: gradients that agree from step to step at
            first, as in a run that learns
    noise   independent gradients for every weight and step: what AdamW makes of pure noise

A first AdamW step moves every weight by the full learning rate, so the first deltas are the largest. Neither is a
reinforcement learning run on a pretrained model.

Times are CPU time of the thread: a busy machine does not count as slow code. Bytes do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:  # --help should not wait for torch
    import torch

    from asyncrl.weights.bytes.snapshot import SnapshotBuffer

LEARNING_RATE = 1e-6
DRIVES = ("text", "noise")
BAR = "<= 0.05"
BUCKET_BYTES = 64 * 2**20
# Vocabulary, hidden size, layers, heads, inner size: 104 M parameters, and a small one for --quick.
SHAPE = (24_576, 768, 12, 12, 2048)
QUICK_SHAPE = (512, 128, 2, 4, 384)
TOKENS = 16


@dataclass(slots=True)
class Figures:
    """One value per step."""

    delta_mb: list[float] = field(default_factory=list)
    dense_mb: list[float] = field(default_factory=list)
    encode_ms: list[float] = field(default_factory=list)
    apply_ms: list[float] = field(default_factory=list)
    digest_ms: list[float] = field(default_factory=list)
    copy_ms: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)  # 1 for a sync whose result has other bytes


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=200)
    parser.add_argument("--drives", nargs="+", choices=DRIVES, default=list(DRIVES), help="default: both")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of AdamW (default %(default)g)")
    options = common.parse(parser)
    common.pin(common.cpus()[0])
    report = common.Report("weight_delta", options)
    for drive in options.drives:
        report.begin()
        with common.watch() as watch:
            figures = measure(drive, options)
        report.watched(watch)
        add_rows(report, drive, figures)
    report.finish()
    return 0


def measure(drive: str, options: argparse.Namespace) -> Figures:
    """One step and one sync per pair."""
    import torch

    from asyncrl.weights.bytes.snapshot import SnapshotBuffer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _model(QUICK_SHAPE if options.quick else SHAPE)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, fused=True)
    step = _text_step(model) if drive == "text" else _noise_step(parameters)
    buffer = SnapshotBuffer(model.named_parameters(remove_duplicate=False), BUCKET_BYTES, torch.bfloat16)
    new, old = buffer, buffer.twin()
    old.snapshot()
    received, figures = old.flat.clone(), Figures()
    for index in range(options.pairs):
        step()
        optimizer.step()
        new.snapshot()
        sync(old, new, received, index, figures)
        new, old = old, new
    return figures


def sync(old: SnapshotBuffer, new: SnapshotBuffer, received: torch.Tensor, version: int, figures: Figures) -> None:
    """Brings `received` from the bytes of `old` to those of `new` and notes what it took."""
    import torch

    from asyncrl.weights.bytes.delta import apply_delta, encode_delta
    from asyncrl.weights.bytes.digest import digest_buckets

    layout = new.layout
    with _Timed(figures.encode_ms):
        delta = encode_delta(layout, old.flat, new.flat, version, max_share=2.0)
    assert delta is not None
    with _Timed(figures.apply_ms):
        apply_delta(layout, received, delta.info, [delta.payload])
    exact = torch.equal(received.view(torch.int64), new.flat.view(torch.int64))
    figures.wrong.append(float(not exact))
    figures.delta_mb.append(delta.info.num_bytes / 1e6)
    figures.dense_mb.append(layout.total_bytes / 1e6)
    with _Timed(figures.copy_ms):
        old.flat.copy_(new.flat)  # its bytes are not needed any more
    if version % 10 == 0:
        with _Timed(figures.digest_ms):
            digest_buckets(layout, received)
        share = figures.delta_mb[-1] / figures.dense_mb[-1]
        print(f"sync {version + 1}: {share:.2%} of the dense bytes, {sum(figures.wrong):.0f} wrong", flush=True)


class _Timed:
    """Appends the milliseconds of CPU time that the body took in this thread."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(self, *exception: object) -> None:
        self._values.append((time.thread_time() - self._started) * 1e3)


def _model(shape: tuple[int, int, int, int, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, hidden, layers, heads, inner = shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        tie_word_embeddings=True,  # every row of the embedding has a gradient, through the head
    )
    return LlamaForCausalLM(config).float()


def _text_step(model: Any) -> Callable[[], None]:
    import torch

    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return step


def _noise_step(parameters: list[torch.Tensor]) -> Callable[[], None]:
    """Windows of one pool of normal numbers, at places of their own: drawing 100 M at each step would take longer than
    all the rest.
    """
    import torch

    pool = torch.randn(2 * max(parameter.numel() for parameter in parameters))
    starts: Iterator[int] = iter(torch.randint(0, pool.numel() // 2, (1_000_000,)).tolist())

    def step() -> None:
        for parameter in parameters:
            start = next(starts)
            parameter.grad = pool[start : start + parameter.numel()].view(parameter.shape)

    return step


def add_rows(report: common.Report, drive: str, figures: Figures) -> None:
    """The rows of one drive."""
    dense_mb = figures.dense_mb[0]
    report.pairs(f"{drive}: bytes of a sync", "MB", figures.delta_mb, figures.dense_mb, "dense", BAR)
    report.pairs(f"{drive}: encoding", "ms", figures.encode_ms, figures.copy_ms, "one copy")
    report.pairs(f"{drive}: applying", "ms", figures.apply_ms, figures.copy_ms, "one copy")
    speeds = {"encoding": figures.encode_ms, "applying": figures.apply_ms, "digests": figures.digest_ms}
    for name, values in speeds.items():
        report.figure(f"{drive}: {name}, of the dense bytes", "GB/s", [dense_mb / value for value in values])
    report.note(
        f"{drive}: {dense_mb / 2:.0f} M parameters; largest sync {max(figures.delta_mb) / dense_mb:.2%}, "
        f"last {figures.delta_mb[-1] / dense_mb:.2%} of the dense bytes; "
        f"{sum(figures.wrong):.0f} of {len(figures.wrong)} syncs were not bit-exact"
    )


if __name__ == "__main__":
    sys.exit(main())
