"""Memory that other processes of this machine can read in place: on CPUs anonymous shared memory, on GPUs CUDA IPC.

This module alone knows that the two differ. Memory is exported once, when it is made, and opened from a *handle*, a
dict of plain values that may travel as JSON. On CPUs the memory is a memfd, which has no name in any folder: the kernel
frees it with the last process that maps it, however that process ended. Receivers reach it through /proc/PID/fd, so
both ends must run as one user in one PID namespace. On GPUs the driver frees the memory with the exporting process;
torch keeps a counter file of 80 kB in /dev/shm for it, which stays behind if that process is killed.

Known, on GPUs: torch gives exported memory back only when every process that opened it has said that it let go. What a
killed receiver had open therefore stays taken until the exporter ends, also after its buffer was dropped. For staging
buffers, which live as long as the run, that costs nothing; a weight channel's own buffer (`IpcTransport`) is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from asyncrl.errors import ChannelError
from asyncrl.host.processes import boot_id, pid_namespace
from asyncrl.link.weight_records import Placement

EVENT_POLL_S = 0.0005
_MEMFD_NAME = "asyncrl-weights-"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a mapping stays as large as it was


Handle: TypeAlias = dict[str, int | str | bool]  # leads to one buffer; only this module knows what is in it


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is. Processes in the same place can open each other's memory."""

    machine: str  # the kernel's boot id
    pid_namespace: int  # inode
    user: int
    device: str  # "cpu", or the GPU's UUID


class _Export:
    """What lets others open one buffer. Ends with the tensor that was made with it."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle


_exports: weakref.WeakValueDictionary[int, _Export] = weakref.WeakValueDictionary()  # by address
_exports_lock = threading.Lock()


def shared_buffer(num_bytes: int, device: torch.device | str) -> torch.Tensor:
    """A zeroed uint8 tensor [num_bytes] that others can open as long as this very tensor, not a view of it, lives."""
    device = torch.device(device)
    if device.type == "cuda":
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        export = _Export(_export_cuda(buffer))
    else:
        buffer, export = _new_memfd(num_bytes)
    buffer.asyncrl_export = export  # type: ignore[attr-defined]
    with _exports_lock:
        _exports[buffer.data_ptr()] = export
    return buffer


def handle_of(flat: torch.Tensor) -> tuple[Handle, int] | None:
    """The handle of the shared buffer that `flat` is a part of, and its offset there; None for other memory."""
    base = flat.untyped_storage().data_ptr()
    with _exports_lock:
        export = _exports.get(base)
    return None if export is None else (export.handle, flat.data_ptr() - base)


def place(device: torch.device) -> Place:
    """Where this process is, for memory on `device`."""
    return Place(
        machine=boot_id(),
        pid_namespace=pid_namespace(),
        user=os.geteuid(),
        device=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu",
    )


def placement(devices: Sequence[torch.device]) -> Placement:
    """Where this process is, for those who decide how its weights travel; `devices` are those that it uses."""
    return Placement.here([place(device).device for device in devices if device.type == "cuda"])


class Opened:
    """Memory of another process, mapped read-only as far as the platform can. Mapped until it is dropped.

    Raises:
        ChannelError: the handle leads to no memory, or to other memory than it was made for.
    """

    def __init__(self, handle: Handle, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            self._memory: Any = _open_cuda(handle, device) if device.type == "cuda" else _open_memfd(handle)
        except (KeyError, TypeError, ValueError) as error:
            raise ChannelError(f"handle of shared memory is malformed: {error!r}") from error

    def copy(self, offset: int, destination: torch.Tensor, deadline: float) -> None:
        """Copy into `destination`, a flat uint8 tensor, from `offset` on.

        Raises:
            ChannelError: the memory is smaller than that; `deadline` (monotonic) passed.
        """
        stop = offset + destination.numel()
        if not 0 <= offset <= stop <= len(self._memory):
            raise ChannelError(f"bytes {offset} to {stop} are not in shared memory of {len(self._memory)} bytes")
        if self._stream is not None:
            _copy_cuda(self._memory[offset:stop], destination, self._stream, deadline)
        else:
            np.copyto(destination.numpy(), self._memory[offset:stop])  # numpy lets go of the interpreter's lock


# -- CPU ---------------------------------------------------------------------------------------------------------------


def _new_memfd(num_bytes: int) -> tuple[torch.Tensor, _Export]:
    name = _MEMFD_NAME + secrets.token_hex(8)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        buffer = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    except BaseException:  # whatever it is, nobody else knows of the descriptor yet
        os.close(fd)
        raise
    export = _Export({"pid": os.getpid(), "fd": fd, "name": name, "bytes": num_bytes})
    weakref.finalize(export, os.close, fd)
    return buffer, export


def _open_memfd(handle: Handle) -> np.ndarray:
    path = f"/proc/{int(handle['pid'])}/fd/{int(handle['fd'])}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The number may have been given to another file since.
            if not os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{handle['name']}"):
                raise ChannelError(f"{path} is no longer the memory {handle['name']}; its owner dropped it")
            mapped = mmap.mmap(fd, int(handle["bytes"]), prot=mmap.PROT_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise ChannelError(
            f"shared memory {path} cannot be opened ({error}): run learner and generator as one user in one "
            "PID namespace, or set weights.backend=gloo"
        ) from error
    return np.frombuffer(mapped, dtype=np.uint8)


# -- GPU: after torch's own reductions; not yet run on a GPU -----------------------------------------------------------


def _export_cuda(buffer: torch.Tensor) -> Handle:
    _, handle, num_bytes, offset, counter, counter_offset, event, wait = buffer.untyped_storage()._share_cuda_()
    return {
        "handle": handle.hex(),
        "bytes": num_bytes,
        "offset": offset,
        "counter": counter.hex(),
        "counter_offset": counter_offset,
        "event": event.hex(),
        "wait": wait,
    }


def _open_cuda(handle: Handle, device: torch.device) -> torch.Tensor:
    storage = torch.UntypedStorage._new_shared_cuda(
        torch.cuda.current_device() if device.index is None else device.index,  # the learner may number it otherwise
        bytes.fromhex(str(handle["handle"])),
        int(handle["bytes"]),
        int(handle["offset"]),
        bytes.fromhex(str(handle["counter"])),
        int(handle["counter_offset"]),
        bytes.fromhex(str(handle["event"])),
        bool(handle["wait"]),
    )
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _copy_cuda(source: torch.Tensor, destination: torch.Tensor, stream: torch.cuda.Stream, deadline: float) -> None:
    stream.wait_stream(torch.cuda.current_stream(destination.device))  # the zeros of a new staging buffer
    with torch.cuda.stream(stream):
        destination.copy_(source, non_blocking=True)
        destination.record_stream(stream)  # past the deadline it may be dropped while the copy still writes to it
        done = torch.cuda.Event()
        done.record(stream)
    wait_event(done, deadline)


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, what this thread gives to a GPU runs beside the work of other threads; on CPUs nothing changes.

    Without it a thread shares the device's default stream with the training: each would wait for the other.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.set_device(device)  # a new thread's is that of rank 0
    return torch.cuda.stream(torch.cuda.Stream(device))


def wait_event(event: Any, deadline: float) -> None:
    """Raises ChannelError when a CUDA event has not come by `deadline`."""
    while not event.query():
        if time.monotonic() > deadline:
            raise ChannelError("the GPU did not finish its work in time")
        time.sleep(EVENT_POLL_S)


def wait_written(flat: torch.Tensor, deadline: float) -> None:
    """Returns once all earlier work of the current stream is done, the writes to `flat` included.

    Raises ChannelError when that takes until after `deadline`.
    """
    if flat.is_cuda:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flat.device))
        wait_event(event, deadline)
