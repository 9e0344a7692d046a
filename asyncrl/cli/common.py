"""What both commands share: arguments, help, dry run, and the way from an exception to an exit code.

Nothing here imports torch, zmq or vllm: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

from asyncrl import __version__
from asyncrl.config import Config
from asyncrl.config.keys import Key, keys, sections
from asyncrl.errors import AsyncRLError
from asyncrl.host.processes import shorten_name_lookups

EXIT_CODES = {
    0: "done: the run is over, or it was stopped by SIGTERM or SIGINT and put its affairs in order",
    1: "a defect of the program; the traceback says where",
    2: "user error: configuration, model, task or address",
    3: "the other side could not be reached within generator.unreachable_timeout_s",
    4: "the learner refused this generator: model, tokenizer, task or protocol differ",
    5: "the rollout engine died",
    6: "disk: journal or checkpoint cannot be written or read",
    7: "the trainer died more often than learner.max_trainer_restarts allows, or while it saved at the end",
    8: "too many prompts got no group, whatever was tried: a reward that always fails, for example",
    130: "interrupted before the daemon was up",
}

PURPOSE = {
    "learner": "Trains the policy: grants leases, takes rollouts, publishes a new policy after every step.",
    "generator": "Generates rollouts for a learner, and takes each new policy while generating.",
}

EXAMPLES = {
    "learner": "asyncrl-learner configs/quickstart.yaml run.steps=20 learner.lr=3e-4",
    "generator": "asyncrl-generator configs/quickstart.yaml generator.max_sequences=32",
}


def command(role: str, argv: Sequence[str] | None, start: Callable[[Config], int]) -> int:
    """Runs one command and returns its exit code (`EXIT_CODES`).

    `start` gets the checked configuration; it imports what is heavy. An AsyncRLError that has an exit code is
    printed to stderr without a traceback; anything else passes through and ends the interpreter with a
    traceback and code 1.
    """
    try:
        return _run(role, argv, start)
    except AsyncRLError as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        _complain(role, error)
        return code
    except KeyboardInterrupt:
        return 130  # the daemons handle the signal themselves once they are up
    except BrokenPipeError:
        # Python flushes once more at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(role: str, argv: Sequence[str] | None, start: Callable[[Config], int]) -> int:
    shorten_name_lookups()
    arguments = _parser(role).parse_intermixed_args(argv)
    if arguments.help:
        # Flushed here, so that a reader who left early (`--help | head`) is noticed inside `command`.
        print(help_text(role, shutil.get_terminal_size().columns), flush=True)
        return 0
    if arguments.version:
        print(f"asyncrl-{role} {__version__}")
        return 0
    if arguments.config is None or ("=" in arguments.config and not os.path.exists(arguments.config)):
        _complain(role, f"give a configuration file, for example: {EXAMPLES[role]}")
        return 2
    # Imported here: reading YAML costs more than all of --help.
    from asyncrl.cli.reward_checks import check_rewards
    from asyncrl.config.host_checks import check_host
    from asyncrl.config.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    model = check_host(config, role)
    check_rewards(config, role)
    if arguments.dry_run:
        from asyncrl.cli.dry_run import describe

        print(describe(config, role), flush=True)
        return 0
    logging.basicConfig(
        level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    # From here on a folder: trainer, tokenizer, fingerprints and engine must all read the same files.
    config.model.path = str(model.folder)
    return start(config)


def _complain(role: str, message: object) -> None:
    lines = str(message).splitlines() or [type(message).__name__]
    for line in lines:
        print(f"asyncrl-{role}: {line}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse with our own help, and errors that say what to do."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser(role: str) -> _Parser:
    parser = _Parser(prog=f"asyncrl-{role}", add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    return parser


# -- help ----------------------------------------------------------------------------------------------------


def help_text(role: str, columns: int) -> str:
    """Usage, every configuration key with its sentence and default, and the exit codes, wrapped to "
    "`columns`."""
    width = max(50, min(columns, 110))
    blocks = [
        f"usage: asyncrl-{role} CONFIG [key=value ...] [--dry-run] [--help] [--version]",
        _wrapped(PURPOSE[role], width),
        _wrapped(
            "CONFIG is a YAML file; the same one configures learner and generators. Values on the command "
            "line win "
            "over the file, the file over the defaults. ${run.name} in a value stands for another key.",
            width,
        ),
        f"example: {EXAMPLES[role]}",
        "\n".join(_options(width)),
        "\n".join(_exit_codes(width)),
        "configuration keys",
    ]
    blocks.extend(_section(name, sentence, width) for name, sentence in sections().items())
    return "\n\n".join(blocks)


def _options(width: int) -> list[str]:
    options = {
        "--dry-run": "resolve and check the configuration, say what would be bound, loaded and needed; exit",
        "--help": "this text",
        "--version": "the version of asyncrl",
    }
    return ["options", *(_item(name, text, width) for name, text in options.items())]


def _exit_codes(width: int) -> list[str]:
    return ["exit codes", *(_item(str(code), text, width) for code, text in EXIT_CODES.items())]


def _section(name: str, sentence: str, width: int) -> str:
    lines = [_wrapped(f"{name}: {sentence}", width)]
    for key in keys():
        if key.section == name:
            lines.append(f"  {key.name}={'' if key.shown_default == 'empty' else key.shown_default}")
            lines.append(_wrapped(_explained(key), width, indent="      "))
    return "\n".join(lines)


def _explained(key: Key) -> str:
    if "choices" in key.checks:
        return f"{key.sentence} ({key.rule})"
    rule = f", {key.rule}" if key.rule else ""
    return f"{key.sentence} ({key.type_name}{rule})"


def _item(name: str, text: str, width: int) -> str:
    return textwrap.fill(f"  {name:<10} {text}", width, subsequent_indent=" " * 13)


def _wrapped(text: str, width: int, indent: str = "") -> str:
    filled = textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n".join(filled)
