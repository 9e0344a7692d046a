"""Weights over torch.distributed's collectives: gloo between CPUs, NCCL between GPUs.

A channel is a bare process-group object over its own store connection and key prefix. It is never the default group, so
that it can be formed, aborted and formed again while training and generation go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Work

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.base import AHEAD
from asyncrl.weights.channels.rendezvous import POLL_S, connect_store, local_address_towards

NCCL_POLL_S = 0.001
# What torch takes for the timeout of every NCCL work and of an abort. Our deadlines come first and know what to do; at
# torch's own it would give up an abort under way, and a watchdog, if a later torch starts one, would end the process.
NCCL_NEVER = timedelta(days=1)


class _ProcessGroup(Protocol):
    """What is used of torch's classes, whose stubs lack half of it."""

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> Work: ...

    def abort(self) -> None: ...


class _Collective:
    """What both transports have: a process group that appears in `form` and is dropped in `close`."""

    def __init__(self, spec: ChannelSpec, device: torch.device, aborted: threading.Event) -> None:
        self._spec = spec
        self._device = device
        self._aborted = aborted
        self._process_group: _ProcessGroup | None = None
        self.waiting_for = f"all {spec.world_size} members"

    def close(self) -> None:
        """Drop the process group. Waits for operations under way, unless `_release` has broken them off."""
        process_group, self._process_group = self._process_group, None
        if process_group is not None:
            self._release(process_group)
        del process_group  # the destructor closes the connections; it waits for operations under way

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None],
        senders: Sequence[int],
    ) -> None:
        """See `Transport.broadcast`."""
        deadline = time.monotonic() + timeout_s
        under_way: deque[tuple[Work, int]] = deque()
        for part, sender in zip(parts, senders, strict=True):
            under_way.append((self._begin(part, sender, deadline), part.nbytes))
            if len(under_way) == AHEAD:
                self._finish(*under_way.popleft(), deadline, on_part)
        while under_way:
            self._finish(*under_way.popleft(), deadline, on_part)

    def _begin(self, part: torch.Tensor, sender: int, deadline: float) -> Work:
        # Asked for each time and held by no frame that waits: a call that was abandoned must not keep it from closing.
        if self._process_group is None:
            raise ChannelError("closed")
        return self._process_group.broadcast([part], _options(sender, deadline))

    def _finish(self, work: Work, num_bytes: int, deadline: float, on_part: Callable[[int], None]) -> None:
        self._wait(work, deadline)
        on_part(num_bytes)

    def _wait(self, work: Work, deadline: float) -> None:
        """Return when `work` is done. Raises ChannelError or RuntimeError when it failed or is late."""
        raise NotImplementedError

    def _release(self, process_group: _ProcessGroup) -> None:
        """Does what must happen before a process group is dropped."""

    def _late(self) -> ChannelError:
        return ChannelError("a member did not take part in time")


class GlooTransport(_Collective):
    """ProcessGroupGloo, on the interface that reaches the store."""

    def form(self, timeout_s: float) -> None:
        """See `Transport.form`."""
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options and the constructor that takes them
        options = gloo._Options()
        # The interface that reaches the store is the private one; gloo by itself would ask the host's name.
        options._devices = [gloo.create_device(hostname=local_address_towards(self._spec))]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = AHEAD  # with one, the next part is asked for when the last one is there
        store = connect_store(self._spec, timeout_s)
        self._process_group = gloo(store, self._spec.rank, self._spec.world_size, options)

    def _wait(self, work: Work, deadline: float) -> None:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._late()
            try:
                work.wait(timedelta(seconds=min(remaining, POLL_S)))
            except RuntimeError:
                # An expired slice and a failed transfer raise alike. A completed transfer has failed, or has succeeded
                # just after its slice: asked again it says which.
                if work.is_completed():
                    work.wait()
                    return
            else:
                return
            if self._aborted.is_set():
                raise ChannelError("aborted")

    def abort(self) -> None:
        """Nothing: a wait sees the event, and gloo's own part ends with the process group."""


class NcclTransport(_Collective):
    """ProcessGroupNCCL with a non-blocking communicator: abort is safe on no other kind.

    No watchdog of torch's looks after such a process group, so that a lost generator ends neither the learner nor,
    through the state that all process groups of a process share, a vLLM worker. `_wait` and `WeightChannel` keep the
    deadlines, and `asyncrl.host.processes.nccl_environment` bounds what torch waits for inside of a call.
    """

    def __init__(self, spec: ChannelSpec, device: torch.device, aborted: threading.Event) -> None:
        if device.type != "cuda":
            raise ChannelError(f"nccl needs a cuda device, not {device}; use gloo")
        super().__init__(spec, device, aborted)
        self._parts: Sequence[torch.Tensor] = ()
        self._stream: torch.cuda.Stream | None = None

    def form(self, timeout_s: float) -> None:
        """See `Transport.form`."""
        deadline = time.monotonic() + timeout_s
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
        options.config.blocking = 0
        options._timeout = NCCL_NEVER
        store = connect_store(self._spec, timeout_s)
        with _without_watchdog():
            nccl: Any = dist.ProcessGroupNCCL  # torch's stubs know another `broadcast`
            self._process_group = nccl(store, self._spec.rank, self._spec.world_size, options)
        if self._aborted.is_set():
            self.close()  # the channel's own `close` may have come before there was anything to let go of
            raise ChannelError("aborted")
        # The communicator connects in its first broadcast: that must count as forming, and end by this deadline.
        first = torch.zeros(1, dtype=torch.uint8, device=self._device)
        self.broadcast([first], deadline - time.monotonic(), lambda num_bytes: None, [0])

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None],
        senders: Sequence[int],
    ) -> None:
        """See `Transport.broadcast`."""
        self._parts = parts  # after a failure kernels use them until `close` has aborted the communicator
        with self._own_stream(wait=self._spec.rank >= self._spec.senders):
            super().broadcast(parts, timeout_s, on_part, senders)
        self._parts = ()

    def _wait(self, work: Work, deadline: float) -> None:
        while not work.is_completed():
            if self._aborted.wait(NCCL_POLL_S):
                raise ChannelError("aborted")
            if time.monotonic() > deadline:
                # NCCL has no timeout for a collective: it waits for the dead until `close` aborts the communicator.
                raise self._late()
        # Raises the error of a failed one, else lets go of its tensors; waits for nothing. It makes the current stream
        # wait for the kernel, which may hang after an error: that must be the stream of this transport alone.
        with self._own_stream():
            work.wait()

    def abort(self) -> None:
        """See `Transport.abort`."""
        process_group = self._process_group
        if process_group is not None:
            process_group.abort()

    def _release(self, process_group: _ProcessGroup) -> None:
        process_group.abort()
        self._parts = ()

    def _own_stream(self, *, wait: bool = False) -> AbstractContextManager[Any]:
        """The one of this transport. Not one for each part: torch has 32, and gives them out in turns.

        A collective waits for all that its stream was given before. What a sender sends is written, and need not wait
        for the training; what a receiver has queued, with `wait`, is the zeros of a new staging buffer.
        """
        self._stream = self._stream or torch.cuda.Stream(self._device)
        if wait:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def _options(sender: int, deadline: float) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = sender
    # For gloo alone: NCCL's works take the timeout of their process group.
    options.timeout = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
    return options


_WATCHDOG_SWITCH = "TORCH_NCCL_BLOCKING_WAIT"  # read once, while a process group is made
_making = threading.Lock()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """An NCCL process group that is made inside gets no watchdog. Those of the training, made elsewhere, keep theirs.

    A watchdog that finds a failed work tells all process groups of the process: minutes later the monitor of the first
    of them, in a vLLM worker that of vLLM itself, ends the process.
    """
    with _making:
        before = os.environ.get(_WATCHDOG_SWITCH)
        os.environ[_WATCHDOG_SWITCH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_WATCHDOG_SWITCH]
            else:
                os.environ[_WATCHDOG_SWITCH] = before
