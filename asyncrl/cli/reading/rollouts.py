"""`asyncrl rollouts`: what the model said in a run, token by token."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

from asyncrl.cli.common import Parser, complain
from asyncrl.cli.reading.report import RUN_HELP
from asyncrl.errors import ConfigError

PROGRAM = "asyncrl rollouts"


def rollouts_command(argv: Sequence[str]) -> int:
    """Prints rollouts that a run has written."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.run is None:
        raise ConfigError(f"give the run.dir of a run, for example: {PROGRAM} runs/quickstart")
    for name in ("step", "best", "worst", "sample", "prompt"):
        if (value := getattr(arguments, name)) is not None and value < 0:
            raise ConfigError(f"--{name} {value}: give 0 or more")
    # Imported here: numpy costs more than all of --help.
    from asyncrl.report.rollouts.selection import Wanted, find_file, read_wanted, rollouts_folder
    from asyncrl.report.rollouts.shown import Colour, printable_in, shown
    from asyncrl.types import LeaseKind

    wanted = Wanted(
        kind=LeaseKind.EVAL if arguments.eval else LeaseKind.TRAIN,
        version=arguments.step,
        prompt=arguments.prompt,
        best=arguments.best,
        worst=arguments.worst,
        sample=arguments.sample,
    )
    file = find_file(rollouts_folder(arguments.run), wanted)
    records, problems = read_wanted(file, wanted)
    if problems:
        complain(PROGRAM, f"{len(problems)} lines cannot be read; {problems[0]}")
    lines: Iterable[str]
    if arguments.json:
        lines = (record.to_line().decode().rstrip() for record in records)
    else:
        with_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = shown(records, Colour(arguments.color), with_colours=with_colours)
        lines = map(printable_in(sys.stdout.encoding), text)
    for line in lines:
        print(line)
    sys.stdout.flush()  # here, so that a reader who left early is noticed
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Shows rollouts that a run has written: prompt, completion with its tokens in colours, reward, "
        "advantage, policy versions and log-probs. Without counts it shows the best, the worst and another one.",
        epilog=f"example: {PROGRAM} runs/quickstart --step 20 --worst 3 --color mismatch",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--step", type=int, metavar="N", help="of this step (default: the newest that was written)")
    parser.add_argument(
        "--eval", action="store_true", help="of the newest evaluation; with --step, of the one of that version"
    )
    parser.add_argument("--best", type=int, metavar="K", help="K with the best rewards")
    parser.add_argument("--worst", type=int, metavar="K", help="K with the worst rewards")
    parser.add_argument("--sample", type=int, metavar="K", help="K of the others, at random, the same ones each time")
    parser.add_argument("--prompt", type=int, metavar="ORDINAL", help="of this prompt only: all of them, or by counts")
    parser.add_argument(
        "--color",
        choices=("version", "mismatch", "advantage", "none"),
        default="version",
        help="what the colour of a token says: its policy version, the difference of the trainer's log-prob to the "
        "engine's, or its advantage; no colours where the output is no terminal or NO_COLOR is set",
    )
    parser.add_argument("--json", action="store_true", help="print the lines of the file instead")
    return parser
