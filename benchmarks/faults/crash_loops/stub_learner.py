"""The real desk on real sockets, with a trainer that only hashes, and prompts that are numbers.

    python -m benchmarks.faults.crash_loops.stub_learner FOLDER

It is put together as `desk.daemon.run_learner` puts it together.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from asyncrl.desk.daemon import Surroundings, canary_tolerance, make_desk
from asyncrl.desk.opening.restoring import restore_run
from asyncrl.desk.opening.run_folder import open_run
from asyncrl.desk.opening.run_record import write_record
from asyncrl.desk.prompts import LeasedPrompts, MadeAtOnce
from asyncrl.desk.trainer_process import TrainerProcess
from asyncrl.host.addresses import ipc_address
from asyncrl.host.processes import StopSignal, leave
from asyncrl.link.sockets import ServerSocket
from asyncrl.link.trainer_link import MAX_FRAME_BYTES
from asyncrl.metrics import Metrics
from asyncrl.tasks.prompts import Prompt
from benchmarks.faults.crash_loops.settings import VOCAB, config_of


class StubTrainerProcess(TrainerProcess):
    """The real watch over a trainer that needs no torch."""

    def command(self) -> list[str]:
        """The stub in the place of a rank."""
        return [
            *(sys.executable, "-m", "benchmarks.faults.crash_loops.stub_trainer"),
            *(str(self.config_file), self.desk_address),
        ]


class NumberedPrompts:
    """Prompt n is the number n, in tokens."""

    def train(self, ordinal: int) -> Prompt:
        """The prompt of an ordinal."""
        tokens = [ordinal % VOCAB, ordinal // VOCAB % VOCAB]
        return Prompt(np.array(tokens, np.int32), {"index": ordinal})


def serve(folder: Path) -> int:
    """One life of the learner."""
    stop = StopSignal()
    config = config_of(folder)
    run_dir = Path(config.run.dir)
    with ExitStack() as open_things:
        run = open_run(config)
        open_things.enter_context(closing(run.journal))
        run_epoch = run.begin(run_dir, time.monotonic())
        write_record(run_dir, config, run.record)
        rollouts = open_things.enter_context(
            closing(ServerSocket(config.transport.address, max_frame_bytes=config.transport.max_frame_bytes))
        )
        trainer = open_things.enter_context(
            closing(ServerSocket(ipc_address(run_dir, "desk.sock"), max_frame_bytes=MAX_FRAME_BYTES))
        )
        process = StubTrainerProcess(
            folder,  # which a stub trainer takes in the place of a configuration file
            trainer.address,
            run_dir / "trainer.log",
            threads=1,
            max_restarts=config.learner.max_trainer_restarts,
            weights_timeout_s=config.weights.timeout_s,
        )
        process.start()
        open_things.callback(process.kill)
        metrics = open_things.enter_context(closing(Metrics.open(config, canary_tolerance(config, on_gpu=False))))
        state = restore_run(config, run_epoch, run.journal, run.saved)
        prompts = LeasedPrompts(MadeAtOnce(NumberedPrompts()), state.leases)
        return make_desk(config, state, prompts, Surroundings(rollouts, trainer, process, metrics, stop)).run()


if __name__ == "__main__":
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    leave(serve(Path(sys.argv[1])))
