"""The command `asyncrl-generator CONFIG [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from asyncrl.cli.common import command
from asyncrl.config import Config
from asyncrl.host.processes import leave, work_goes_on


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`asyncrl.cli.common.EXIT_CODES`)."""
    code = command("generator", argv, _start)
    if work_goes_on():
        leave(code)  # a signal came while the engine was being imported
    return code


def _start(config: Config) -> int:
    # Torch and zmq come in only here, after everything the user wrote has been checked.
    from asyncrl.generator.assembly import run_generator

    return run_generator(config)


if __name__ == "__main__":
    sys.exit(main())
