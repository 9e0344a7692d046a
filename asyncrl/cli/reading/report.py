"""`asyncrl report`, `asyncrl watch` and `asyncrl compare`: what a run came to, what it is doing, how runs differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from asyncrl.cli.common import Parser
from asyncrl.errors import UserError

RUN_HELP = "the run.dir of a run, or its name in runs/"
COMPARE_FILE = "compare.html"


def report_command(argv: Sequence[str]) -> int:
    """Writes report.html and summary.json of a run again, and prints the last lines."""
    parser = Parser(
        prog="asyncrl report",
        description="Writes report.html and summary.json of a run from its metrics.jsonl, at any time, and prints the "
        "last lines, with what to change; the last one names the page.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    arguments = parser.parse_args(argv)
    from asyncrl.report.run_records import run_folder
    from asyncrl.report.writing import report
    from asyncrl.simulator.advice import advise

    with _files_named():
        report(run_folder(arguments.run), advise)
    return 0


def watch_command(argv: Sequence[str]) -> int:
    """Serves the report of a run on loopback until a signal."""
    parser = Parser(
        prog="asyncrl watch",
        description="Serves the report of a run on 127.0.0.1, kept up to date while it is looked at. Ctrl-C ends it, "
        "and not the run.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    arguments = parser.parse_args(argv)
    from asyncrl.host.processes import StopSignal
    from asyncrl.report.run_records import run_folder
    from asyncrl.report.watch import Watch

    with contextlib.closing(Watch(run_folder(arguments.run), arguments.port)) as watch:
        stop = StopSignal()
        print(f"{arguments.run} is at {watch.url} (Ctrl-C ends this, not the run)", flush=True)
        watch.serve(stop.fd)
    return 0


def compare_command(argv: Sequence[str]) -> int:
    """Prints the table of several runs, and writes their page."""
    parser = Parser(
        prog="asyncrl compare",
        description="Prints the figures of several runs beside each other and the settings in which they differ, and "
        "writes a page with their charts over each other.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN_HELP)
    parser.add_argument("--output", type=Path, default=Path(COMPARE_FILE), help="the page (default %(default)s)")
    arguments = parser.parse_args(argv)
    from asyncrl.report.compare import compare, comparison_page, table
    from asyncrl.report.page.document import write_page
    from asyncrl.report.run_records import run_folder

    with _files_named():
        compared = compare([run_folder(run) for run in arguments.runs])
        print(table(compared))
        print(f"\n{write_page(arguments.output, comparison_page(compared))}", flush=True)
    return 0


@contextlib.contextmanager
def _files_named() -> Iterator[None]:
    """A file that cannot be read or written is the user's to mend, so that it is said in a sentence."""
    try:
        yield
    except BrokenPipeError:  # the reader of the last lines left
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; give a folder that can be read and written") from error
