"""Runs seeds of the simulation: `python -m tests.simulation.run --seed 17`, or `--seeds 1000 --first 0`."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.simulation.checker import Violation
from tests.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="this seed alone, and what happened in it")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    failed = []
    started = time.perf_counter()
    for seed in seeds:
        try:
            world = simulate(seed)
            if options.seed is not None:
                print(world.plan, world.counts, dict(world.checker.counts), world.digest, *world.events, sep="\n")
        except (Exception, Violation):  # noqa: BLE001 - whatever a seed found is told, and the next one runs
            failed.append(seed)
            print(f"--- seed {seed}", traceback.format_exc(limit=-6), sep="\n", flush=True)
    print(f"{len(seeds)} seeds, {time.perf_counter() - started:.1f} s, failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
