"""The two daemons as functions, for programs that start them: the same checks as the commands make, then the run."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.config.checks import check, check_values, raise_all
from asyncrl.host.model_folder import ModelFiles
from asyncrl.host.processes import StopSignal


def run_learner(config: Config, stop: StopSignal | None = None) -> int:
    """Checks `config` and runs a learner to the end of its run, in any thread. Returns its exit code.

    stop: `stop.request()`, from another thread, ends it as SIGTERM does. In the main thread SIGTERM and SIGINT end it.

    Raises AsyncRLError, with the exit code of the command as `exit_code` where there is one.
    """
    use_folder(config, checked(config, "learner"))
    from asyncrl.desk.daemon import run_learner as run  # it imports zmq

    return run(config, stop)


def run_generator(config: Config, stop: StopSignal | None = None) -> int:
    """Checks `config` and runs a generator to its end, in any thread; otherwise as `run_learner`."""
    use_folder(config, checked(config, "generator"))
    from asyncrl.generator.assembly import run_generator as run  # it imports torch

    return run(config, stop)


def checked(config: Config, role: str, *, is_here: bool = True) -> ModelFiles:
    """Checks all that can be checked before the daemon `role` starts; returns its model. Nothing is written.

    is_here: False where it will start on another machine. Raises UserError.
    """
    # Imported here: they read YAML, which costs more than all of --help.
    from asyncrl.cli.reward_checks import check_rewards
    from asyncrl.config.host_checks import check_host

    raise_all(check_values(config))
    check(config)
    model = check_host(config, role, is_here=is_here)
    check_rewards(config, role)
    return model


def use_folder(config: Config, model: ModelFiles) -> None:
    """Makes model.path a folder: trainer, tokenizer, fingerprints and engine must all read the same files."""
    config.model.path = str(model.folder)
