"""One rank of a world in which something goes wrong: `python -m tests.trainer.ranks.lost_rank_program WHAT FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from asyncrl.errors import AsyncRLError, RankLost
from asyncrl.trainer import world as world_module
from asyncrl.trainer.world import Order, RankPlace, World

what, folder = sys.argv[1], Path(sys.argv[2])
world_module.DEADLINE_S = 3.0
world_module.KEEP_ALIVE_S = 0.5
place = RankPlace.from_environment()
started = time.monotonic()
world = World.alone()
try:
    world = World.form(place, torch.device("cpu"), timeout_s=60.0)
    world.hurry()
    started = time.monotonic()
    if what == "keep_alive":
        if place.rank == 0:
            with world.others_wait():
                time.sleep(1.5 * world_module.DEADLINE_S)
            world.tell(Order.STOP)
        else:
            seat = "free"
            try:
                World.form(place, torch.device("cpu"), timeout_s=60.0)
            except RankLost as error:
                seat = str(error)
            assert "have a rank 1 already" in seat, seat
            assert world.listen() == (Order.STOP, 0)
    else:
        if place.rank == 1 and what in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        for _ in range(2):
            world.sum(torch.ones(1))
    said = "well"
except AsyncRLError as error:
    silent = world.silent_ranks() if isinstance(error, RankLost) else []
    said = f"{type(error).__name__} after {time.monotonic() - started:.1f} s, silent {silent}: {error}"
(folder / f"rank_{place.rank}").write_text(said)
os._exit(0)
