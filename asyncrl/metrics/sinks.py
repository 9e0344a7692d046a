"""Where every run's metrics go: to a JSONL file and to the console. `metrics.wandb` adds Weights & Biases.

No sink may stop a run. One that fails says so once in the log; the file tries again at each line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from asyncrl.metrics.json_records import to_record
from asyncrl.metrics.types import AnyMetrics, EvalMetrics, StepMetrics, SyncMetrics

log = logging.getLogger(__name__)

TAIL_BYTES = 1 << 16  # of the file's end: more than the longest line


class Sink(Protocol):
    """Takes metrics in the order they happen."""

    def write(self, metrics: AnyMetrics) -> None:
        """Takes one record. Raises nothing and does not block: training waits for it."""

    def close(self) -> None:
        """Ends the sink; nothing is written after it."""


# -- JSONL ---------------------------------------------------------------------------------------------------


class JsonlSink:
    """Appends one JSON object per line. A restarted learner goes on in the same file.

    A line that a crash or a full disk cut short is removed before the next one is written, so that every line parses.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when the folder or file cannot be made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self._good_bytes = self._repair()
        self._failed = False

    def write(self, metrics: AnyMetrics) -> None:
        """Appends one line; it is in the file when this returns. A disk that refuses it costs that line alone."""
        line = json.dumps(to_record(metrics), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s); training goes on, lines are missing", self.path, error)
            self._failed = True
            return
        self._failed = False
        self._good_bytes += len(line)

    def _append(self, line: bytes) -> None:
        """Raises OSError unless all of the line was written."""
        if self._failed:
            self._file.truncate(self._good_bytes)
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Closes the file, which has every line already."""
        self._file.close()

    def last_wall_s(self) -> float:
        """wall_s, in seconds, of the newest line that has one; 0.0 in a new file."""
        self._file.seek(max(0, self._good_bytes - TAIL_BYTES))
        for line in reversed(self._file.read().splitlines()):
            record = parse_record(line)
            if record is not None and record.get("wall_s") is not None:
                return float(record["wall_s"])
        return 0.0

    def _repair(self) -> int:
        """Ends the file with a whole line; returns its size in bytes."""
        size = self._file.seek(0, os.SEEK_END)
        start = max(0, size - TAIL_BYTES)
        self._file.seek(start)
        tail = self._file.read()
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return size
        if parse_record(torn) is not None:  # only its line end is missing
            return size + self._file.write(b"\n")
        self._file.truncate(size - len(torn))
        log.warning("%s: removed a line that a crash had cut short", self.path)
        return size - len(torn)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All records of a metrics file as plain mappings, and how many lines could not be read.

    Raises FileNotFoundError when there is no such file.
    """
    records: list[dict[str, Any]] = []
    unreadable = 0
    for record in iterate_records(path):
        if record is None:
            unreadable += 1
        else:
            records.append(record)
    return records, unreadable


def iterate_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a metrics file one by one, None for a line that cannot be read; memory holds one line at a time.

    Raises FileNotFoundError when there is no such file.
    """
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield parse_record(line)


def newest_version(path: Path, kind: str) -> int:
    """The version of the last record of this kind, 0 if there is none; the file is read backwards, as far as needed.

    A file that is not there has none.
    """
    try:
        with path.open("rb") as file:
            for line in _lines_backwards(file):
                record = parse_record(line)
                if record is not None and record.get("kind") == kind and isinstance(record.get("version"), int):
                    return int(record["version"])
    except FileNotFoundError:
        return 0
    return 0


def _lines_backwards(file: IO[bytes]) -> Iterator[bytes]:
    place = file.seek(0, os.SEEK_END)
    rest = b""
    while place > 0:
        size = min(TAIL_BYTES, place)
        place -= size
        file.seek(place)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        yield from reversed(lines)
    yield rest


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record that a line of a metrics file holds; None for a line that cannot be read."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


# -- console -------------------------------------------------------------------------------------------------


class ConsoleSink:
    """One progress line per step; styled with rich on a terminal, plain text anywhere else.

    Of steps that follow faster than `min_interval_s` (seconds) only the newest is printed. The last step of the run and
    every evaluation are always printed.
    """

    def __init__(
        self,
        total_steps: int,
        stream: IO[str] | None = None,
        min_interval_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._printed_at = -float("inf")
        self._pending: StepMetrics | None = None  # the newest step, not printed yet
        self._sync: SyncMetrics | None = None  # the newest one
        self._print = _terminal_printer(self._stream) if self._stream.isatty() else self._print_plain

    def write(self, metrics: AnyMetrics) -> None:
        """Prints a step if its time has come, and an evaluation at once; a sync is shown with the steps after it."""
        if isinstance(metrics, SyncMetrics):
            self._sync = metrics
        elif isinstance(metrics, EvalMetrics):
            self._flush()
            self._say(eval_line(metrics))
        else:
            self._pending = metrics
            last = metrics.version >= self._total_steps
            if last or self._clock() - self._printed_at >= self._min_interval_s:
                self._flush()

    def close(self) -> None:
        """Prints the last step, if it is not printed yet."""
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            step, self._pending = self._pending, None
            self._printed_at = self._clock()
            self._say(step_line(step, self._total_steps, self._sync))

    def _say(self, line: str) -> None:
        try:
            self._print(line)
        except (OSError, ValueError):  # the reader left, or the stream was closed; there is nobody to tell
            self._print = _print_nowhere

    def _print_plain(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def step_line(step: StepMetrics, total_steps: int, sync: SyncMetrics | None) -> str:
    """The progress line: reward, policy age, alarms that are on, tokens per second, idle shares and the newest sync."""
    width = len(str(total_steps))
    sync_ms = f"{sync.total_ms:4.0f} ms" if sync is not None else "   -   "
    # In the middle: a narrow terminal cuts off the end of the line.
    alarms = f"  ALARM {','.join(step.alarms)}" if step.alarms else ""
    return (
        f"{clock_time(step.wall_s)} step {step.version:>{width}}/{total_steps}"
        f"  reward {step.reward_mean:6.3f}"
        f"  age {step.policy_age_mean:4.2f} max {step.policy_age_max}{alarms}"
        f"  tok/s gen {_count(step.tokens_generated_per_s)} train {_count(step.tokens_trained_per_s)}"
        f"  idle learner {_percent(step.learner_idle_share)} gen {_percent(step.generator_idle_share)}"
        f"  sync {sync_ms}"
    )


def eval_line(result: EvalMetrics) -> str:
    """The line of one evaluation."""
    parts = "".join(f"  {name} {value:.3f}" for name, value in result.reward_parts.items())
    best = "".join(f"  {name} {value:.3f}" for name, value in result.reward_parts_best.items())
    at_k = f"  pass@{result.samples}:{best}" if best else ""
    failed = f", {result.prompts_failed} failed" if result.prompts_failed else ""
    how = "greedy" if result.temperature == 0.0 else f"{result.samples} at temperature {result.temperature:g}"
    return (
        f"{clock_time(result.wall_s)} eval of version {result.version}: reward {result.reward_mean:.3f}{parts}{at_k}"
        f"  ({result.prompts} prompts{failed}, {how})"
    )


def clock_time(seconds: float | None) -> str:
    """Seconds as mm:ss or h:mm:ss; dashes where there is no time."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _count(value: float | None) -> str:
    return f"{value:6,.0f}" if value is not None else "     -"


def _percent(value: float | None) -> str:
    return f"{100 * value:3.0f}%" if value is not None else "   -"


def _terminal_printer(stream: IO[str]) -> Callable[[str], None]:
    # Imported here: it takes a fifth of a second that only a terminal needs.
    from rich.console import Console
    from rich.highlighter import RegexHighlighter
    from rich.theme import Theme

    class Figures(RegexHighlighter):
        base_style = "figure."
        highlights = [
            r"(?P<label>[a-z/]+)",
            r"reward\s+(?P<reward>-?[\d.]+)",
            r"(?P<bad>\b[3-9]\d%|100%)",
            r"^(?P<time>[\d:-]+)",
            r"(?P<alarm>ALARM [a-z_,]+)",
        ]

    styles = {
        "figure.label": "dim",
        "figure.reward": "bold green",
        "figure.bad": "yellow",
        "figure.alarm": "bold red",
        "figure.time": "dim",
    }
    console = Console(file=stream, theme=Theme(styles), highlighter=Figures())
    return lambda line: console.print(line, markup=False, no_wrap=True, overflow="ellipsis", crop=True)


def _print_nowhere(line: str) -> None:
    """Takes the place of a stream that is gone."""
