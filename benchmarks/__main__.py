"""All benchmarks by one command: what there is and was measured, a quick pass, a comparison with what is committed.

    python -m benchmarks                              # every script, what it measures, the figures that are committed
    python -m benchmarks --quick [NAME ...]           # does each run: three minutes for those that need no peers
    python -m benchmarks --run NAME [NAME ...]        # measures; results go to runs/benchmarks
    python -m benchmarks --readme                     # writes the table of README.md anew, from what is committed
    python -m benchmarks --compare [FOLDER]           # what was measured (runs/benchmarks) against benchmarks/results

A comparison looks at ratios against the reference of the same run alone, since seconds of two machines say nothing
about each other. It fails where the median of a ratio is worse than the worst committed pair by more than a tenth.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, spread
from benchmarks.readme_table import with_table
from benchmarks.speed.peer_environment import peer_python

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COMMITTED = HERE / "results"
FOLDERS = ("speed", "studies", "faults", "gpu")
# Those that run without peers, a model of one's own, or minutes of engines.
QUICK = ("speed.transport", "speed.digest", "speed.head", "speed.weight_delta", "speed.desk_load")
PEERS = {"speed.learner_vs_trl", "speed.end_to_end_vs_trl"}
QUICK_TIMEOUT_S = 180.0
ALLOWANCE = 0.10
# More of these is better; of all other units less is.
RATES = ("/s", "per CPU second")


@dataclass(frozen=True, slots=True)
class Script:
    """One benchmark: its name below `benchmarks`, and the first sentence of what it says about itself."""

    name: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """One comparison of a results file: pair by pair, ours against the reference of the same run."""

    file: str
    what: str
    unit: str
    ratios: tuple[float, ...]
    median: float

    @property
    def more_is_better(self) -> bool:
        """Whether this unit is a rate."""
        return self.unit.endswith(RATES)

    @property
    def worst(self) -> float:
        """The worst of its pairs."""
        return min(self.ratios) if self.more_is_better else max(self.ratios)

    def is_worse_than(self, committed: Ratio) -> bool:
        """Whether the median is beyond the worst committed pair by more than the allowance."""
        if self.more_is_better:
            return self.median < committed.worst * (1 - ALLOWANCE)
        return self.median > committed.worst * (1 + ALLOWANCE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 1 when a script fails or a figure is worse than what is committed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", nargs="*", metavar="NAME", help="run them with --quick")
    what.add_argument("--run", nargs="+", metavar="NAME", help="measure")
    what.add_argument(
        "--compare", nargs="?", const=RESULTS, type=Path, metavar="FOLDER", help="against benchmarks/results"
    )
    what.add_argument("--readme", action="store_true", help="write the table of README.md anew")
    arguments = parser.parse_args(argv)
    if arguments.readme:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    known = {script.name: script for script in scripts()}
    if arguments.quick is not None or arguments.run is not None:
        quick = arguments.quick is not None
        names = arguments.quick or list(QUICK) if quick else arguments.run
        if unknown := [name for name in names if name not in known]:
            parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
        return run_all(names, quick=quick)
    if arguments.compare is not None:
        return compare(arguments.compare)
    print("\n".join(listing(known.values())))
    return 0


def scripts() -> list[Script]:
    """Every module below `benchmarks` that can be run, in the order of folders and names. None of them is imported."""
    found = []
    for folder in FOLDERS:
        for path in sorted((HERE / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            doc = ast.get_docstring(ast.parse(text)) or ""
            if '__name__ == "__main__"' in text and f"-m benchmarks.{folder}.{path.stem}" in doc:
                found.append(Script(f"{folder}.{path.stem}", doc.split("\n\n")[0].replace("\n", " ")))
    return found


# -- listing -------------------------------------------------------------------------------------------------


def listing(known: Iterator[Script] | Sequence[Script]) -> list[str]:
    """Each benchmark, and below it the medians that are committed, with their reference and their bar."""
    lines = []
    for script in known:
        lines.append(f"{script.name}: {script.sentence}")
        for path in sorted(COMMITTED.glob(f"{script.name.partition('.')[2]}*.json")):
            lines += [f"    {_shown(row)}" for row in _rows(path) if "ratio_median" in row or row.get("bar")]
    return lines


def _shown(row: dict[str, Any]) -> str:
    bar = f"; bar {row['bar']}" if row.get("bar") else ""
    unit = f", {row['unit']}" if row["unit"] else ""
    if "ratio_median" not in row:
        median, low, high = spread(row["asyncrl"])
        return f"{row['what']}{unit}: {median:.4g} ({low:.4g} to {high:.4g}){bar}"
    low, high = row["ratio_range"]
    return f"{row['what']}{unit}: {row['ratio_median']:.3g} of {row['against']} ({low:.3g} to {high:.3g}){bar}"


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


# -- running -------------------------------------------------------------------------------------------------


def run_all(names: Sequence[str], *, quick: bool) -> int:
    """Runs scripts one after the other, each in a process of its own; goes on after one that fails."""
    failed = []
    if PEERS.intersection(names):
        peer_python()  # before any script's time runs
    for name in names:
        began = time.monotonic()
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
        print(f"\n=== {' '.join(command[1:])}", flush=True)
        try:
            code = subprocess.run(command, cwd=HERE.parent, timeout=QUICK_TIMEOUT_S if quick else None).returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(f"=== {name}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# -- comparing -----------------------------------------------------------------------------------------------


def compare(folder: Path) -> int:
    """Prints each ratio beside the committed one; 1 when one is worse, 2 when there is nothing to compare."""
    committed = {(ratio.file, ratio.what, ratio.unit): ratio for ratio in read_ratios(COMMITTED)}
    pairs = [
        (ratio, committed[key])
        for ratio in read_ratios(folder)
        if (key := (ratio.file, ratio.what, ratio.unit)) in committed
    ]
    if not pairs:
        print(f"{folder} holds no figure that is committed too: measure first, without --quick", file=sys.stderr)
        return 2
    worse = 0
    for new, old in pairs:
        is_worse = new.is_worse_than(old)
        worse += is_worse
        mark = "WORSE" if is_worse else "ok   "
        print(
            f"{mark} {new.file}: {new.what}, {new.unit}: {new.median:.3g}, committed {old.median:.3g} "
            f"({min(old.ratios):.3g} to {max(old.ratios):.3g})"
        )
    return 1 if worse else 0


def read_ratios(folder: Path) -> list[Ratio]:
    """Every ratio in the results files of a folder; those of --quick are none."""
    return [
        Ratio(path.stem, row["what"], row["unit"], tuple(row["ratios"]), row["ratio_median"])
        for path in sorted(folder.glob("*.json"))
        if not path.stem.endswith(".quick")
        for row in _rows(path)
        if row.get("ratios")
    ]


if __name__ == "__main__":
    sys.exit(main())
