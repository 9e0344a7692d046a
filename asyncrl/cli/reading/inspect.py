"""`asyncrl inspect RUN`: what is in a run's folder. It only reads, and works beside a running learner."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from asyncrl.cli.common import Parser
from asyncrl.cli.reading.report import RUN_HELP
from asyncrl.errors import UserError

MB = 1e6


@dataclass(slots=True)
class JournalContents:
    """What the journal holds at present. steps are the versions that its batches began at, first and last."""

    segments: int = 0
    bytes: int = 0
    is_whole: bool = False
    steps: tuple[int, int] | None = None
    groups: int = 0
    rollouts: int = 0
    tokens: int = 0
    run_epochs: int = 0
    groups_by_generator: dict[str, int] = field(default_factory=dict)
    incarnations: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    filtered: int = 0
    skipped: int = 0
    given_up: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """One checkpoint that says it is complete; its files are not read."""

    version: int
    bytes: int
    created: float


@dataclass(frozen=True, slots=True)
class RunContents:
    """All of a run folder, from its own files."""

    folder: str
    name: str
    finished: int
    steps_asked: int
    settings: dict[str, str]
    journal: JournalContents
    checkpoints: list[CheckpointContents]
    has_export: bool


# What tells runs apart, in the order of reading.
SHOWN_KEYS = (
    "model.path", "task.path", "algorithm.name", "update.what", "learner.groups_per_step", "sampling.group_size",
    "sampling.max_new_tokens", "staleness.max_age", "learner.lr", "learner.ranks", "run.seed",
)  # fmt: skip


def inspect(argv: Sequence[str]) -> int:
    """Runs the command; returns 0. Raises UserError where there is no run."""
    parser = Parser(
        prog="asyncrl inspect",
        description="Prints what is in the folder of a run: settings, journal, checkpoints, what it came to. It only "
        "reads, and works beside a running learner.",
        epilog="example: asyncrl inspect runs/quickstart",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    arguments = parser.parse_args(argv)
    from asyncrl.report.run_records import run_folder

    folder = run_folder(arguments.run)
    contents = read_contents(folder)
    if arguments.json:
        print(json.dumps(asdict(contents), indent=1), flush=True)
        return 0
    print("\n".join([*contents_lines(contents, time.time()), *_what_it_came_to(folder)]), flush=True)
    return 0


def read_contents(folder: Path) -> RunContents:
    """Reads a run folder. Raises UserError where it holds no run, ConfigError where its configuration is damaged."""
    from asyncrl.config.loading import load_config
    from asyncrl.desk.opening.run_record import CONFIG_FILE, read_record

    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no run: it has no {CONFIG_FILE}; give the run.dir of one")
    config = load_config(folder / CONFIG_FILE)
    record = read_record(folder)
    settings = {name: str(getattr(getattr(config, name.split(".")[0]), name.split(".")[1])) for name in SHOWN_KEYS}
    return RunContents(
        folder=str(folder),
        name=config.run.name,
        finished=record.finished if record is not None else -1,
        steps_asked=config.run.steps,
        settings=settings,
        journal=read_journal(folder / "journal"),
        checkpoints=_checkpoints(folder / "checkpoints"),
        has_export=(folder / "export").is_dir(),
    )


def read_journal(folder: Path) -> JournalContents:
    """Counts what the journal holds. A segment that is deleted while it is read does not count."""
    from asyncrl.storage.journal_reader import JournalReader

    found = JournalContents()
    incarnations, by_generator = Counter[str](), Counter[str]()
    paths = sorted(folder.glob("*.segment"))
    for path in paths:
        try:
            found.bytes += path.stat().st_size
            entries = [entry.record for entry in JournalReader(folder, [int(path.stem)])]
        except FileNotFoundError:
            continue
        found.segments += 1
        for record in entries:
            _count(found, record, by_generator, incarnations)
    found.is_whole = bool(paths) and int(paths[0].stem) == 1
    found.groups_by_generator, found.incarnations = dict(by_generator), dict(incarnations)
    return found


def _count(found: JournalContents, record: object, by_generator: Counter[str], incarnations: Counter[str]) -> None:
    from asyncrl.storage import records

    match record:
        case records.StoredGroup():
            found.groups += 1
            found.rollouts += len(record.num_tokens)
            found.tokens += sum(record.num_tokens)
            by_generator[record.generator_id] += 1
        case records.StepTaken():
            first = record.version if found.steps is None else min(found.steps[0], record.version)
            found.steps = (first, record.version)
        case records.GroupsDropped():
            found.dropped += len(record.groups)
        case records.GroupFiltered():
            found.filtered += 1
        case records.BatchSkipped():
            found.skipped += 1
        case records.PromptGivenUp():
            found.left_out += bool(record.reason)
            found.given_up += not record.reason
        case records.RunStarted():
            found.run_epochs = max(found.run_epochs, record.run_epoch)
        case records.GeneratorAdmitted():
            incarnations[record.generator_id] = max(incarnations[record.generator_id], record.incarnation)


def _checkpoints(root: Path) -> list[CheckpointContents]:
    from asyncrl.errors import CheckpointError
    from asyncrl.storage.checkpoint_files import complete_folders, read_manifest

    found = []
    for path in complete_folders(root) if root.is_dir() else ():
        try:
            manifest = read_manifest(path, verify=False)
        except CheckpointError as error:
            print(f"asyncrl inspect: {error}", file=sys.stderr)  # damaged, or deleted meanwhile
            continue
        found.append(CheckpointContents(manifest.version, manifest.num_bytes, manifest.created))
    return sorted(found, key=lambda checkpoint: checkpoint.version)


def contents_lines(contents: RunContents, now: float) -> list[str]:
    """The contents as lines for the terminal; now is Unix time."""
    journal = contents.journal
    state = f"finished at version {contents.finished}" if contents.finished >= 0 else "not finished"
    lines = [
        f"run          {contents.name} in {contents.folder}: {state}, {contents.steps_asked} steps asked for",
        *(f"  {name}={value}" for name, value in contents.settings.items()),
        f"starts       {journal.run_epochs} of the learner that the journal knows of"
        + "".join(f"; {name} {count}" for name, count in sorted(journal.incarnations.items())),
        (
            f"journal      {journal.segments} segments, {journal.bytes / MB:.1f} MB: {journal.groups} groups, "
            f"{journal.rollouts} rollouts, {journal.tokens} tokens"
        ),
    ]
    if journal.steps is not None:
        whole = (
            "from the first step on: asyncrl replay can repeat it"
            if journal.is_whole
            else "its beginning is deleted (run.journal_keep=true keeps it)"
        )
        lines.append(f"             batches of versions {journal.steps[0]} to {journal.steps[1]}; {whole}")
    lines += [
        f"             from {name}: {count} groups" for name, count in sorted(journal.groups_by_generator.items())
    ]
    lost = {
        "dropped (over age)": journal.dropped,
        "filtered": journal.filtered,
        "batches skipped": journal.skipped,
        "given up": journal.given_up,
        "left out": journal.left_out,
    }
    lines.append("not trained  " + ("; ".join(f"{name} {count}" for name, count in lost.items() if count) or "none"))
    saved = (
        f"step_{c.version} ({c.bytes / MB:.1f} MB, {max(0.0, now - c.created) / 60:.0f} min ago)"
        for c in contents.checkpoints
    )
    lines.append(f"checkpoints  {', '.join(saved) or 'none'}")
    lines.append(f"export       {'export/' if contents.has_export else 'none'}")
    return lines


def _what_it_came_to(folder: Path) -> list[str]:
    """The last lines of the run, where it has measured something."""
    from asyncrl.metrics import METRICS_FILE

    if not (folder / METRICS_FILE).is_file():
        return ["metrics      none"]
    from asyncrl.report.run_records import RunRecords
    from asyncrl.report.summary import summarize, summary_lines

    # Without its last two lines: they name files that may not be there yet.
    return summary_lines(summarize(RunRecords(folder)), folder, folder)[:-2]
