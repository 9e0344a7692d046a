"""`asyncrl replay` and `asyncrl what-if`: trains a run's recorded rollouts again, without generators.

The journal holds every batch in its order. A second learner on a copy of it, without a checkpoint, trains all of them
from the run's first weights; it is the learner that goes on after a crash, and does nothing else than that. A replay at
the run's own settings gives the same numbers to the last bit, on the same kind of machine with as many threads and
ranks. With other settings of the loss or the optimizer (`what-if`) the rollouts are still those that the run's own
policy sampled: what the other settings would have sampled is not known, so rewards say nothing about them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from asyncrl.cli.common import Parser, start_log
from asyncrl.cli.reading.report import RUN_HELP
from asyncrl.config import Config
from asyncrl.errors import ConfigError, UserError
from asyncrl.metrics import METRICS_FILE, iterate_records
from asyncrl.metrics.types import StepMetrics
from asyncrl.report.run_records import run_folder

# Sections whose keys say how a batch is trained on, and not which batches there are.
TRAINING_SECTIONS = ("algorithm", "critic", "update", "learner")
# Keys of those sections by which rollouts were sampled or batches cut.
RECORDED_KEYS = ("learner.groups_per_step", "algorithm.dynamic_sampling")
SEGMENTS = "*.segment"
RUN_EPOCH_FILE = "run_epoch"
COMPARED = (
    "loss", "policy_loss", "kl_reference", "kl_behaviour", "clip_fraction", "ratio_max", "ess_share", "entropy",
    "grad_norm", "value_loss", "reward_mean",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What is on disk of a run: its configuration, and how many steps its journal holds from the first on."""

    folder: Path
    config: Config
    steps: int


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first step at which a figure of the two runs differs."""

    version: int
    figure: str
    recorded: float | None
    again: float | None


@dataclass(frozen=True, slots=True)
class ReplayComparison:
    """Steps that both have, the first difference of their figures, and whether the last weights are equal.

    weights_equal is None where the run did not end at the last of these versions.
    """

    steps: int
    difference: FirstDifference | None
    weights_equal: bool | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.difference is None and self.weights_equal is not False


def replay(argv: Sequence[str]) -> int:
    """Runs `asyncrl replay`; returns 0 when every figure and the weights are those of the run, else 1."""
    parser = Parser(
        prog="asyncrl replay",
        description="Trains a run again from its journal, without generators, and compares every step with what the "
        "run wrote down. The run itself is only read. It needs the whole journal: run.journal_keep=true.",
        epilog="example: asyncrl replay runs/quickstart",
    )
    _add_common(parser)
    arguments = parser.parse_intermixed_args(argv)
    recorded = read_recorded(run_folder(arguments.run), arguments.steps)
    again = train_again(recorded, _folder(recorded, arguments.into, "replay"), arguments.settings)
    comparison = compare(recorded, again)
    print("\n".join(comparison_lines(comparison)), flush=True)
    return 0 if comparison.equal else 1


def what_if(argv: Sequence[str]) -> int:
    """Runs `asyncrl what-if`; returns 0 once the recorded rollouts are trained on under the other settings."""
    parser = Parser(
        prog="asyncrl what-if",
        description="Trains on the recorded rollouts of a run under other settings of the loss or the optimizer "
        f"(keys of {', '.join(TRAINING_SECTIONS)}), and sets the figures beside those of the run. Counterfactual: the "
        "rollouts stay those that the run's own policy sampled, so rewards do not change.",
        epilog="example: asyncrl what-if runs/quickstart algorithm.clip_high=0.28 learner.lr=3e-5",
    )
    _add_common(parser)
    arguments = parser.parse_intermixed_args(argv)
    check_settings(arguments.settings)
    recorded = read_recorded(run_folder(arguments.run), arguments.steps)
    check_baselines(recorded, arguments.settings)
    again = train_again(recorded, _folder(recorded, arguments.into, "what-if"), arguments.settings)
    print("\n".join(side_by_side(recorded, again, arguments.settings)), flush=True)
    return 0


def _add_common(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=f"{RUN_HELP}; no learner may be at work on it")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="wins over what the run was started with")
    parser.add_argument("--steps", type=int, metavar="N", help="only the first N steps")
    parser.add_argument("--into", type=Path, help="folder for what is trained (default RUN/replays/NAME-N)")


def check_settings(settings: Sequence[str]) -> None:
    """Raises ConfigError unless all of these say how a batch is trained on."""
    for setting in settings:
        name = setting.partition("=")[0]
        if name.partition(".")[0] not in TRAINING_SECTIONS or name in RECORDED_KEYS:
            raise ConfigError(
                f"{setting}: the rollouts and batches of a recorded run are what they are; what-if takes keys of "
                f"{', '.join(TRAINING_SECTIONS)}, without {' and '.join(RECORDED_KEYS)}"
            )


def check_baselines(recorded: RecordedRun, settings: Sequence[str]) -> None:
    """Raises ConfigError when the settings ask for greedy completions, which the run did not sample."""
    from asyncrl.config.loading import load_config
    from asyncrl.desk.opening.run_record import CONFIG_FILE

    had = recorded.config.algorithm.advantage
    if had == "remax" or load_config(recorded.folder / CONFIG_FILE, settings).algorithm.advantage != "remax":
        return
    raise ConfigError(
        "algorithm.advantage=remax compares each rollout with a greedy completion of its prompt, and "
        f"{recorded.folder}, a run with algorithm.advantage={had}, sampled none; take an advantage that needs "
        "none, or start a run of its own with remax"
    )


# -- what is recorded ----------------------------------------------------------------------------------------


def read_recorded(folder: Path, steps: int | None = None) -> RecordedRun:
    """Reads what a run recorded; steps: no more of it than these.

    Raises UserError when there is no run, JournalError when a learner is at work on it, and UserError naming the key
    when the journal does not go back to the first step.
    """
    from asyncrl.config.loading import load_config
    from asyncrl.desk.opening.run_record import CONFIG_FILE, read_record
    from asyncrl.replay.recovery import replay_plan
    from asyncrl.storage.journal import Journal
    from asyncrl.types import Frontier

    if not (folder / CONFIG_FILE).is_file() or not any((folder / "journal").glob(SEGMENTS)):
        raise UserError(f"{folder} holds no run: no {CONFIG_FILE}, or no journal; give the run.dir of one")
    record = read_record(folder)
    if record is not None and record.forked_from:
        raise UserError(
            f"the run in {folder} began with the weights of {record.forked_from}, which its journal does not hold: "
            "only runs that began with model.path can be trained again"
        )
    config = load_config(folder / CONFIG_FILE)
    journal = Journal.open(folder / "journal", untouched=True)
    try:
        if journal.begins_later:
            raise UserError(
                f"the journal of {folder} does not go back to the first step: what no checkpoint needs was deleted. "
                "run.journal_keep=true keeps all of it, from the start of a run on"
            )
        found = len(replay_plan(0, Frontier(), journal.found()).steps)
    finally:
        journal.close()
    if found == 0:
        raise UserError(f"the journal of {folder} holds no step yet")
    if steps is not None and not 1 <= steps <= found:
        raise UserError(f"--steps {steps}: the journal of {folder} holds {found} steps")
    return RecordedRun(folder, config, found if steps is None else steps)


def _folder(recorded: RecordedRun, into: Path | None, name: str) -> Path:
    if into is not None:
        if into.exists() and any(into.iterdir()):
            raise UserError(f"--into {into}: the folder is not empty; give another one")
        return into
    root = recorded.folder / "replays"
    return next(path for n in itertools.count(1) if not (path := root / f"{name}-{n}").exists())


# -- training it again ---------------------------------------------------------------------------------------


def train_again(recorded: RecordedRun, into: Path, settings: Sequence[str]) -> Path:
    """Runs a learner over a copy of the journal in the folder `into`, and returns that folder.

    Raises what the learner raises, and UserError when it ended early.
    """
    from asyncrl.cli.run import run_learner
    from asyncrl.config.loading import load_config
    from asyncrl.desk.opening.run_record import CONFIG_FILE, RunRecord, write_record
    from asyncrl.metrics import newest_version
    from asyncrl.storage.disk import make_folder
    from asyncrl.tasks.fingerprint import run_settings

    os.umask(0o077)  # rollouts are nobody else's to read
    make_folder(into)
    _copy_journal(recorded.folder / "journal", into / "journal")
    if (recorded.folder / RUN_EPOCH_FILE).exists():
        shutil.copy2(recorded.folder / RUN_EPOCH_FILE, into / RUN_EPOCH_FILE)  # it has to go on from the journal's
    own = [
        f"run.dir={into}",
        f"run.steps={recorded.steps}",
        "run.journal_keep=true",
        "eval.prompts=0",
        "transport.address=auto",
        "learner.http=off",
        "log.wandb=off",
    ]
    config = load_config(recorded.folder / CONFIG_FILE, [*settings, *own])
    write_record(into, config, RunRecord(tuple(run_settings(config))))
    start_log(config.log.level)
    code = run_learner(config)
    reached = newest_version(into / METRICS_FILE, StepMetrics.kind)
    if code != 0 or reached < recorded.steps:
        raise UserError(f"the learner ended at step {reached} of {recorded.steps} (exit code {code}); see {into}")
    return into


def _copy_journal(source: Path, target: Path) -> None:
    """Segments that are complete are linked, for nobody writes to them any more; the last one is copied."""
    target.mkdir(mode=0o700)
    segments = sorted(source.glob(SEGMENTS))
    for path in segments[:-1]:
        try:
            os.link(path, target / path.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(path, target / path.name)
    shutil.copy2(segments[-1], target / segments[-1].name)
    if (source / "end").exists():
        shutil.copy2(source / "end", target / "end")


# -- comparing -----------------------------------------------------------------------------------------------


def compare(recorded: RecordedRun, again: Path) -> ReplayComparison:
    """Every figure of COMPARED at every step, to the last bit, and the weights of the last version."""
    before, after = step_figures(recorded.folder), step_figures(again)
    common = [version for version in sorted(after) if version in before and version <= recorded.steps]
    difference = next(
        (
            FirstDifference(version, name, before[version].get(name), after[version].get(name))
            for version in common
            for name in COMPARED
            if before[version].get(name) != after[version].get(name)
        ),
        None,
    )
    digests = [_weights(folder, recorded.steps) for folder in (recorded.folder, again)]
    weights_equal = digests[0] == digests[1] if all(digests) else None
    return ReplayComparison(len(common), difference, weights_equal)


def step_figures(folder: Path) -> dict[int, dict[str, float | None]]:
    """The figures of each step by its version, those of the newest line; empty where nothing was written."""
    names = {entry.name for entry in fields(StepMetrics)} & set(COMPARED)
    figures: dict[int, dict[str, float | None]] = {}
    path = folder / METRICS_FILE
    for record in iterate_records(path) if path.exists() else ():
        if record is not None and record.get("kind") == StepMetrics.kind and isinstance(record.get("version"), int):
            figures[record["version"]] = {name: record.get(name) for name in names}
    return figures


def _weights(folder: Path, version: int) -> list[tuple[str, str]]:
    """Names and digests of the exported files of weights; empty where the run did not end at this version."""
    from asyncrl.desk.opening.run_record import read_record

    record = read_record(folder)
    if record is None or record.finished != version:
        return []
    return [(path.name, _sha256(path)) for path in sorted((folder / "export").glob("*.safetensors"))]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def comparison_lines(comparison: ReplayComparison) -> list[str]:
    """What a replay came to, for the terminal."""
    lines = [f"{comparison.steps} steps trained again from the journal"]
    found = comparison.difference
    if found is None:
        lines.append(f"figures      equal to the last bit in every step ({', '.join(COMPARED)})")
    else:
        lines.append(
            f"figures      differ from version {found.version} on: {found.figure} was {found.recorded} and is "
            f"{found.again}; another kind of CPU or GPU, other thread counts or another torch round differently"
        )
    said = {True: "equal", False: "differ", None: "not compared: the run did not end at that version"}
    return [*lines, f"weights      {said[comparison.weights_equal]}"]


def side_by_side(recorded: RecordedRun, again: Path, settings: Sequence[str]) -> list[str]:
    """Figures of the run and of what was trained under other settings, as means over the steps of both."""
    before, after = step_figures(recorded.folder), step_figures(again)
    common = [version for version in sorted(after) if version in before]
    rows: list[tuple[str, ...]] = [("mean over steps", "the run", "what if")]
    for name in COMPARED:
        means = [_mean([figures[version].get(name) for version in common]) for figures in (before, after)]
        if means != [None, None]:
            rows.append((name, *("-" if mean is None else f"{mean:.6g}" for mean in means)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{len(common)} steps, {' '.join(settings) or 'the settings of the run'}; written to {again}",
        *("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        (
            "counterfactual: the rollouts are those that the run's own policy sampled; a policy trained like this "
            "would have sampled others, so rewards are the same and say nothing about it"
        ),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
