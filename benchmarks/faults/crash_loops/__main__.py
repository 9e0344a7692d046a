"""Kill -9 of everything, a thousand times: is anything that was acknowledged lost, or trained twice?

    python -m benchmarks.faults.crash_loops --part desk [--quick]
    python -m benchmarks.faults.crash_loops --part desk --folder F --seconds 200      a piece; again for the next one

Part "desk": the real desk on real sockets, and generators that are the real daemon around an engine that makes tokens
up; a trainer that hashes its batches. The learner, the generators and the trainer get SIGKILL at random instants and
are started again at once, until the run has trained all its steps. Each stub writes down what it saw; the journal is
kept whole beside the run. Then, from these files alone (`audit`): every acknowledged group is in the journal with the
bytes that were sent, every version was made once or again of the same groups, and every prompt was trained once.

Part "trainer": the real learner with a small model that is really trained, and stub generators. The learner and its
trainer get SIGKILL at random instants. Afterwards a second learner trains the journal again, undisturbed, and must
come to the same weights bit for bit.

The table and crash_loops.json have: kills, acknowledged rollouts, what was lost or trained twice, and how long a
learner that was started again takes to answer its generators.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.faults.crash_loops import desk_part, trainer_part

PARTS = {"desk": desk_part, "trainer": trainer_part}


def main() -> int:
    """The command line."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--folder", type=Path, help="of the run, which is kept; a run that is there goes on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to go on another time")
    parser.add_argument("--kills", type=int, default=None, help="fewest kills (default: that of the part)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the instants")
    options = common.parse(parser)
    failed = False
    for name in PARTS if options.part == "all" else (options.part,):
        folder = options.folder or Path(tempfile.mkdtemp(prefix=f"crash-loop-{name}-"))
        result = PARTS[name].run(folder, options)
        if result is None:
            print(f"{name}: not at its end yet; go on with --folder {folder}")
            continue
        failed |= bool(result["complaints"])
        write_result(options, name, result)
        if options.folder is None:
            shutil.rmtree(folder)
    return 1 if failed else 0


def write_result(options: argparse.Namespace, part: str, result: dict[str, object]) -> None:
    """Puts the figures of one part into the results' file, beside those of the others."""
    path = options.results / f"crash_loops{'.quick' if options.quick else ''}.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = result | {"date": time.strftime("%Y-%m-%d")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"benchmark": "crash_loops", "machine": common.machine(), "parts": parts}, indent=1) + "\n"
    )
    for key, value in result.items():
        print(f"{part}  {key:32}{value}")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
