"""Whether the advisor is right: the throughput that it foretells of a change, and the side that it says bounds a run.

    python -m benchmarks.speed.advisor                            # all changes; 20 minutes
    python -m benchmarks.speed.advisor --folder F --only A B      # some of them; the runs stay in F
    python -m benchmarks.speed.advisor --folder F --only          # none: the table of all that are in F
    python -m benchmarks.speed.advisor --quick                    # one change, a few steps: does it run

A small real task with both daemons, on all cores. Before each run with one setting changed the base run is made again,
since the machine drifts: the prediction is made from that one, without a look at the other. Both are measured for some
seconds after their first steps. The policy is kept as it is (learner.lr=1e-9), so that both answer alike.

What bounds a run is found without the ledger, by an intervention: the trainer, then the generators, are stopped for two
fifths of each quarter of a second (SIGSTOP, SIGCONT), while the other goes on. The side that bounds the run is the one
whose slowing costs more than twice as many tokens per second as that of the other; where none does, both do (neither
is waited for, or each waits for the other).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.host.process_tree import command_of, tree_of
from asyncrl.metrics import METRICS_FILE
from asyncrl.report.advisor import bottleneck
from asyncrl.report.run_records import RunRecords, StepRecord, mean, total, totals
from asyncrl.simulator.advice import Advisor
from benchmarks import common
from benchmarks.studies.async_vs_sync import QUICKSTART, ROOT, make_base_model

BAR = 0.15  # median error of the predicted change of throughput
WARM_STEPS = 5
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
PERIOD_S, STOPPED_S = 0.25, 0.1
CLEAR = 2.0  # times as much as the other side must one cost that bounds a run alone
SETTLE_S = 3.0  # after slowing begins: batches that were there before
BASE = (
    "run.steps=100000",
    "learner.lr=1e-9",
    "eval.every=4",
    "eval.prompts=128",
    "checkpoint.every=4",
    "transport.address=auto",
    "log.rollouts_every=0",
)


@dataclass(frozen=True, slots=True)
class Tried:
    """A change that is foretold and made."""

    name: str
    settings: tuple[str, ...] = ()
    generators: int = 1


CHANGES = (
    Tried("two generators", generators=2),
    Tried("fewer sequences", ("generator.max_sequences=32",)),
    Tried("larger groups", ("sampling.group_size=16",)),
    Tried("smaller batch", ("learner.groups_per_step=16",)),
    Tried("synchronous", ("staleness.max_age=0",)),
    Tried("max_age 1", ("staleness.max_age=1",)),
    Tried("small micro-batch", ("learner.micro_batch_tokens=256",)),
    Tried("each step a checkpoint", ("checkpoint.every=1",)),
    Tried("each step an evaluation", ("eval.every=1",)),
    Tried("four epochs", ("learner.epochs=4",)),
)
SIDES = {
    "the learner": "learner",
    "the learner's intake": "learner",
    "generators": "generators",
    "evaluation": "generators",
    "rewards": "generators",
    "weight sync": "generators",
    "both sides alike": "both",
    "staleness.max_age": "both",
}


def main() -> int:
    parser = common.arguments(__doc__ or "", pairs=1)
    parser.add_argument("--folder", type=Path, help="keep the runs there, and take those that are there already")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=", ".join(change.name for change in CHANGES))
    parser.add_argument("--seconds", type=float, default=22.0, help="of each measurement (default %(default)s)")
    parser.add_argument("--slowed-s", type=float, default=8.0, help="of each slowing (default %(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "models" / "arithmetic")
    options = common.parse(parser)
    if options.quick:
        options.seconds, options.slowed_s, options.only = 8.0, 4.0, options.only or [CHANGES[1].name]
    options.pairs = len(CHANGES)
    make_base_model(options.model)
    names = {change.name for change in CHANGES}
    if unknown := set(options.only or ()) - names:
        parser.error(f"there is no change {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for change in CHANGES:
            if options.only is None or change.name in options.only:
                measure_pair(options, change, folder / change.name.replace(" ", "_"))
        return tell(options, folder)


# -- runs ------------------------------------------------------------------------------------------------------------


def measure_pair(options: argparse.Namespace, change: Tried, folder: Path) -> None:
    """The base run, then the run with the change; what they measured is written beside them."""
    folder.mkdir(exist_ok=True)
    with common.watch() as watch:
        base = one_run(options, Tried("base"), folder / "base", slowing=False)
        changed = one_run(options, change, folder / "changed", slowing=True)
    measured = {"base": base, "changed": changed, "others_share": watch.others_share}
    (folder / "measured.json").write_text(json.dumps(measured, indent=1))
    print(f"{change.name}: {base['calm_per_s']:,.0f} -> {changed['calm_per_s']:,.0f} tokens/s", flush=True)


def one_run(options: argparse.Namespace, change: Tried, folder: Path, *, slowing: bool) -> dict[str, Any]:
    """Tokens per second of a run, calm and with each side slowed; and what its ledger says over the calm time."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "asyncrl.cli.main", "run", str(QUICKSTART), f"model.path={options.model}", *BASE]
    command += [*change.settings, f"run.dir={folder}", "--generators", str(change.generators)]
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(read_steps(folder)) < WARM_STEPS:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{change.name}: no {WARM_STEPS} steps:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        first = len(read_steps(folder))
        time.sleep(options.seconds)
        last = len(read_steps(folder))
        figures = calm_figures(read_steps(folder)[:last], first)
        if slowing:
            for side in ("learner", "generators"):
                figures[f"{side}_slowed_per_s"] = slowed_rate(options, folder, process.pid, side)
            figures["calm_after_per_s"] = rate_from_now(folder, options.slowed_s)
        return figures
    finally:
        stop(process)


def read_steps(folder: Path) -> list[StepRecord]:
    """The steps that are written by now."""
    return RunRecords(folder, follow=True).steps if (folder / METRICS_FILE).exists() else []


def calm_figures(steps: Sequence[StepRecord], first: int) -> dict[str, Any]:
    counted = steps[first:]
    found = bottleneck(
        totals(step.learner_time_s for step in counted), totals(step.generator_time_s for step in counted)
    )
    return {
        "steps": len(counted),
        "calm_per_s": rate_of(counted),
        "bounded_by": None if found is None else found.name,
        "evidence": None if found is None else found.evidence,
        "age_mean": mean(step.policy_age_mean for step in counted),
    }


def slowed_rate(options: argparse.Namespace, folder: Path, root: int, side: str) -> float:
    """Trained tokens per second while all processes of a side are stopped again and again."""
    pids = processes_of(root, side)
    with duty(pids, SETTLE_S):
        pass
    begin = len(read_steps(folder))
    with duty(pids, options.slowed_s):
        pass
    return rate_since(folder, begin)


@contextlib.contextmanager
def duty(pids: Sequence[int], seconds: float) -> Iterator[None]:
    """Stops processes for part of each period, for so many seconds."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            send(pids, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            send(pids, signal.SIGCONT)
            time.sleep(PERIOD_S - STOPPED_S)
        yield
    finally:
        send(pids, signal.SIGCONT)


def rate_from_now(folder: Path, seconds: float) -> float:
    time.sleep(SETTLE_S)
    begin = len(read_steps(folder))
    time.sleep(seconds)
    return rate_since(folder, begin)


def rate_since(folder: Path, begin: int) -> float:
    """Of the steps after number `begin`, between the ends of steps: no step is cut."""
    return rate_of(read_steps(folder)[begin:])


def rate_of(steps: Sequence[StepRecord]) -> float:
    """Trained tokens per second."""
    return total(step.tokens_trained for step in steps) / max(1e-9, total(step.interval_s for step in steps))


def processes_of(root: int, side: str) -> list[int]:
    """The trainer's process, or the generators with all that they started."""
    tree = tree_of(root) - {root}
    wanted = "asyncrl.trainer.rank" if side == "learner" else "asyncrl.cli.generator"
    roots = [pid for pid in tree if wanted in command_of(pid)]
    if not roots:
        raise RuntimeError(f"no process of the {side} below {root}: {[command_of(pid) for pid in tree]}")
    return sorted(set().union(*map(tree_of, roots)))


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(process: subprocess.Popen[bytes]) -> None:
    """In good order, then at once."""
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


# -- what came of it -------------------------------------------------------------------------------------------------


def tell(options: argparse.Namespace, folder: Path) -> int:
    """Foretells each change from its base run, and compares: the table of all pairs that are in the folder.

    1 where a bar is missed.
    """
    report = common.Report("advisor", options)
    errors, right = [], []
    for change in CHANGES:
        place = folder / change.name.replace(" ", "_")
        if not (place / "measured.json").exists():
            continue
        measured = json.loads((place / "measured.json").read_text())
        row = judged(change, place, measured)
        report.begin()
        report.watched(common.Watch(others_share=measured["others_share"]))
        report.figure(f"{change.name}: error of the foretold change of throughput", "share", [row["error"]])
        report.rows[-1] |= row
        errors.append(row["error"])
        right.append(row["side_named"] == row["side_found"])
        print(in_words(change, row), flush=True)
    if not errors:
        print(f"{folder} holds no run: give names to --only", file=sys.stderr)
        return 2
    report.pairs("error of a foretold change", "share", errors, [BAR] * len(errors), "the bar", bar="1 in the median")
    report.figure("the side that bounds is named rightly", "runs", [float(sum(right))])
    middle = statistics.median(errors)
    report.note(f"median error {middle:.1%} (bar {BAR:.0%}); the side is right in {sum(right)} of {len(right)}")
    report.finish()
    return 0 if middle <= BAR and all(right) else 1


def judged(change: Tried, place: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was foretold beside what came. The error is that of the ratio of throughputs, as a share of it."""
    base, changed = measured["base"], measured["changed"]
    advisor = Advisor(place / "base")
    foretold = advisor.predict(change.settings, generators=change.generators)
    found = changed["calm_per_s"] / base["calm_per_s"]
    ratio = foretold.tokens_per_s / advisor.measured
    calm_per_s = (changed["calm_per_s"] + changed["calm_after_per_s"]) / 2
    lost = {side: 1 - changed[f"{side}_slowed_per_s"] / calm_per_s for side in ("learner", "generators")}
    return {
        "settings": list(change.settings),
        "generators": change.generators,
        "base_per_s": base["calm_per_s"],
        "changed_per_s": changed["calm_per_s"],
        "foretold_ratio": ratio,
        "foretold_interval": [foretold.low / advisor.measured, foretold.high / advisor.measured],
        "found_ratio": found,
        "error": abs(ratio / found - 1),
        "foretold_age": foretold.age_mean,
        "found_age": changed["age_mean"],
        "run_itself_simulated": advisor.fit.ratio,
        "bound_named": changed["bounded_by"],
        "evidence": changed["evidence"],
        "side_named": SIDES.get(changed["bounded_by"] or "", "?"),
        "lost_by_slowing": lost,
        "side_found": side_found(lost["learner"], lost["generators"]),
    }


def side_found(learner: float, generators: float) -> str:
    """The side whose slowing costs more than twice as much; both where none does."""
    if learner > CLEAR * max(0.0, generators):
        return "learner"
    return "generators" if generators > CLEAR * max(0.0, learner) else "both"


def in_words(change: Tried, row: dict[str, Any]) -> str:
    low, high = row["foretold_interval"]
    lost = row["lost_by_slowing"]
    return (
        f"{change.name}: foretold {row['foretold_ratio']:.2f} ({low:.2f} to {high:.2f}), came to "
        f"{row['found_ratio']:.2f}: error {row['error']:.0%}; named {row['bound_named']} ({row['side_named']}), found "
        f"{row['side_found']}: slowing the learner costs {lost['learner']:.0%}, generators {lost['generators']:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
