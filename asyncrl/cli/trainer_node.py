"""The command `asyncrl-trainer-node CONFIG --node N [--master HOST:PORT] [key=value ...]`: ranks of another host.

The learner's own ranks are started by `asyncrl-learner`; those of each further host by this command, with the same
configuration and on a file system that has run.dir and model.path. It starts learner.ranks processes, ends all of them
when one ends, and starts them again, as the learner does on its side, until the run is over.

Where a launcher has started it once for each rank, and so has set LOCAL_RANK, it becomes that one rank, and the
launcher is what starts it again: srun, or torchrun, which without the `--` takes `--node` for an option of its own:

    torchrun --nproc-per-node 8 --max-restarts 3 --no-python -- asyncrl-trainer-node CONFIG --node 1
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.cli.common import Parser, complain, exit_code_of, is_configuration, shipped_or_given
from asyncrl.errors import CheckpointError, ConfigError, PeerUnreachable, UserError

if TYPE_CHECKING:
    from asyncrl.config import Config
    from asyncrl.desk.trainer_process import RankLayout

log = logging.getLogger(__name__)

PROGRAM = "asyncrl-trainer-node"
USAGE = f"{PROGRAM} CONFIG --node N [--master HOST:PORT] [key=value ...]"
LOOK_EVERY_S = 0.5
NO_DESK = "-"  # in the place of the desk's address: rank 0 alone talks to it
FINAL = (UserError.exit_code, CheckpointError.exit_code, PeerUnreachable.exit_code)  # starting again changes nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`asyncrl.cli.common.EXIT_CODES`)."""
    return exit_code_of(PROGRAM, lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--node", type=int)
    parser.add_argument("--master", default="")
    parser.add_argument("-h", "--help", action="store_true")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.help:
        print(f"usage: {USAGE}\n\n{(__doc__ or '').strip()}", flush=True)
        return 0
    if not is_configuration(arguments.config) or arguments.node is None:
        complain(PROGRAM, f"give a configuration file and the number of this host: {USAGE}")
        return 2
    config = load(arguments.config, arguments.overrides)
    layout = layout_of(config, arguments.node, arguments.master)
    with tempfile.TemporaryDirectory(prefix="asyncrl-node-") as folder:
        file = Path(folder) / "config.yaml"
        from asyncrl.config.loading import to_yaml

        file.write_text(to_yaml(config), encoding="utf-8")
        if "LOCAL_RANK" in os.environ:
            return _become_rank(config, layout, file, int(os.environ["LOCAL_RANK"]))
        return _supervise(config, layout, file)


def load(path: str, overrides: Sequence[str]) -> Config:
    """The configuration, checked as far as it concerns a host of trainer ranks alone. Raises UserError."""
    from asyncrl.config.checks import check, check_values, raise_all  # they read YAML, which costs more than --help
    from asyncrl.config.loading import load_config
    from asyncrl.host.model_folder import find_model

    config = load_config(shipped_or_given(path), overrides)
    raise_all(check_values(config))
    check(config)
    config.model.path = str(find_model(config.model.path).folder)
    return config


def layout_of(config: Config, node: int, master: str) -> RankLayout:
    """The ranks of this host, and where they meet rank 0. Raises ConfigError."""
    from asyncrl.desk.trainer_process import rank_layout

    if not 0 < node < config.learner.nodes:
        raise ConfigError(
            f"--node {node} must be from 1 to {config.learner.nodes - 1} with learner.nodes={config.learner.nodes}: "
            "the learner starts the ranks of node 0 itself"
        )
    layout = rank_layout(config, node)
    if not master:
        return layout
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--master {master!r} must be HOST:PORT, the weights.host and learner.port of the learner")
    return dataclasses.replace(layout, host=host.strip("[]"), port=int(port))


def _supervise(config: Config, layout: RankLayout, file: Path) -> int:
    """Starts the ranks, and again when one fails; returns when they are done, or when starting again is of no use."""
    from asyncrl.desk.trainer_process import (
        KILL_TIMEOUT_S,
        MAX_BACKOFF_S,
        RESTART_BACKOFF_S,
        RankProcesses,
        rank_environment,
    )
    from asyncrl.host.processes import StopSignal, pin_to

    logging.basicConfig(level=config.log.level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    pin_to(config.learner.cpus, "learner.cpus")
    stop = StopSignal()
    ranks = RankProcesses(layout, [sys.executable, "-m", "asyncrl.trainer.rank", str(file), NO_DESK])
    environment = rank_environment(config.learner.threads, config.weights.timeout_s, config.weights.host)
    backoff_s = RESTART_BACKOFF_S
    try:
        while True:
            started = time.monotonic()
            ranks.start(environment, None)
            log.info("trainer ranks %s started; they meet rank 0 at %s:%d", ranks.running, layout.host, layout.port)
            while (failure := ranks.failure()) is None and ranks.running:
                if _stopped_within(stop, LOOK_EVERY_S):
                    return 0
            if failure is None:
                return 0
            ranks.kill()
            ranks.wait(KILL_TIMEOUT_S)
            if failure.code in FINAL:
                return failure.code
            if time.monotonic() - started > MAX_BACKOFF_S:
                backoff_s = RESTART_BACKOFF_S
            log.error("%s; all ranks of this host start again in %.0f s", failure, backoff_s)
            if _stopped_within(stop, backoff_s):
                return 0
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
    finally:
        ranks.kill()
        ranks.wait(KILL_TIMEOUT_S)


def _stopped_within(stop: object, timeout_s: float) -> bool:
    """Waits; True as soon as SIGTERM or SIGINT came."""
    import select

    from asyncrl.host.processes import StopSignal

    assert isinstance(stop, StopSignal)
    select.select([stop.fd], [], [], timeout_s)
    return stop.received is not None


def _become_rank(config: Config, layout: RankLayout, file: Path, local_rank: int) -> int:
    """Runs one rank in this process, as a launcher wants it."""
    if local_rank >= layout.count:
        raise ConfigError(
            f"LOCAL_RANK={local_rank} with learner.ranks={layout.count}: start as many processes on each host as "
            "learner.ranks says"
        )
    from asyncrl.desk.trainer_process import rank_environment

    os.environ.update(rank_environment(config.learner.threads, config.weights.timeout_s, config.weights.host))
    os.environ.update(layout.environment(local_rank, layout.port))
    from asyncrl.trainer.rank import run_rank  # it imports torch

    return run_rank(str(file), NO_DESK)


if __name__ == "__main__":
    sys.exit(main())
