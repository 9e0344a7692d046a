"""How fast the digest of weights is, and whether damage gets past it.

    python -m benchmarks.speed.digest [--quick] [--tries N]

Speed: 64 MiB of random words, in CPU time of one thread, against one copy of the same bytes.

Damage: each try takes words of one of several kinds (zeros, constants, random words, trained weights in float32 and
bfloat16), damages a copy, and compares the digests. A try that leaves the bytes as they were does not count. The bar:
none of a million is missed.

    flip         one bit of one word
    complement   all bits of one word
    swap         two words exchange their places
    shift        all words move by one place, the last one comes first
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from benchmarks import common

if TYPE_CHECKING:  # --help should not wait for torch
    import numpy as np

NUM_BYTES = 64 * 2**20
TRIES = 250_000  # of each kind of damage
WORDS = 96
BAR = "<= 9"  # times one copy: 2 GB/s where a copy makes 18, as on the machine of results/digest.json


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=15)
    parser.add_argument("--tries", type=int, help=f"of each kind of damage (default {TRIES}; 500 with --quick)")
    options = common.parse(parser)
    tries = options.tries or (500 if options.quick else TRIES)
    common.pin(common.cpus()[0])
    report = common.Report("digest", options)
    with common.watch() as watch:
        digest_s, copy_s = measure(NUM_BYTES // 16 if options.quick else NUM_BYTES, options.pairs)
    report.watched(watch)
    report.pairs("digest of 64 MiB", "s", digest_s, copy_s, "one copy", BAR)
    size = (NUM_BYTES // 16 if options.quick else NUM_BYTES) / 1e9
    report.figure("digest", "GB/s", [size / seconds for seconds in digest_s])
    missed = 0
    for name, damage in damages().items():
        counted, unseen = try_damage(damage, tries)
        missed += unseen
        report.note(f"{name}: {unseen} of {counted} not seen")
    report.figure("damage not seen", "tries", [float(missed)])
    report.finish()
    return 1 if missed else 0


def measure(num_bytes: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of CPU time for digests and for copies, in turn."""
    import torch

    from asyncrl.weights.bytes.digest import digest

    torch.set_num_threads(1)
    words = torch.randint(-(2**62), 2**62, (num_bytes // 8,))
    copy = torch.empty_like(words)
    digest(words)
    digest_s, copy_s = [], []
    for _ in range(pairs):
        for work, seconds in ((lambda: digest(words), digest_s), (lambda: copy.copy_(words), copy_s)):
            started = time.thread_time()
            work()
            seconds.append(time.thread_time() - started)
    return digest_s, copy_s


def damages() -> dict[str, Callable[[np.ndarray, np.random.Generator], None]]:
    """What is done to uint64 words, in place."""
    import numpy as np

    def flip(words: np.ndarray, random: np.random.Generator) -> None:
        words[random.integers(len(words))] ^= np.uint64(1) << np.uint64(random.integers(64))

    def complement(words: np.ndarray, random: np.random.Generator) -> None:
        words[random.integers(len(words))] ^= np.uint64(2**64 - 1)

    def swap(words: np.ndarray, random: np.random.Generator) -> None:
        left, right = random.integers(len(words), size=2)
        words[[left, right]] = words[[right, left]]

    def shift(words: np.ndarray, random: np.random.Generator) -> None:
        words[:] = np.roll(words, 1)

    return {"flip": flip, "complement": complement, "swap": swap, "shift": shift}


def contents(random: np.random.Generator) -> Iterator[np.ndarray]:
    """Words as weights have them, uint64 [WORDS]."""
    import numpy as np
    import torch

    while True:
        yield np.zeros(WORDS, dtype=np.uint64)
        yield np.resize(np.full(2, random.normal(), dtype=np.float32).view(np.uint64), WORDS)
        yield random.integers(0, 2**64, WORDS, dtype=np.uint64)
        yield (random.normal(size=2 * WORDS).astype(np.float32) * 0.02).view(np.uint64)
        yield random.choice(np.array([0.0, -0.0, 1.0, 2.0, -1.0], dtype=np.float32), 2 * WORDS).view(np.uint64)
        weights = torch.from_numpy(random.normal(size=4 * WORDS) * 0.02).bfloat16()
        yield weights.view(torch.int64).numpy().view(np.uint64).copy()


def try_damage(damage: Callable[[np.ndarray, np.random.Generator], None], tries: int) -> tuple[int, int]:
    """(tries that changed the bytes, those of them that kept the digest)."""
    import numpy as np
    import torch

    from asyncrl.weights.bytes.digest import digest

    random = np.random.default_rng(0)
    counted = unseen = 0
    source = contents(random)
    per_content = 50
    while counted < tries:
        words = next(source)
        before = digest(torch.from_numpy(words.view(np.int64)))
        num_tries = 1 if damage.__name__ == "shift" else per_content
        for _ in range(num_tries):
            damaged = words.copy()
            damage(damaged, random)
            if np.array_equal(damaged, words):
                continue
            counted += 1
            unseen += digest(torch.from_numpy(damaged.view(np.int64))) == before
    return counted, unseen


if __name__ == "__main__":
    sys.exit(main())
