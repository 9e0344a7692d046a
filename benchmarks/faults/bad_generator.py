"""One bad generator of four: does the run end well, and how fast is it beside three good ones?

    python -m benchmarks.faults.bad_generator [--quick]

The real desk and real sockets; generators and trainer are stubs (`benchmarks.faults.stub_fleet`), so that it measures
the desk's decisions. For each kind of badness: the exit code, prompts given up, whether the log names the generator,
and the throughput, as a share of that of three good generators alone. Bar: 0, 0, yes, 0.9.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asyncrl.config import Config
from benchmarks.common import RESULTS
from benchmarks.faults.stub_fleet import make_stub_desk

KINDS = ("reward_error", "engine", "invalid", "returned", "deadline", "silence")
WORK_S = 0.2
LEASE_TIMEOUT_S = 2.0


class Lines(logging.Handler):
    """Keeps what was logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_once(folder: Path, generators: int, bad: str, steps: int) -> dict[str, Any]:
    """One run to its end; what is judged of it."""
    config = Config()
    config.run.steps, config.learner.groups_per_step, config.staleness.max_age = steps, 8, 3
    config.generator.lease_timeout_s = LEASE_TIMEOUT_S
    desk = make_stub_desk(folder, config)
    lines = Lines()
    logging.getLogger("asyncrl").addHandler(lines)
    options = {"generators": generators, "room": 8, "work_s": WORK_S, "bad": bad or "group"}
    addresses = [desk.generators.socket.address, desk.ranks.socket.address]
    fleet = subprocess.Popen([sys.executable, "-m", "benchmarks.faults.stub_fleet", *addresses, json.dumps(options)])
    started = time.monotonic()
    over = desk._over
    # The stub trainer ends when it is told to; the desk waits for a process.
    desk._over = lambda now: over(now) if desk._stopping_since is None else over(now) or True  # type: ignore[method-assign]
    begin = desk._begin_stop

    def begin_stop(finished: bool, now: float) -> None:
        begin(finished, now)
        desk.process.kill()

    desk._begin_stop = begin_stop  # type: ignore[method-assign]
    code = desk.run()
    took_s = time.monotonic() - started
    fleet.terminate()
    fleet.wait()
    logging.getLogger("asyncrl").removeHandler(lines)
    leases = desk.state.leases
    desk.state.journal.close()
    for socket in (desk.generators.socket, desk.ranks.socket):
        socket.close()
    named = sum("is set aside" in line and f"g{generators - 1} " in line for line in lines.lines)
    return {
        "exit_code": code,
        "given_up": leases.num_given_up,
        "named": named,
        "groups_per_s": round(leases.num_trained / took_s, 2),
        "seconds": round(took_s, 1),
    }


def main() -> int:
    """Prints a table, writes the JSON file; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file (default %(default)s)")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--steps", type=int, default=0, help="of each run (default 600; 60 with --quick)")
    arguments = parser.parse_args()
    logging.getLogger("asyncrl").propagate = False
    steps = arguments.steps or (60 if arguments.quick else 600)
    with tempfile.TemporaryDirectory() as folder:
        three = run_once(Path(folder) / "three", 3, "", steps)
        print(f"three good ones        {three}", flush=True)
        rows = {}
        for kind in arguments.kinds:
            row = run_once(Path(folder) / kind, 4, kind, steps)
            row |= {"steps": steps, "three_good_groups_per_s": three["groups_per_s"]}
            row["share"] = round(row["groups_per_s"] / three["groups_per_s"], 3)
            row["passed"] = row["exit_code"] == row["given_up"] == 0 and row["named"] == 1 and row["share"] >= 0.9
            rows[kind] = row
            print(f"{kind:<22} {row}", flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "bad_generator.json"
    before = json.loads(path.read_text())["one_bad_of_four"] if path.exists() else {}  # kinds not measured now
    record = {"work_s": WORK_S, "lease_timeout_s": LEASE_TIMEOUT_S, "one_bad_of_four": before | rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
