"""The command `asyncrl`: a whole run on this host, the files that start one on a cluster, and what runs came to.

    asyncrl run CONFIG [key=value ...]                  learner and generators of this host, as one
    asyncrl launch slurm|kubernetes CONFIG ...          prints a complete, commented file
    asyncrl report RUN                                  writes report.html and summary.json of a run
    asyncrl watch RUN [--port PORT]                     the same page live, on loopback
    asyncrl compare RUN RUN ...                         several runs in one table and on one page
    asyncrl rollouts RUN [--step N | --eval] ...        what the model said, token by token
    asyncrl bench CONFIG [key=value ...]                how fast it is on this machine, and what bounds it
    asyncrl simulate                                    how fast a run would be, without a model
    asyncrl inspect RUN                                 what is in the folder of a run
    asyncrl replay RUN                                  trains a run again from its journal, and compares
    asyncrl what-if RUN key=value ...                   trains its rollouts under other settings

The daemons by themselves are `asyncrl-learner` and `asyncrl-generator`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl import __version__
from asyncrl.cli.common import Parser, complain, exit_code_of, is_configuration, named_hardware, shipped_or_given
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    from asyncrl.cli.launch.split import HostSplit, Portion
    from asyncrl.cli.launch.supervisor import Daemon
    from asyncrl.config import Config

PROGRAM = "asyncrl"
EXAMPLE = "asyncrl run configs/quickstart.yaml run.steps=20"
COMMANDS = {
    "run": "learner and generators of this host, started, watched and stopped as one",
    "launch": "prints the file that starts a run on a cluster",
    "bench": "how fast a configuration is on this machine, and what bounds it",
    "simulate": "how fast a run would be, for any number of generators, without a model",
    "inspect": "what is in the folder of a run",
    "replay": "trains a run again from its journal, without generators, and compares",
    "what-if": "trains the recorded rollouts of a run under other settings",
    "report": "writes the page of a run",
    "watch": "serves the page of a run live",
    "compare": "several runs in one table and on one page",
    "rollouts": "shows what the model said in a run, token by token",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`asyncrl.cli.common.EXIT_CODES`)."""
    return exit_code_of(PROGRAM, lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    name = _parser().parse_args(given[:1]).command
    if name is None:
        raise ConfigError(f"give a command, for example: {EXAMPLE}")
    return _command(name)(given[1:])


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """What runs the command; only its own modules are imported."""
    if name == "run":
        return _run
    if name == "launch":
        return _launch
    if name == "simulate":
        from asyncrl.cli.measuring.simulate import simulate

        return simulate
    if name == "inspect":
        from asyncrl.cli.reading.inspect import inspect

        return inspect
    if name == "bench":
        from asyncrl.cli.measuring.bench import bench

        return bench
    if name in ("replay", "what-if"):
        from asyncrl.cli.reading.replay import replay, what_if

        return replay if name == "replay" else what_if
    if name == "rollouts":
        from asyncrl.cli.reading.rollouts import rollouts_command

        return rollouts_command
    from asyncrl.cli.reading.report import compare_command, report_command, watch_command

    return {"report": report_command, "watch": watch_command, "compare": compare_command}[name]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Asynchronous actor-learner reinforcement learning for language models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        choices=tuple(COMMANDS),
        help="; ".join(f"{name}: {what}" for name, what in COMMANDS.items()),
    )
    return parser


# -- asyncrl run ---------------------------------------------------------------------------------------------


def _run_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{PROGRAM} run",
        description="Starts a learner and its generators on this host, divides GPUs or cores between them, starts a "
        "generator that dies again, and stops all of them as one: Ctrl-C once in good order, twice at once.",
        epilog=f"example: {EXAMPLE}; every key: asyncrl-learner --help",
    )
    parser.add_argument("config", nargs="?", help="a YAML file, or the name of one that comes with asyncrl")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file, and over the split")
    parser.add_argument("--generators", type=int, metavar="N", help="how many; else as many as the GPUs hold, or one")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the split and whether it fits, and exit with 0 or 2"
    )
    parser.add_argument("--for", dest="hardware", help='another machine for --dry-run, such as "gpu=80GiB,gpus=8"')
    return parser


def _run(argv: Sequence[str]) -> int:
    arguments = _run_parser().parse_intermixed_args(argv)
    if not is_configuration(arguments.config):
        raise ConfigError(f"give a configuration file, for example: {EXAMPLE}")
    if arguments.generators is not None and arguments.generators < 1:
        raise ConfigError(
            f"--generators {arguments.generators}: give 1 or more; asyncrl-learner starts a learner alone"
        )
    path = shipped_or_given(arguments.config)
    named = named_hardware(arguments.hardware, dry_run=arguments.dry_run)
    # Imported here: reading YAML costs more than all of --help.
    from asyncrl.cli.hardware import hardware_here
    from asyncrl.cli.launch.split import DividedHost, split_host, visible_gpus
    from asyncrl.cli.run import checked
    from asyncrl.config.loading import load_config, written_values

    config = load_config(path, arguments.overrides)
    model = checked(config, "learner", is_here=named is None)
    checked(config, "generator", is_here=named is None)
    hardware = named or hardware_here(config.run.dir)
    # The environment's own names for them, but no more than a process here could use.
    gpus = visible_gpus(hardware.gpus, os.environ if named is None else {})[: hardware.gpus]
    host = DividedHost(hardware, len(os.sched_getaffinity(0)), gpus)
    split = split_host(config, written_values(path, arguments.overrides).keys(), model, host, arguments.generators)
    _say(split.line)
    if split.problems:
        complain(PROGRAM, "\n".join(f"does not fit: {problem}" for problem in split.problems))
        return 2
    if arguments.dry_run:
        print("fits" if hardware.is_here else "fits the hardware that --for names", flush=True)
        return 0
    return _supervise(config, path, arguments.overrides, split)


def _supervise(config: Config, path: str, overrides: Sequence[str], split: HostSplit) -> int:
    from asyncrl.cli.launch.supervisor import Daemon, Supervisor, daemon_command
    from asyncrl.host.processes import StopSignal

    stop = StopSignal()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
        signal.signal(signal.SIGHUP, lambda number, frame: stop.request())
    os.umask(0o077)  # rollouts, checkpoints and keys are nobody else's to read
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    def daemon(role: str, name: str, place: Portion, log: Path | None) -> Daemon:
        # What the user wrote comes last and wins.
        command = daemon_command(role, path, [*place.settings, *overrides])
        return Daemon(name, command, {**os.environ, **place.environment}, log)

    count = len(split.generators)
    names = [f"generator-{number}" if count > 1 else "generator" for number in range(1, count + 1)]
    generators = [
        daemon("generator", name, place, run_dir / f"{name}.log")
        for name, place in zip(names, split.generators, strict=True)
    ]
    _say(f"logs: {', '.join(str(generator.log) for generator in generators)}, {run_dir / 'trainer.log'}")
    return Supervisor(daemon("learner", "learner", split.learner, None), generators, stop, _say).run()


# -- asyncrl launch ------------------------------------------------------------------------------------------


def _launch(argv: Sequence[str]) -> int:
    parser = Parser(
        prog=f"{PROGRAM} launch",
        description="Prints a complete, commented file that starts a learner and generators on a cluster: a script "
        "that submits jobs to Slurm, or manifests for kubectl apply.",
        epilog=f"example: {PROGRAM} launch slurm configs/my.yaml > run.sh",
    )
    parser.add_argument("cluster", choices=("slurm", "kubernetes"))
    parser.add_argument("config", nargs="?", help="a YAML file, or the name of one that comes with asyncrl")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file, also on the cluster")
    parser.add_argument("--generators", type=int, metavar="N", help="how many at first (default 4)")
    parser.add_argument("--image", help=f"kubernetes: the image with asyncrl in it (default asyncrl:{__version__})")
    arguments = parser.parse_intermixed_args(argv)
    if not is_configuration(arguments.config):
        raise ConfigError(f"give a configuration file, for example: {PROGRAM} launch slurm configs/my.yaml > run.sh")
    if arguments.generators is not None and arguments.generators < 1:
        raise ConfigError(f"--generators {arguments.generators}: give 1 or more")
    if arguments.image and arguments.cluster == "slurm":
        raise ConfigError("--image is for kubernetes; Slurm takes the environment that asyncrl is installed in")
    from asyncrl.cli.launch.cluster import cluster_run
    from asyncrl.cli.launch.kubernetes import kubernetes_manifests
    from asyncrl.cli.launch.slurm import slurm_script

    run = cluster_run(shipped_or_given(arguments.config), arguments.overrides, arguments.generators)
    for note in run.notes:
        _say(f"note: {note}")
    image = arguments.image or f"asyncrl:{__version__}"
    print(slurm_script(run) if arguments.cluster == "slurm" else kubernetes_manifests(run, image), end="", flush=True)
    return 0


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
