"""The real learner, desk and trainer, on the configuration of a crash loop.

    python -m benchmarks.faults.crash_loops.real_learner FOLDER [RUN_DIR]

RUN_DIR takes the place of the folder's own run.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from asyncrl.desk.daemon import run_learner
from asyncrl.host.processes import leave
from benchmarks.faults.crash_loops.settings import config_of

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    learner_config = config_of(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        learner_config.run.dir = sys.argv[2]
    leave(run_learner(learner_config))
