"""Every fault in every phase of a weight sync, with one generator and with three: what becomes of the run.

    python -m benchmarks.faults.fault_matrix [--quick] [--senders 2]

The real commands; one of the generators is sabotaged (`benchmarks.faults.faulty_generator`), once per cell, in a fleet
that lives on from cell to cell. A cell has passed when

- the sick generator did not commit the version in that sync, and the learner left it out of it;
- each survivor committed that version, or a newer one that took its place, within the deadline + 2 s of the fault;
- the sick one came back by itself, after SIGCONT, or as its next incarnation (where it was killed, or ended by itself
  and was started again), and the learner and its trainer were never restarted;
- with survivors, steps went on while the sick one was out: 2 in the 20 s after the fault or until it was told to go on
  or started again; in proportion fewer if it was back sooner. Always, 2 steps followed once it was back;
- no time without a step was longer than the deadline + 2 s + a step (the median of those before the fault): with
  survivors from the fault on, with one generator from its return on, since until then nobody makes tokens;
- the journal shows no trained token of a version that the learner, by its own log, had not committed for this life of
  the generator before the step, none that was sampled under weights which were found wrong, and no group twice.

What the faults are. kill and stop are SIGKILL and SIGSTOP to all processes of the generator, at that moment.

         | kill, stop         | corrupt            | drop               | digest             | canary
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  OFFER  | the offer has come,| a byte of the      | the offer is lost  | all digests of the | all log-probs are
         | nothing is done yet| manifest's digests |                    | manifest are wrong | off
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  STAGE  | before the middle  | a bit of the middle| the middle bucket  | the worker measures| one log-prob is off
         | bucket of the      | bucket             | is not received    | a wrong one        |
         | transfer           |                    |                    |                    |
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  VERIFY | after the transfer,| a bit of the last  | the last bucket's  | the answer has     | one log-prob is not
         | before the last    | bucket in the      | digest is missing  | another than was   | a number
         | digest             | staging buffer     | in the answer      | measured           |
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  SWAP   | the engine is      | a byte of a norm in| the middle bucket  | the swap names a   | the swap is
         | paused, nothing is | verified staging   | is not put in place| version that is not| reported and not
         | copied yet         |                    |                    | staged             | done
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  CANARY | the weights are in | a byte of a log-   | the answer with the| the sequences are  | one sequence has no
         | use and not scored | prob in the answer | log-probs is lost  | scored back to     | log-probs
         | yet                |                    |                    | front              |
  -------+--------------------+--------------------+--------------------+--------------------+--------------------
  COMMIT | the commit has come| a bit of the       | the commit is lost | the commit names   | wrong log-probs,
         | and does not count | commit's version   |                    | the version before | then at once the
         | yet                |                    |                    |                    | right ones

The canary is answered once, after the swap: its faults before SWAP are kinds of wrong answers. At COMMIT the learner
has decided (but for the canary's fault there): the version is proven, so the sick one may commit it when the learner
sends another commit, or when it goes on after SIGCONT; never on the damaged one. A commit that gets lost there is
replaced by the next version's long before the learner says it again, which it does when a beat still denies it 3 s
later. To see that, let there be no next version without this generator's tokens:

    --faults drop corrupt digest --phases COMMIT --generators 1 --set staleness.max_age=0 --results FOLDER

A byte of the weights in use that changes *after* the canary is not in the matrix; see README.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import StepTaken, StoredGroup
from benchmarks import common
from benchmarks.faults.commits import CommitLog
from benchmarks.faults.fault_judge import (
    MIN_STEPS,
    SLACK_S,
    STEPS_S,
    Event,
    Seen,
    TrainedGroup,
    complaints,
    survivor_delays,
    tainted,
)
from benchmarks.faults.fleet import LEARNER, POLL_S, Fleet, FleetError, Tail
from benchmarks.studies import shared
from benchmarks.studies.async_vs_sync import ROOT, make_base_model

FAULTS = ("kill", "stop", "corrupt", "drop", "digest", "canary")
PHASES = ("OFFER", "STAGE", "VERIFY", "SWAP", "CANARY", "COMMIT")
GENERATORS = (3, 1)
QUICK = (("stop", "STAGE", 3), ("corrupt", "SWAP", 3), ("digest", "VERIFY", 3), ("drop", "CANARY", 1))
SICK = "g0"  # the one that stays when there is only one
TIMEOUT_S = 5.0
SETTINGS = (
    "run.name=faults",
    "run.steps=1000000",
    "learner.groups_per_step=8",
    "sampling.group_size=4",
    "generator.max_sequences=32",
    "generator.kv_cache_gib=0.0625",
    f"weights.timeout_s={TIMEOUT_S}",
    "weights.bucket_bytes=262144",
    "eval.every=0",
    "eval.prompts=0",
    "checkpoint.every=0",
    "learner.cpus=[]",
    "generator.cpus=[]",
)
START_TIMEOUT_S = 300.0
HAPPEN_TIMEOUT_S = 60.0
RETURN_TIMEOUT_S = 60.0  # besides the start of a replacement
FAILED_SYNC = r"sync of {name} to version {version} failed \((?P<phase>[^)]+)\)[:,] (?P<reason>.*)"


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault in one phase with so many generators."""

    fault: str
    phase: str
    generators: int


@dataclass(slots=True)
class Outcome:
    """What came of a cell."""

    cell: Cell
    complaints: list[str]
    version: int | None = None  # of the sync that the fault happened to
    what: str = ""  # the fault, in the saboteur's words
    learner_said: str = ""
    survivors_s: float | None = None  # the last survivor's commit after the fault
    back_s: float | None = None  # the sick one's next commit after the fault
    standstill_s: float | None = None  # the longest time without a step
    total_s: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.complaints


def main() -> int:
    options = _arguments().parse_args()
    cells = [Cell(*cell) for cell in QUICK] if options.quick else chosen(options)
    make_base_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(options.folder or name), options)
        try:
            matrix.run(cells)
        finally:
            matrix.fleet.close()
            report(options, matrix.outcomes, len(cells))
    return 0 if all(outcome.passed for outcome in matrix.outcomes) else 1


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cells: does it run")
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS, metavar="FAULT", help="of %(default)s")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES, metavar="PHASE", help="of %(default)s")
    parser.add_argument("--generators", nargs="+", type=int, default=GENERATORS, help="how many (default %(default)s)")
    parser.add_argument("--senders", type=int, default=1, help="trainer ranks that send (default %(default)s)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--model", type=Path, default=shared.MODEL, help="base model, made if missing")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further configuration keys")
    parser.add_argument("--folder", help="keep logs, journal and events there (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the JSON file")
    return parser


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Many generators first: with one left the fleet stays small."""
    counts = sorted(set(options.generators), reverse=True)
    return [Cell(fault, phase, count) for count in counts for phase in options.phases for fault in options.faults]


# -- the run -----------------------------------------------------------------------------------------------------------


class Matrix:
    """A fleet, and the cells that happen to it one after the other."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._faults = folder / "faults"
        self._faults.mkdir(parents=True)
        self.fleet = Fleet(
            folder,
            options.config,
            [f"model.path={options.model.resolve()}", *SETTINGS, f"learner.ranks={options.senders}", *options.set],
            generator_command=[sys.executable, "-m", "benchmarks.faults.faulty_generator"],
            environment={"ASYNCRL_FAULTS": str(self._faults)},
        )
        self._files: dict[str, Tail] = {}
        self.events: dict[str, list[Event]] = {}
        self._steps: list[tuple[float, int]] = []
        self._commits = CommitLog()
        self.outcomes: list[Outcome] = []

    def run(self, cells: list[Cell]) -> None:
        """All cells in order; the trained tokens of all of them are judged at the end, whatever ends it."""
        self.fleet.start_learner("log.level=debug")  # it names its commits
        try:
            for number, cell in enumerate(cells, 1):
                self.outcomes.append(self._attempt(cell, f"cell-{number}"))
                print(f"{number}/{len(cells)} {_line(self.outcomes[-1])}", flush=True)
        finally:
            if self.outcomes:
                self._judge_training()

    def _attempt(self, cell: Cell, order_id: str) -> Outcome:
        """One cell. What keeps it from being carried out is a complaint of this cell, and the next one is tried."""
        started = time.monotonic()
        try:
            self._resize(cell.generators)
            started = time.monotonic()
            outcome = self._cell(cell, order_id)
        except FleetError as error:
            print(error, file=sys.stderr)
            outcome = Outcome(cell, [str(error).splitlines()[0]])
            for name in self._files:
                self.fleet.kill9(name)  # `_resize` starts them anew
        outcome.total_s = round(time.monotonic() - started, 1)
        return outcome

    def _judge_training(self) -> None:
        """Blames the cells for what was trained on. Where that cannot be found out no cell has passed."""
        try:
            self.fleet.kill9(LEARNER)
            self._look()  # what was trained on last was proven after the last cell
            trained, faults = read_training(self.fleet.run_dir / "journal")
            found = tainted(trained, self._commits.commits, self.events)
            faults += [(version, why) for (_, version), why in found.items()]
            for version, fault in faults:
                self._blame(version).complaints.append(fault)
        except BaseException as error:
            for outcome in self.outcomes:
                outcome.complaints.append(f"what was trained on is not known: {error}")
            raise

    def _blame(self, version: int) -> Outcome:
        """The last cell whose fault was at that version or before, else the first one: nothing goes unsaid."""
        found = [outcome for outcome in self.outcomes if outcome.version is not None and outcome.version <= version]
        return found[-1] if found else self.outcomes[0]

    def _resize(self, count: int) -> None:
        """Exactly g0 to g<count - 1>, each with a commit of its own."""
        names = [f"g{index}" for index in range(count)]
        for name in list(self._files):
            if name not in names:
                self.fleet.terminate(name)
                self._look()
                del self._files[name]
        for name in names:
            if name not in self._files:
                self._files[name] = Tail(self._faults / f"{name}.events.jsonl")
                self.events.setdefault(name, [])
            if not self.fleet.running(name):
                self.fleet.start_generator(name)
        self._healthy(START_TIMEOUT_S)

    def _healthy(self, timeout_s: float) -> None:
        """Waits until each generator has committed once more, so that nothing of what was before is under way."""
        since = time.monotonic()
        self.fleet.wait_until(
            lambda: all(self._committed_since(name, since) for name in self._files),
            timeout_s,
            f"a commit of each of {list(self._files)}",
            [LEARNER, *self._files],
        )

    def _committed_since(self, name: str, since: float) -> bool:
        self._look()
        return any(e["event"] == "held" and e["version"] is not None and e["at"] > since for e in self.events[name])

    def _look(self) -> None:
        """Takes in what has happened."""
        for name, file in self._files.items():
            self.events[name] += map(json.loads, file.more())
        version = self.fleet.version()
        self._commits.look(version, self.fleet.log())
        if not self._steps or version > self._steps[-1][1]:
            last = self._steps[-1][1] if self._steps else 0
            self._steps += [(time.monotonic(), number) for number in range(last + 1, version + 1)]

    def _cell(self, cell: Cell, order_id: str) -> Outcome:
        """Orders the fault, watches, lets the generator recover, judges."""
        log_start = len(self.fleet.log())
        events = {name: self.events[name] for name in self._files}
        seen = Seen(cell.fault, cell.phase, SICK, TIMEOUT_S, events, steps=self._steps)
        fault = self._order(cell, order_id)
        if fault is not None:
            seen.version, seen.fault_at = fault["version"], fault["at"]
            self._watch(seen)
            self._let_recover(seen)
        seen.until = time.monotonic()
        seen.learner_said = self._learner_said(seen, log_start)
        seen.learner_running = self.fleet.running(LEARNER)
        seen.trainer_starts = sum("trainer started" in line for line in self.fleet.log())
        outcome = _outcome(cell, seen, fault)
        if seen.back_at is None:
            self._replace()
        return outcome

    def _order(self, cell: Cell, order_id: str) -> Event | None:
        """The event of the fault, or None when it does not come."""
        path = self._faults / f"{SICK}.order.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({"id": order_id, "fault": cell.fault, "phase": cell.phase}))
        draft.rename(path)
        try:
            self.fleet.wait_until(lambda: self._fault_of(order_id), HAPPEN_TIMEOUT_S, f"the fault of {cell}")
        except FleetError as error:
            print(error, file=sys.stderr)
        path.unlink()
        return self._fault_of(order_id)

    def _fault_of(self, order_id: str) -> Event | None:
        self._look()
        return next((e for e in self.events[SICK] if e["event"] == "fault" and e["id"] == order_id), None)

    def _watch(self, seen: Seen) -> None:
        """Until the survivors have what they should have, or should have had it."""
        limit = seen.fault_at + TIMEOUT_S + SLACK_S
        while time.monotonic() < seen.fault_at + STEPS_S:
            self._look()
            done = all(delay is not None for delay in survivor_delays(seen).values())
            done = done and (not seen.survivors or seen.steps_between(seen.fault_at) >= MIN_STEPS)
            if seen.fault == "stop":
                done = done and time.monotonic() >= limit  # a stop that no deadline saw would be none
            if done:
                return
            time.sleep(POLL_S)

    def _let_recover(self, seen: Seen) -> None:
        if seen.fault == "stop":
            seen.stood = self.fleet.stopped(SICK)
            seen.resumed_at = time.monotonic()
            self.fleet.cont(SICK)
        elif seen.fault == "kill":
            self.fleet.kill9(SICK)  # all gone already; waits for their end
            seen.resumed_at = time.monotonic()
            self.fleet.start_generator(SICK)
        start_s = START_TIMEOUT_S if seen.fault == "kill" else 0.0
        deadline = time.monotonic() + RETURN_TIMEOUT_S + start_s
        while time.monotonic() < deadline:
            self._look()
            if not self.fleet.running(SICK):  # it gave up by itself; whatever supervises it starts it again
                seen.resumed_at = time.monotonic()
                self.fleet.start_generator(SICK)
                deadline += START_TIMEOUT_S
            if seen.back_at is not None and seen.steps_between(seen.back_at) >= MIN_STEPS:
                return
            time.sleep(POLL_S)

    def _replace(self) -> None:
        """What did not come back must not spoil the cells that follow."""
        self.fleet.kill9(SICK)
        self.fleet.start_generator(SICK)

    def _learner_said(self, seen: Seen, log_start: int) -> str:
        pattern = re.compile(FAILED_SYNC.format(name=SICK, version=seen.version))
        found = (pattern.search(line) for line in self.fleet.log()[log_start:])
        said = [f"{match['phase']}: {match['reason']}" for match in found if match]
        return said[-1] if said else ""  # the last attempt: one before it may have failed for another reason


def read_training(folder: Path) -> tuple[list[TrainedGroup], list[tuple[int, str]]]:
    """Every group that a step was taken with, from the journal; and (version of the step's batch, what is wrong)."""
    stored: dict[tuple[int, int], StoredGroup] = {}
    trained: list[TrainedGroup] = []
    faults: list[tuple[int, str]] = []
    done: set[int] = set()
    for _, record in JournalReader(folder, sorted(int(path.stem) for path in folder.glob("*.segment"))):
        if isinstance(record, StoredGroup):
            stored[record.ordinal, record.attempt] = record
        elif isinstance(record, StepTaken):
            for key in record.groups:
                group = stored.pop(key, None)
                if key[0] in done:
                    faults.append((record.version, f"prompt {key[0]} was trained on twice, the second time as {key}"))
                elif group is None:
                    faults.append((record.version, f"trained on group {key}, which is not in the journal"))
                if group is not None:
                    trained.append(_trained_group(group, record.version))
                done.add(key[0])
    if not trained:
        faults.append((0, "the journal has no step: what was trained on is not known"))
    return trained, faults


def _trained_group(record: StoredGroup, batch: int) -> TrainedGroup:
    group = result_to_group(decode_body(GroupResult, record.body))
    versions = {span.version for rollout in group.rollouts for span in rollout.version_spans}
    key = (record.ordinal, record.attempt)
    return TrainedGroup(key, record.generator_id, record.incarnation, frozenset(versions), batch)


# -- what came out -----------------------------------------------------------------------------------------------------


def _outcome(cell: Cell, seen: Seen, fault: Event | None) -> Outcome:
    outcome = Outcome(cell, complaints(seen), seen.version, learner_said=seen.learner_said)
    if fault is not None:
        delays = [delay for delay in survivor_delays(seen).values() if delay is not None]
        outcome.what = fault["what"]
        outcome.survivors_s = round(max(delays), 2) if delays else None
        outcome.standstill_s = round(seen.standstill_s(seen.fault_at), 2)
        outcome.back_s = None if seen.back_at is None else round(seen.back_at - seen.fault_at, 2)
    return outcome


def _line(outcome: Outcome) -> str:
    cell = outcome.cell
    result = "ok" if outcome.passed else "FAILED: " + "; ".join(outcome.complaints)
    times = (
        f"survivors {outcome.survivors_s} s, back after {outcome.back_s} s, "
        f"no step for {outcome.standstill_s} s, cell {outcome.total_s} s"
    )
    return f"{cell.fault} {cell.phase} {cell.generators}: {result} ({times}); {outcome.learner_said[:150]}"


def tables(outcomes: list[Outcome]) -> str:
    """One Markdown table per number of generators: seconds until the survivors had the version, or FAILED."""
    parts = []
    for count in sorted({outcome.cell.generators for outcome in outcomes}, reverse=True):
        found = {(o.cell.fault, o.cell.phase): o for o in outcomes if o.cell.generators == count}
        rows = [[fault, *(_shown(found.get((fault, phase))) for phase in PHASES)] for fault in FAULTS]
        what = "s until the survivors had the version / until the sick one was back" if count > 1 else "s until back"
        parts.append(f"{count} generator{'s' if count > 1 else ''} ({what})\n\n{shared.table(['', *PHASES], rows)}")
    return "\n\n".join(parts)


def _shown(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    if not outcome.passed:
        return "FAILED"
    back = f"{outcome.back_s:.1f}"
    return back if outcome.survivors_s is None else f"{outcome.survivors_s:.1f} / {back}"


def report(options: argparse.Namespace, outcomes: list[Outcome], num_cells: int) -> None:
    """The tables on stdout, everything in the JSON file; of a run that was broken off what there is."""
    if not outcomes:
        print("no cell was tried: nothing is written")
        return
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"\n{tables(outcomes)}\n")
    for outcome in outcomes:
        if not outcome.passed:
            print(_line(outcome))
    print(f"{passed} of {num_cells} cells passed ({passed / num_cells:.0%})")
    if len(outcomes) < num_cells:
        print(f"broken off: {num_cells - len(outcomes)} cells were not tried")
    record: dict[str, Any] = {
        "benchmark": "fault_matrix",
        "date": time.strftime("%Y-%m-%d"),
        "machine": common.machine(),
        "settings": [*SETTINGS, *options.set],
        "deadline_s": TIMEOUT_S,
        "passed": passed,
        "cells": num_cells,
    }
    lines = [{**asdict(outcome.cell), "passed": outcome.passed, **_plain(outcome)} for outcome in outcomes]
    # A cell per line: a rerun of one of them is a change of one line.
    body = ",\n".join("  " + json.dumps(line) for line in lines)
    text = json.dumps(record, indent=1).removesuffix("\n}") + f',\n "outcomes": [\n{body}\n ]\n}}\n'
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"fault_matrix{'.quick' if options.quick else ''}.json"
    path.write_text(text)
    print(f"written to {path}")


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(outcome).items() if name != "cell"}


if __name__ == "__main__":
    sys.exit(main())
