"""Part "desk" of the crash loops: the real desk, its sockets and the real generator daemons, around stubs."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.crash_loops.answers import answer_times
from benchmarks.faults.crash_loops.audit import audit, generator_accounts
from benchmarks.faults.crash_loops.killer import LEARNER, TRAINER, Killer, python
from benchmarks.faults.crash_loops.settings import FILE, Settings, settings_of
from benchmarks.studies.async_vs_sync import free_port

PACKAGE = "benchmarks.faults.crash_loops"
GENERATORS = ("g0", "g1", "g2")
KILLS = {LEARNER: 2.0, TRAINER: 0.2, "g0": 2.0, "g1": 2.0, "g2": 2.0}  # weights
MEAN_PAUSE_S = 0.35
ROLLOUTS = 1_000_000
MIN_KILLS = 1000
QUICK_STEPS = 30


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """One piece of the loop, or all of it; the figures once the run has trained its last step, else None.

    Raises LoopError when a process ended by itself.
    """
    if not (folder / FILE).exists():
        settings = Settings(port=free_port(), steps=math.ceil(1.01 * ROLLOUTS / (32 * 64)))
        if options.quick:
            settings = Settings(
                port=free_port(),
                steps=QUICK_STEPS,
                groups_per_step=8,
                group_size=4,
                max_sequences=32,
                checkpoint_every=5,
            )
        settings.write(folder)
    commands = {LEARNER: python(f"{PACKAGE}.stub_learner", folder)}
    commands |= {name: python(f"{PACKAGE}.stub_generator", folder, name) for name in GENERATORS}
    killer = Killer(folder, commands, options.seed)
    try:
        killer.start_all()
        finished = killer.run(options.seconds, MEAN_PAUSE_S, KILLS)
    finally:
        killer.stop_all()
        killer.save()
    return figures(folder, options) if finished else None


def figures(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the ledgers of a finished run say."""
    settings = settings_of(folder)
    verdict = audit(folder / "ledgers", folder / "archive", settings.groups_per_step, settings.steps)
    seconds = sorted(answer_times(folder / "ledgers", generator_accounts(folder / "ledgers")))
    kills = json.loads((folder / "kills.json").read_text())
    wanted = options.kills if options.kills is not None else (10 if options.quick else MIN_KILLS)
    if sum(kills.values()) < wanted:
        verdict.complain(f"{sum(kills.values())} kills, {wanted} were wanted")
    return {
        "kills": sum(kills.values()),
        "kills_by_process": kills,
        **asdict(verdict),
        "answers": len(seconds),
        "answer_median_s": round(statistics.median(seconds), 3) if seconds else None,
        "answer_p95_s": round(seconds[int(0.95 * (len(seconds) - 1))], 3) if seconds else None,
        "answer_max_s": round(seconds[-1], 3) if seconds else None,
    }
