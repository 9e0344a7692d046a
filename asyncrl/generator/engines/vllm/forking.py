"""The engine's process as a fork of the daemon: what the daemon has imported, it need not import again.

Importing vLLM takes 8 to 10 s of CPU time, and nearly all of it is the same in both processes. vLLM forks as well, but
on GPUs only; on CPUs it always spawns, because it sets OpenMP up by the environment of each worker, and OpenMP reads
that once, when torch is loaded. So we fork where the daemon's own torch was loaded with what the engine needs
(`may_fork`), and in all other cases leave it to vLLM.

A fork inherits more than modules, and `_begin` takes back what must not be shared: the daemon's files (sockets, the
lock on its identity, the pipes of reward workers, which end when the last copy is closed), and its signal handlers.
Threads are not inherited. The child uses nothing whose lock one of them could have held: sockets and loops are the
daemon's alone, and Python and the C library repair their own locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from asyncrl.generator.engines.vllm.options import EngineOptions, follow_parent
from asyncrl.host.processes import UNSTOPPABLE_THREAD

_T = TypeVar("_T")

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"  # vLLM reads it whenever it starts processes


def may_fork(options: EngineOptions) -> bool:
    """Whether the engine may be a fork of this process; to be asked after `prepare_environment`, before vLLM's import.

    Not where a GPU is used, because CUDA does not survive a fork. Not with several workers, each of which has OpenMP
    settings of its own. Not where torch is loaded already: with other settings, or with OpenMP threads that a fork
    would wait for and not have.
    """
    return options.fork and options.device == "cpu" and options.tensor_parallel_size == 1 and "torch" not in sys.modules


class _Fork:
    """What the engine's process must know of the daemon before it was forked: which pipes are the daemon's own."""

    def __init__(self) -> None:
        self.pipes = {status.st_ino for _, status in _open_files() if stat.S_ISFIFO(status.st_mode)}


@contextlib.contextmanager
def forked_engine() -> Iterator[None]:
    """Within it vLLM forks the engine's process. To be entered after vLLM's configuration was made, which resets it."""
    fork = _Fork()
    multiprocessing.util.register_after_fork(fork, _begin)  # until `fork` is gone
    before = os.environ.get(METHOD, "spawn")
    os.environ[METHOD] = "fork"
    # Collections would write to all that was imported, in both processes, and so make copies of it.
    gc.freeze()
    try:
        yield
    finally:
        os.environ[METHOD] = before
        del fork


def _begin(fork: _Fork) -> None:
    """What the engine's process does before all else. It ends if anything of that fails."""
    try:
        os.environ[METHOD] = "spawn"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        follow_parent()
        _let_go_of_files({0, 1, 2, *_log_files()}, fork.pipes)
    except BaseException:  # noqa: BLE001 - multiprocessing would go on
        traceback.print_exc()
        os._exit(1)


def _let_go_of_files(keep: set[int], old_pipes: set[int]) -> None:
    """Puts /dev/null in the place of all open files but `keep`, devices, and pipes that are not in `old_pipes`.

    By pipes that were made since then daemon and engine see each other's end. Closing the others would free their
    numbers, and objects that believe to own one would close another file by it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd, status in _open_files():
        new_pipe = stat.S_ISFIFO(status.st_mode) and status.st_ino not in old_pipes
        if fd not in keep and not stat.S_ISCHR(status.st_mode) and not new_pipe:
            os.dup2(null, fd, inheritable=False)


def _open_files() -> list[tuple[int, os.stat_result]]:
    """Number and status of each open file of this process."""
    files = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing itself is gone
            files.append((fd, os.fstat(fd)))
    return files


def _log_files() -> set[int]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    files = [handler.stream for handler in handlers if isinstance(handler, logging.FileHandler)]
    return {file.fileno() for file in files if file is not None}


def in_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Runs `work` in a thread of its own; the future has its result.

    Not in the loop's own pool: a process forked from there takes the pool for its own, and waits for it at its end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # it is what `work` returned
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001 - it is raised where the future is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    # No daemon: Python must not end in the middle of an import, which is C++ that does not expect it.
    threading.Thread(target=run, name=UNSTOPPABLE_THREAD).start()
    return future
