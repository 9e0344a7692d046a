"""Worlds of a few processes: started together, waited for with a deadline, and never left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.warm_processes import WarmProcess

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(count: int, module: str, arguments: Sequence[str], log: Path) -> Iterator[list[WarmProcess]]:
    """Ranks 0..count-1 of `python -m module`; what they print is in `log`."""
    port = free_port()
    children = []
    with log.open("ab") as output:
        for rank in range(count):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            command = [sys.executable, "-m", module, *arguments]
            children.append(WarmProcess(command, stdout=output, stderr=output, env=environment, cwd=ROOT))
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def run_world(count: int, module: str, arguments: Sequence[str], log: Path, timeout_s: float) -> None:
    """Runs a world to its end; fails with what it printed when a rank fails."""
    with started(count, module, arguments, log) as children:
        for child in children:
            assert child.wait(timeout_s) == 0, log.read_text(errors="replace")[-4000:]
