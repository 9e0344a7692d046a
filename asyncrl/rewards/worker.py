"""One reward worker: a process of its own that scores completions, so that whatever a reward does stays in here.

`pipe` says what comes and goes. The pool kills the whole process group when a result is late. Nothing here imports
torch or vllm.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable

from asyncrl.errors import ConfigError, DeadlineExceeded, RewardError, UserError
from asyncrl.host.pipes import private_pipes, read_frame, write_frame
from asyncrl.host.processes import adopt_orphans, tie_to_parent
from asyncrl.rewards.base import ServerUnavailable
from asyncrl.rewards.leftovers import end_processes, is_full
from asyncrl.rewards.parts import RewardParts, make_parts, prepare_parts
from asyncrl.rewards.pipe import (
    Scored,
    WorkerSetup,
    WorkerStarted,
    decode_job,
    decode_setup,
    encode,
)
from asyncrl.tasks.base import load_task

MAX_DETAIL = 500  # characters of what a reward raised
_SPARE: list[int] = []  # file descriptors to give up when a reward has used all others: ending its processes takes some


def main() -> None:
    """Serves jobs until the pool closes the pipe."""
    if not tie_to_parent():
        return
    adopt_orphans()  # of a reward's children: all of them must be found, to be ended
    jobs, results = private_pipes()
    frame = read_frame(jobs)
    if frame is None:
        return
    setup = decode_setup(frame)
    _SPARE.extend(os.dup(2) for _ in range(4))
    _limit_memory(setup.memory_bytes)
    try:
        rewards = _make_rewards(setup)
    except UserError as error:
        write_frame(results, encode(WorkerStarted(str(error))))
        return
    write_frame(results, encode(WorkerStarted()))
    while (frame := read_frame(jobs)) is not None:
        for compute in rewards.begin(decode_job(frame).samples()):
            scored = _score(compute)
            write_frame(results, encode(scored))
            if scored.worker_full:
                return  # the pool goes on with a new worker


def _make_rewards(setup: WorkerSetup) -> RewardParts:
    """Raises TaskError or ConfigError for what cannot be made."""
    parts = make_parts(setup.parts)
    if problems := prepare_parts(parts):
        raise ConfigError("\n".join(problems))
    return RewardParts(load_task(setup.path, dict(setup.args)), parts, setup.weights)


def _limit_memory(memory_bytes: int) -> None:
    """A reward that fills memory gets a MemoryError; and if the host runs out all the same, this process goes first."""
    # Memory it can write to, not address space: large reservations are normal for runtimes a reward may start.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _score(compute: Callable[[], dict[str, float]]) -> Scored:
    owner = os.getpid()
    try:
        scored = Scored(compute())
    except DeadlineExceeded as error:
        scored = Scored(None, "reward_timeout", str(error)[:MAX_DETAIL], server_down=True)
    except ServerUnavailable as error:
        scored = Scored(None, "reward_error", str(error)[:MAX_DETAIL], server_down=True)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code: whatever it raises is its result
        if is_full(error):
            return _without_room(error)
        detail = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        scored = Scored(None, "reward_error", detail[:MAX_DETAIL])
    if os.getpid() != owner:
        os._exit(1)  # a fork made in the reward came back here; only the original may answer
    try:
        if end_processes():
            return Scored(None, "reward_error", "the reward left processes running; end all of them before returning")
    except OSError as error:
        return _without_room(error)
    return scored


def _without_room(error: BaseException) -> Scored:
    while _SPARE:
        os.close(_SPARE.pop())
    with contextlib.suppress(OSError, MemoryError):
        end_processes()
    return Scored(None, "reward_error", f"{type(error).__name__}: {error}"[:MAX_DETAIL], worker_full=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(0)  # the pool is gone
