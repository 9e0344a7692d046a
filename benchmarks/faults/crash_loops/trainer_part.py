"""Part "trainer" of the crash loops: the real learner is killed, and its weights are those of an undisturbed replay.

The replay is a second learner on a copy of the journal, without checkpoints and without generators: it trains all steps
again, from the initial model. Its exported weights must equal those of the disturbed run bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asyncrl.storage.records import StepTaken, StoredGroup
from benchmarks.faults.crash_loops.answers import answer_figures
from benchmarks.faults.crash_loops.audit import audit, generator_accounts, records_of
from benchmarks.faults.crash_loops.killer import LEARNER, ROOT, TRAINER, Killer, kills_of, python
from benchmarks.faults.crash_loops.ledger import MadeStep, TrainerLedger, sha
from benchmarks.faults.crash_loops.settings import FILE, Settings, settings_of
from benchmarks.studies.async_vs_sync import free_port

PACKAGE = "benchmarks.faults.crash_loops"
GENERATORS = ("g0", "g1")
WEIGHTS = {LEARNER: 4.0, TRAINER: 1.0}
MEAN_PAUSE_S = 3.0
KILLS = 65  # some fifth of them of the trainer alone
STEPS = 250
QUICK_STEPS = 20
QUICK_KILLS = 3
REPLAY_TIMEOUT_S = 600.0


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """One piece of the loop, or all of it; the figures once the run has trained its last step, else None.

    Raises LoopError when a process ended by itself.
    """
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        Settings(
            port=free_port(),
            steps=QUICK_STEPS if options.quick else STEPS,
            kills=options.kills or (QUICK_KILLS if options.quick else KILLS),
            groups_per_step=4,
            group_size=4,
            max_sequences=32,
            token_s=0.02,
            vocab=100,
            real_trainer=True,
        ).write(folder)
    commands = {LEARNER: python(f"{PACKAGE}.real_learner", folder)}
    commands |= {name: python(f"{PACKAGE}.stub_generator", folder, name) for name in GENERATORS}
    killer = Killer(folder, commands, options.seed)
    try:
        killer.start_all()
        finished = killer.run(options.seconds, MEAN_PAUSE_S, WEIGHTS)
    finally:
        killer.stop_all()
    return figures(folder) if finished else None


def figures(folder: Path) -> dict[str, Any]:
    """What the ledgers and the weights of a finished run say."""
    settings = settings_of(folder)
    (folder / "ledgers" / "steps.trainer").unlink(missing_ok=True)
    _note_decided_steps(folder)
    verdict = audit(folder / "ledgers", folder / "archive", settings.groups_per_step, settings.steps)
    kills = kills_of(folder)
    if sum(kills.values()) < settings.kills:
        verdict.complain(f"{sum(kills.values())} kills, {settings.kills} were wanted")
    disturbed, replayed = weights_digest(folder / "run"), replay(folder)
    if disturbed != replayed:
        verdict.complain(f"the weights of the run ({disturbed}) are not those of the replay ({replayed})")
    return {
        "kills": sum(kills.values()),
        "kills_by_process": kills,
        **asdict(verdict),
        "weights": disturbed,
        "weights_of_replay": replayed,
        **answer_figures(folder / "ledgers", generator_accounts(folder / "ledgers")),
    }


def _note_decided_steps(folder: Path) -> None:
    """The real trainer keeps no ledger: its steps are those of the journal, and that it made them its weights say."""
    bodies: dict[tuple[int, int], str] = {}
    ledger = TrainerLedger(folder / "ledgers" / "steps.trainer")
    for record in records_of(folder / "archive"):
        if isinstance(record, StoredGroup):
            bodies[record.ordinal, record.attempt] = sha(record.body)
        elif isinstance(record, StepTaken):
            groups = tuple((*group, bodies.get(group, "")) for group in record.groups)
            ledger.made(MadeStep(record.version + 1, "", groups))


def weights_digest(run_dir: Path) -> str:
    """Of the exported weights, byte for byte."""
    digest = hashlib.sha256()
    for path in sorted((run_dir / "export").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def replay(folder: Path) -> str:
    """Trains the whole journal again, undisturbed and without generators; the digest of what comes out."""
    run_dir = folder / "replay"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(mode=0o700)
    shutil.copytree(folder / "archive", run_dir / "journal")
    with (folder / "logs" / "replay.log").open("wb") as log:
        command = python(f"{PACKAGE}.real_learner", folder, run_dir)
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=REPLAY_TIMEOUT_S, check=True)
    return weights_digest(run_dir)
