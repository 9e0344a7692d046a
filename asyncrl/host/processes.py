"""What daemons need from the operating system: CPUs, name lookups, signals as events, an end with the parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from asyncrl.errors import ConfigError
from asyncrl.host.addresses import interface_towards

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
END_TIMEOUT_S = 5.0
UNSTOPPABLE_THREAD = "asyncrl: start engine"  # it imports vLLM, which takes seconds and cannot be broken off


def cpu_problem(cpus: list[int], key: str) -> str | None:
    """Why this process cannot be pinned to `cpus`, in a sentence that names the configuration key; None if it can."""
    usable = os.sched_getaffinity(0)
    if set(cpus) <= usable:
        return None
    return f"{key}={cpus}: this process may use only CPUs {sorted(usable)}; set {key} to some of them"


def pin_to(cpus: list[int], key: str) -> None:
    """Keeps this process and its children on `cpus`; an empty list leaves them free.

    Raises ConfigError naming the configuration key when the process may not use those CPUs.
    """
    if not cpus:
        return
    if problem := cpu_problem(cpus, key):
        raise ConfigError(problem)
    os.sched_setaffinity(0, cpus)


def boot_id() -> str:
    """What names this machine from one start to the next, in all of its containers."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def pid_namespace() -> int:
    """The inode of this process's PID namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def process_age_s() -> float:
    """Seconds since this process began, to a hundredth: what it took to import is part of it."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # the name of the program may hold anything
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since the machine started
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)


def shorten_name_lookups() -> None:
    """Makes this process and its children wait 1 s for a name server that does not answer, instead of 5.

    torch's store asks for the name of the address at every connection (to log it), and a weight channel makes several.
    Later attempts wait longer: a lookup takes 7 s in all. Has no effect after the first lookup of a process, and none
    where the user has set `RES_OPTIONS`.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")


def nccl_environment(timeout_s: float, host: str = "") -> dict[str, str]:
    """Environment variables with which a process that forms NCCL channels must start.

    host is where weight channels meet: NCCL asks nobody and takes the first interface it finds, docker0 or a public one
    as well, so it is given the one that reaches `host`, unless the user has set NCCL_SOCKET_IFNAME. It reads that once,
    at the first communicator of a process, which may be one of training or of vLLM.

    timeout_s is the deadline for the forming of a weight channel. torch reads its own limit at the first collective of
    a process and never again. Its default, 30 minutes, is how long a call would hold on to a communicator whose members
    do not come, and an abort waits for that call. torch counts whole seconds and stops after the given one: with one
    second less, the forming fails by its own deadline.
    """
    # Numbers of GPUs follow the bus, in CUDA as in the driver's tools: by CUDA's own order the fastest would be first.
    values = {"CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    values |= {"TORCH_NCCL_NONBLOCKING_TIMEOUT": str(max(1, int(timeout_s) - 1))}
    interface = interface_towards(host) if host else None
    if interface is not None and "NCCL_SOCKET_IFNAME" not in os.environ:
        values["NCCL_SOCKET_IFNAME"] = f"={interface}"  # "=": this very one, not all whose names begin so
    return values


def heap_environment() -> dict[str, str]:
    """Environment variables with which a trainer's rank must start: its heap then keeps what is freed, in huge pages.

    On a CPU each pass of a model takes and frees the same blocks. glibc gives back what lies free at the end of its
    heap, and the kernel clears the pages when the next pass takes them again, 4 KiB at a time. What that costs:
    `benchmarks.speed.trainer_heap`.

    glibc reads `GLIBC_TUNABLES` when a process starts: a rank that a launcher has started has that of the launcher.
    Settings of the user's own are left alone, and other C libraries do not look at them.
    """
    tunables = f"glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold={2**32}:glibc.malloc.mmap_threshold={32 * 2**20}"
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", tunables)}


def die_with_parent() -> None:
    """The kernel kills this process when its parent is gone: nothing outlives the daemon it belongs to."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tie_to_parent() -> bool:
    """`die_with_parent`, called by the child itself. False when the parent was gone already: the child must end."""
    parent = os.getppid()
    die_with_parent()
    return os.getppid() == parent


def adopt_orphans() -> None:
    """Orphans among this process's descendants become its own children, where they would go to init."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def child_environment(threads: int, **changes: str) -> dict[str, str]:
    """The environment for a child that computes in `threads` threads: that of this process, and `changes` on top."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **changes,
    }


def work_goes_on() -> bool:
    """Whether a thread that nobody can stop is still at work: the interpreter's own end would wait for it."""
    return any(thread.name == UNSTOPPABLE_THREAD for thread in threading.enumerate())


def leave(code: int) -> NoReturn:
    """Ends this process at once and tears nothing down; for a process whose threads may still be inside torch.

    The interpreter's own end would unwind such a thread through C++ that must not throw, and abort with SIGABRT.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


async def kill_group(process: asyncio.subprocess.Process, what: str) -> None:
    """Ends a child that leads its own process group, and everything in the group, and waits until it is gone."""
    # The group outlives its leader while a child of it runs, hence also after the leader's end.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
            return
    log.error("%s %d has not ended %g s after SIGKILL; going on without it", what, process.pid, END_TIMEOUT_S)


class StopSignal:
    """SIGTERM and SIGINT as a flag and a file descriptor to wait on. A second signal ends the process at once.

    Python lets the main thread alone handle signals. In another thread the process's own handlers stay as they are, and
    whoever runs a daemon there ends it with `request`.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.received: signal.Signals | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def request(self) -> None:
        """Asks for the same end as SIGTERM does, from any thread; repeating it changes nothing."""
        if self.received is None:
            self.received = signal.SIGTERM
            os.eventfd_write(self.fd, 1)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.eventfd_write(self.fd, 1)
