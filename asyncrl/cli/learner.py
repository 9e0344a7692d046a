"""The command `asyncrl-learner CONFIG [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from asyncrl.cli.common import command
from asyncrl.config import Config
from asyncrl.report.advisor import Advice


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`asyncrl.cli.common.EXIT_CODES`)."""
    return command("learner", argv, _start)


def _start(config: Config) -> int:
    # Torch and zmq come in only here, after everything the user wrote has been checked.
    from asyncrl.desk.daemon import run_learner

    return run_learner(config, advise=_advise)


def _advise(run_dir: Path, go_on: Callable[[], bool]) -> Advice:
    """What to change in a run: thought over by simulating it, which is imported when the run is over."""
    from asyncrl.simulator.advice import advise

    return advise(run_dir, go_on=go_on)


if __name__ == "__main__":
    sys.exit(main())
