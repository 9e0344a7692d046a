"""What log-probs and their gradients cost at the head of a model, against a full log-softmax.

    python -m benchmarks.speed.head [--quick] [--tokens N]

Forward and backward pass of hidden states [N, 896] and a head [152064, 896] (the sizes of Qwen2.5-0.5B), float32, each
in a process of its own, one thread.

Memory: the largest resident size of the process, less that before the passes; the gradients of both inputs are part of
it. The bar: a fifth. Time: CPU time of the process; the full log-softmax keeps its logits, so that its backward pass
needs one product less, and knows no entropy.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

from benchmarks import common

VOCAB, HIDDEN = 152_064, 896
TOKENS = 2048
BAR = "<= 0.2"
WAYS = ("asyncrl", "without entropy", "full")
TIMEOUT_S = 600


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return 0
    parser = common.arguments(__doc__ or "", pairs=5)
    parser.add_argument("--tokens", type=int, help=f"N (default {TOKENS}; 128 with --quick)")
    options = common.parse(parser)
    tokens = options.tokens or (128 if options.quick else TOKENS)
    common.pin(common.cpus()[0])
    report = common.Report("head", options)
    with common.watch() as watch:
        runs = [{way: in_a_process(way, tokens) for way in WAYS} for _ in range(options.pairs)]
    report.watched(watch)
    found = {(way, what): [run[way][what] for run in runs] for way in WAYS for what in ("megabytes", "seconds")}
    against = "full log-softmax"
    median = report.pairs(
        f"peak memory, {tokens} tokens", "MB", found["asyncrl", "megabytes"], found["full", "megabytes"], against, BAR
    )
    report.pairs("CPU time", "s", found["asyncrl", "seconds"], found["full", "seconds"], against)
    report.pairs(
        "CPU time without entropy", "s", found["without entropy", "seconds"], found["full", "seconds"], against
    )
    report.finish()
    return 0 if median <= 0.2 or options.quick else 1


def in_a_process(way: str, tokens: int) -> dict[str, float]:
    """One measurement; its memory is nobody else's."""
    command = [sys.executable, "-m", "benchmarks.speed.head", "--one", way, str(tokens)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    found: dict[str, float] = json.loads(output)
    return found


def measure(way: str, tokens: int) -> dict[str, float]:
    """Peak megabytes and CPU seconds of one forward and backward pass."""
    import torch

    from asyncrl.algorithms.logprobs import chunked_logprobs

    torch.set_num_threads(1)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN).div_(HIDDEN**0.5).requires_grad_()
    token_ids = torch.randint(0, VOCAB, (tokens,))
    small = torch.randn(8, 8, requires_grad=True)
    chunked_logprobs(small, small, torch.arange(8))[0].sum().backward()  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if way == "full":
        log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)
        logprobs = log_p.gather(1, token_ids[:, None])
    else:
        logprobs, _ = chunked_logprobs(hidden, weight, token_ids, entropies=way == "asyncrl")
    logprobs.sum().backward()
    seconds = time.process_time() - started
    return {"megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
