"""Whether `asyncrl simulate` foretells tokens/s and mean policy age of runs that are then made.

    python -m benchmarks.speed.simulator [--quick] [--steps 60] [--runs FOLDER] [--model runs/models/arithmetic]

The quickstart is run with 1 and 2 generators and max_age 0, 1 and 4, each side in one thread. All six are foretold from
one of them, 1 generator and max_age=1, as a user would (`--like`); beside it stands each run's simulation of itself. A
row compares what was foretold with what the run measured, over its steps after the first fifth. Under max_age=0 every
token must have age 0, and each step must be on the groups that the simulation had.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from asyncrl.config.loading import load_config
from asyncrl.metrics import METRICS_FILE, iterate_records
from asyncrl.metrics.types import StepMetrics
from asyncrl.simulator.recorded import Fit, fit_run, shared_cores
from asyncrl.simulator.run import SimulatedRun
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import StepTaken
from benchmarks import common

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
CELLS = tuple((generators, age) for generators in (1, 2) for age in (0, 1, 4))
CALIBRATION = (1, 1)
TIMEOUT_S = 400.0
BAR = "0.90 to 1.10"


def folder_of(runs: Path, cell: tuple[int, int]) -> Path:
    """Where the run of a cell lies."""
    return runs / f"g{cell[0]}a{cell[1]}"


def make_run(folder: Path, model: Path, steps: int, cell: tuple[int, int]) -> None:
    """One run of both daemons."""
    generators, age = cell
    settings = (f"run.dir={folder}", f"run.steps={steps}", f"staleness.max_age={age}", f"model.path={model}")
    threads = ("learner.threads=1", "generator.threads=1", "run.journal_keep=true")
    command = [sys.executable, "-m", "asyncrl.cli.main", "run", str(CONFIG), "--generators", str(generators)]
    subprocess.run([*command, *settings, *threads], cwd=ROOT, timeout=TIMEOUT_S, check=True)


def fit_of(folder: Path) -> Fit:
    """A run that was made, as it can be simulated."""
    config = load_config(folder / "config.yaml")
    return fit_run(folder, config, shared=shared_cores(config))


def foretell(fit: Fit, cell: tuple[int, int]) -> SimulatedRun:
    """What the run that `fit` is of says about another one; it has been run."""
    sizes = replace(fit.sizes, generators=cell[0], max_age=cell[1])
    return SimulatedRun(sizes, fit.service, shared=fit.shared, keep_batches=True)


def batches_of(folder: Path) -> dict[int, list[int]]:
    """The ordinals that each step was on, by the version that it began at, in their order."""
    journal = folder / "journal"
    segments = sorted(int(path.stem) for path in journal.glob("*.segment"))
    records = (entry.record for entry in JournalReader(journal, segments))
    return {
        record.version: [ordinal for ordinal, _ in record.groups] for record in records if isinstance(record, StepTaken)
    }


def cpu_of(folder: Path) -> float:
    """CPU seconds of the generators for 1,000 tokens: the same work in all runs."""
    records = iterate_records(folder / METRICS_FILE)
    steps = [record for record in records if record is not None and record.get("kind") == StepMetrics.kind][1:]
    return 1000 * sum(step["generator_cpu_s"] for step in steps) / sum(step["tokens_generated"] for step in steps)


def compare(report: common.Report, runs: Path) -> None:
    """All rows of the table."""
    fits = {cell: fit_of(folder_of(runs, cell)) for cell in CELLS}
    for cell, fit in fits.items():
        name = f"{cell[0]} generator{'s' * (cell[0] > 1)}, max_age={cell[1]}"
        simulation = foretell(fits[CALIBRATION], cell)
        foretold, figures = simulation.run(), fit.figures
        against = "measured"
        report.pairs(f"{name}: tokens/s", "tokens/s", [foretold.tokens_per_s], [figures.tokens_per_s], against, BAR)
        itself = fit.itself
        report.pairs(f"{name}: tokens/s of itself", "tokens/s", [itself.tokens_per_s], [figures.tokens_per_s], against)
        if cell[1]:
            report.pairs(f"{name}: mean age", "steps", [foretold.age_mean], [figures.age_mean], against, BAR)
            report.pairs(f"{name}: mean age of itself", "steps", [itself.age_mean], [figures.age_mean], against)
            continue
        report.figure(f"{name}: largest age foretold, mean age measured", "steps", [foretold.age_max, figures.age_mean])
        real = batches_of(folder_of(runs, cell))
        equal = sum(
            list(simulation.steps[version].ordinals) == real[version]
            for version in real
            if version < len(simulation.steps)
        )
        report.figure(f"{name}: steps on the same groups, of {len(real)}", "steps", [equal])


def main() -> None:
    """Makes the runs, where they are not given, and compares."""
    parser = common.arguments(__doc__ or "", pairs=1)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run (default %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder with runs that were made, g1a0 to g2a4")
    parser.add_argument("--model", type=Path, default=Path("runs/models/arithmetic"), help="default: %(default)s")
    options = common.parse(parser)
    report = common.Report("simulator", options)
    runs = options.runs or options.results.resolve() / "simulator_runs"
    if options.runs is None:
        report.begin()
        with common.watch() as watched:
            for cell in CELLS:
                make_run(folder_of(runs, cell), options.model.resolve(), 20 if options.quick else options.steps, cell)
        report.watched(watched)
    compare(report, runs)
    cpu = ", ".join(f"g{cell[0]}a{cell[1]} {cpu_of(folder_of(runs, cell)):.2f}" for cell in CELLS)
    report.note(f"generators' CPU seconds for 1,000 sampled tokens, how steady the machine was: {cpu}")
    if options.runs is not None:
        report.note("the runs were made before: what others took of the CPU meanwhile was not watched")
    options.runs = None  # where they lie is no part of the result
    report.finish()


if __name__ == "__main__":
    main()
