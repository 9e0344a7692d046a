"""The end of a run: summary.json, report.html and the last lines; `asyncrl report` writes them again at any time."""

from __future__ import annotations

from pathlib import Path

from asyncrl.report.advisor import Advise
from asyncrl.report.page.document import PAGE_FILE, content_of, write_page
from asyncrl.report.run_records import RunRecords
from asyncrl.report.summary import summary_lines, write_summary


def report(run_dir: str | Path, advise: Advise | None = None) -> Path:
    """Writes summary.json and report.html of a run, prints the last lines, and returns the path of the page.

    It takes a tenth of a second for some hundred steps, so that nobody who stops a run waits for it; with `advise`,
    which says what to change, as long as that takes.

    Raises UserError when run_dir has no metrics file, OSError when one of both cannot be written.
    """
    run = RunRecords(run_dir)
    summary = write_summary(run, None if advise is None else advise(run.run_dir))
    path = write_page(run.run_dir / PAGE_FILE, content_of(run, summary))
    print("\n".join(summary_lines(summary, run_dir, path)), flush=True)
    return path
