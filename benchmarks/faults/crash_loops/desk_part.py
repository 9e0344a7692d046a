"""Part "desk" of the crash loops: the real desk, its sockets and the real generator daemons, around stubs."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.crash_loops.answers import answer_figures
from benchmarks.faults.crash_loops.audit import audit, generator_accounts
from benchmarks.faults.crash_loops.killer import LEARNER, TRAINER, Killer, kills_of, python
from benchmarks.faults.crash_loops.settings import FILE, Settings, settings_of
from benchmarks.studies.async_vs_sync import free_port

PACKAGE = "benchmarks.faults.crash_loops"
GENERATORS = ("g0", "g1", "g2")
WEIGHTS = {LEARNER: 2.0, TRAINER: 0.2, "g0": 2.0, "g1": 2.0, "g2": 2.0}
MEAN_PAUSE_S = 0.35
ROLLOUTS = 1_000_000
MARGIN = 1.12  # a killed generator has not noted the acknowledgement of all that is stored
KILLS = 1000
QUICK_STEPS = 30
QUICK_KILLS = 10


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """One piece of the loop, or all of it; the figures once the run has trained its last step, else None.

    Raises LoopError when a process ended by itself.
    """
    if not (folder / FILE).exists():
        settings(options).write(folder)
    commands = {LEARNER: python(f"{PACKAGE}.stub_learner", folder)}
    commands |= {name: python(f"{PACKAGE}.stub_generator", folder, name) for name in GENERATORS}
    killer = Killer(folder, commands, options.seed)
    try:
        killer.start_all()
        finished = killer.run(options.seconds, MEAN_PAUSE_S, WEIGHTS)
    finally:
        killer.stop_all()
    return figures(folder) if finished else None


def settings(options: argparse.Namespace) -> Settings:
    """Those of a new run."""
    if not options.quick:
        steps = math.ceil(MARGIN * ROLLOUTS / (32 * 64))
        return Settings(free_port(), steps, options.kills or KILLS, groups_per_step=32, group_size=64)
    return Settings(
        free_port(),
        QUICK_STEPS,
        options.kills or QUICK_KILLS,
        groups_per_step=8,
        group_size=4,
        max_sequences=32,
        checkpoint_every=5,
    )


def figures(folder: Path) -> dict[str, Any]:
    """What the ledgers of a finished run say."""
    settings = settings_of(folder)
    verdict = audit(folder / "ledgers", folder / "archive", settings.groups_per_step, settings.steps)
    kills = kills_of(folder)
    if sum(kills.values()) < settings.kills:
        verdict.complain(f"{sum(kills.values())} kills, {settings.kills} were wanted")
    return {
        "kills": sum(kills.values()),
        "kills_by_process": kills,
        **asdict(verdict),
        **answer_figures(folder / "ledgers", generator_accounts(folder / "ledgers")),
    }
