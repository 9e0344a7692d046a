"""The command behind `bin/warmup`: a small base model for a task, made by supervised steps, without a model hub."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncrl.errors import ConfigError, UserError

EPILOG = """The new folder is a Hugging Face model (config.json, model.safetensors, tokenizer.json). Use it as
model.path, and give the run the same digits and operations in task.args."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or the exit code of a UserError: 2."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        print(f"warmup: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bin/warmup", description=__doc__, epilog=EPILOG)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    arithmetic = tasks.add_parser("arithmetic", help="column arithmetic: under a minute, 20-40 %% of the answers right")
    arithmetic.add_argument("--digits", type=int, default=2, help="digits of each operand (default 2)")
    arithmetic.add_argument("--operations", default="+", help="+, - or +- (default +)")

    gsm8k = tasks.add_parser("gsm8k", help="word problems: questions to worked answers, with a BPE tokenizer")
    gsm8k.add_argument("--data", required=True, help="training file, JSON Lines with `question` and `answer`")
    gsm8k.add_argument("--eval-data", default="", help="held-out file (default: the last tenth of --data)")
    gsm8k.add_argument("--minutes", type=float, default=4.0, help="time for supervised steps (default 4)")

    for task in (arithmetic, gsm8k):
        task.add_argument("out", nargs="?", metavar="OUT_DIR", help=f"new folder (default {_default_out(task.prog)})")
        task.add_argument("--seed", type=int, default=0, help="initial weights and order of examples (default 0)")
        task.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default 2)")
    return parser


def _default_out(program: str) -> Path:
    return Path("runs/models") / program.split()[-1]


def _run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out) if arguments.out else _default_out(arguments.task)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; remove it, or name another folder")
    # Written beside and renamed when complete: a folder of that name is always a whole model.
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _make(arguments, unfinished)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {out}")


def _make(arguments: argparse.Namespace, folder: Path) -> None:
    # Torch comes in only here, after the arguments have been checked.
    if arguments.task == "arithmetic":
        from asyncrl.cli.warmup_arithmetic import make_arithmetic_model

        make_arithmetic_model(
            folder, arguments.digits, arguments.operations, seed=arguments.seed, threads=arguments.threads
        )
    else:
        from asyncrl.cli.warmup_gsm8k import make_gsm8k_model

        make_gsm8k_model(
            folder,
            arguments.data,
            arguments.eval_data,
            minutes=arguments.minutes,
            seed=arguments.seed,
            threads=arguments.threads,
        )


if __name__ == "__main__":
    sys.exit(main())
