"""What both commands share: arguments, help, checks, and the way from an exception to an exit code.

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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from asyncrl import __version__
from asyncrl.config import Config
from asyncrl.config.keys import Key, keys, sections
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.host.processes import shorten_name_lookups

if TYPE_CHECKING:
    from asyncrl.cli.hardware import Hardware
    from asyncrl.host.model_folder import ModelFiles

EXIT_CODES = {
    0: "done: the run is over, or SIGTERM or SIGINT stopped it and it ended in good order",
    1: "a defect of the program; the traceback says where",
    2: "user error: in configuration, model, task, address or arguments",
    3: "the generator did not reach the learner within generator.unreachable_timeout_s",
    4: "the learner refused this generator: model, tokenizer, task or protocol differ",
    5: "the rollout engine died",
    6: "disk: the journal or a checkpoint cannot be written or read",
    7: "the trainer died more often than learner.max_trainer_restarts allows, or while it saved at the end",
    8: "too many prompts got no group, however often they were tried: a reward that always fails, for example",
    9: "another trainer rank was lost (asyncrl-trainer-node)",
    130: "SIGINT came before the daemon was up, or a second signal while it was ending",
    143: "SIGTERM in the same cases",
}

PURPOSE = {
    "learner": "Trains the policy: grants leases, takes rollouts, and publishes a new policy after every step.",
    "generator": "Generates rollouts for a learner, and takes each new policy while it generates.",
}

EXPORT_USAGE = {"learner": " [--export STEP [--adapters]]", "generator": ""}
EXPORT_OPTIONS: dict[str, dict[str, str]] = {
    "learner": {
        "--export": "write the model of checkpoint STEP (a number, or latest) to run.dir/exports, print the folder and "
        "exit; works beside a running learner",
        "--adapters": "with --export: the adapters alone, in PEFT's format",
    },
    "generator": {},
}

EXAMPLES = {
    "learner": "asyncrl-learner configs/quickstart.yaml run.steps=20 learner.lr=3e-4",
    "generator": "asyncrl-generator configs/quickstart.yaml generator.max_sequences=32",
}


def command(role: str, argv: Sequence[str] | None, start: Callable[[Config], int]) -> int:
    """Runs the command of `role` ("learner" or "generator") and returns its exit code (`EXIT_CODES`).

    `start` gets the checked configuration; it imports what is heavy. An AsyncRLError that has an exit code is printed
    to stderr without a traceback. Every other exception passes through, and ends the interpreter with code 1.
    """
    return exit_code_of(f"asyncrl-{role}", lambda: _run(role, argv, start))


def exit_code_of(program: str, act: Callable[[], int]) -> int:
    """What `act` returns, or the exit code of the error that it ended with, which is printed as said above."""
    try:
        return act()
    except AsyncRLError as error:
        code: int | None = getattr(error, "exit_code", None)
        if code is None:
            raise
        complain(program, error)
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
    if not is_configuration(arguments.config):
        complain(f"asyncrl-{role}", f"give a configuration file, for example: {EXAMPLES[role]}")
        return 2
    if role == "learner" and arguments.export is not None:
        return _export(arguments.config, arguments.overrides, arguments.export, adapters=arguments.adapters)
    hardware = named_hardware(arguments.hardware, dry_run=arguments.dry_run)
    config, model = _load_checked(role, arguments.config, arguments.overrides, hardware)
    if arguments.dry_run:
        return _print_dry_run(config, role, hardware)
    start_log(config.log.level)
    from asyncrl.cli.run import use_folder

    use_folder(config, model)
    return start(config)


def is_configuration(argument: str | None) -> bool:
    """False where the file was forgotten, so that an override stands in its place."""
    return argument is not None and ("=" not in argument or os.path.exists(argument))


def _export(path: str, overrides: Sequence[str], step: str, *, adapters: bool) -> int:
    # Imported here: reading YAML costs more than all of --help.
    from asyncrl.cli.export import export_checkpoint
    from asyncrl.config.loading import load_config

    print(export_checkpoint(load_config(shipped_or_given(path), overrides), step, adapters=adapters), flush=True)
    return 0


def named_hardware(text: str | None, *, dry_run: bool) -> Hardware | None:
    """The machine of `--for`; None where it was not given. Raises ConfigError."""
    if text is None:
        return None
    if not dry_run:
        raise ConfigError("--for names the machine that --dry-run compares with; give both, or neither")
    from asyncrl.cli.hardware import parse_hardware

    return parse_hardware(text)


def _load_checked(
    role: str, path: str, overrides: Sequence[str], hardware: Hardware | None = None
) -> tuple[Config, ModelFiles]:
    """The configuration and its model, with everything checked that can be before the daemon starts.

    hardware: the machine it is to start on, where that is not this one. Raises UserError.
    """
    # Imported here: reading YAML costs more than all of --help.
    from asyncrl.cli.run import checked
    from asyncrl.config.loading import load_config

    config = load_config(shipped_or_given(path), overrides)
    return config, checked(config, role, is_here=hardware is None)


def shipped_or_given(path: str) -> str:
    """`quickstart` and `configs/quickstart.yaml` name the file that comes with asyncrl, unless there is one here."""
    given = Path(path)
    shipped = Path(__file__).parents[1] / "configs" / f"{given.stem}.yaml"
    by_name = given.parent in (Path(), Path("configs")) and given.suffix in ("", ".yaml")
    return str(shipped) if by_name and not given.exists() and shipped.is_file() else path


def _print_dry_run(config: Config, role: str, named: Hardware | None) -> int:
    """Prints what would be, and a verdict; returns 0 if it fits, else 2."""
    from asyncrl.cli.dry_run import dry_run, verdict  # they read YAML too
    from asyncrl.cli.hardware import hardware_here

    hardware = named or hardware_here(config.run.dir)
    result = dry_run(config, role, hardware)
    print(f"{result.text}\n\n{verdict(result, hardware)}", flush=True)
    return 2 if result.problems else 0


def start_log(level: str) -> None:
    """Logs to stderr from this level on."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def complain(program: str, message: object) -> None:
    """Prints a message to stderr, each line with the name of the program."""
    lines = str(message).splitlines() or [type(message).__name__]
    for line in lines:
        print(f"{program}: {line}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An argparse parser without help of its own, whose errors say what to do."""

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line and exits with code 2."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _parser(role: str) -> Parser:
    parser = Parser(prog=f"asyncrl-{role}", add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--for", dest="hardware")
    if role == "learner":
        parser.add_argument("--export", metavar="STEP")
        parser.add_argument("--adapters", action="store_true")
    return parser


# -- help ----------------------------------------------------------------------------------------------------


def help_text(role: str, columns: int) -> str:
    """Usage, exit codes, and every configuration key with its default and its sentence, wrapped to `columns`."""
    width = max(50, min(columns, 110))
    blocks = [
        textwrap.fill(
            f"usage: asyncrl-{role} CONFIG [key=value ...] [--dry-run [--for HARDWARE]]{EXPORT_USAGE[role]} [--help] "
            "[--version]",
            width,
            subsequent_indent=" " * 7,
            break_on_hyphens=False,
        ),
        _wrapped(PURPOSE[role], width),
        _wrapped(
            "CONFIG is a YAML file, or the name of one that comes with asyncrl, such as quickstart; the same file "
            "configures learner and generators. A value on the command line wins "
            "over the file, and the file over the defaults. ${run.name} in a value stands for the value of that key.",
            width,
        ),
        f"example: {EXAMPLES[role]}",
        "\n".join(_options(role, width)),
        "\n".join(_exit_codes(width)),
        "configuration keys",
    ]
    blocks.extend(_section(name, sentence, width) for name, sentence in sections().items())
    return "\n\n".join(blocks)


def _options(role: str, width: int) -> list[str]:
    options = {
        "--dry-run": "check everything, try the task, print what would be bound, loaded and needed, and exit: with 0 "
        "and `fits`, or with 2 and what to change",
        "--for": "the machine that --dry-run compares with, where it is not this one, for example "
        "gpu=80GiB,gpus=8,host=512GiB,disk=2TiB",
        **EXPORT_OPTIONS[role],
        "--help": "print this text and exit",
        "--version": "print the version of asyncrl and exit",
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
    """The sentence of a key and what values it takes; where there are choices, their type goes without saying."""
    return f"{key.sentence} ({key.rule if key.bounds.choices else key.type_and_rule})"


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
