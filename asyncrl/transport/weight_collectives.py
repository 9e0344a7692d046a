"""Weights over torch.distributed's collectives: gloo between CPUs, NCCL between GPUs.

A group is a bare process-group object over its own store connection and key prefix. It is never the default group, so
that it can be formed, aborted and formed again while training and generation go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncrl.errors import WeightGroupError
from asyncrl.transport.weight_rendezvous import POLL_S, WeightGroupSpec, connect_store, local_address_towards

NCCL_POLL_S = 0.001
# Parts in the backend's hands at once: while Python takes note of one, the next ones move. No more than it takes: a
# group that failed is let go of only when each of them has failed.
AHEAD = 3


class _Collective:
    """What both have: a process group that appears in `form` and is dropped in `close`."""

    def __init__(self, spec: WeightGroupSpec, device: torch.device, aborted: threading.Event) -> None:
        self._spec = spec
        self._device = device
        self._aborted = aborted
        self._group: Any = None
        self.waiting_for = f"all {spec.world_size} members"

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._release(group)
        del group  # the destructor closes the connections; it waits for operations under way

    def broadcast(self, parts: Sequence[torch.Tensor], timeout_s: float, on_part: Callable[[int], None]) -> None:
        deadline = time.monotonic() + timeout_s
        under_way: deque[tuple[Any, int]] = deque()
        for part in parts:
            under_way.append((self._group.broadcast([part], _options(deadline)), part.nbytes))
            if len(under_way) == AHEAD:
                self._finish(*under_way.popleft(), deadline, on_part)
        while under_way:
            self._finish(*under_way.popleft(), deadline, on_part)

    def _finish(self, work: Any, num_bytes: int, deadline: float, on_part: Callable[[int], None]) -> None:
        self._wait(work, deadline)
        on_part(num_bytes)

    def _wait(self, work: Any, deadline: float) -> None:
        """Return when `work` is done. Raises WeightGroupError or RuntimeError when it failed or is late."""
        raise NotImplementedError

    def _release(self, group: Any) -> None:
        """What must happen before a group is dropped."""

    def _late(self) -> WeightGroupError:
        return WeightGroupError("a member did not take part in time")


class GlooTransport(_Collective):
    """ProcessGroupGloo, on the interface that reaches the store."""

    def form(self, timeout_s: float) -> None:
        options = dist.ProcessGroupGloo._Options()
        # The interface that reaches the store is the private one; gloo by itself would ask the host's name.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=local_address_towards(self._spec))]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = AHEAD  # with one, the next part is asked for when the last one is there
        store = connect_store(self._spec, timeout_s)
        self._group = dist.ProcessGroupGloo(store, self._spec.rank, self._spec.world_size, options)

    def _wait(self, work: Any, deadline: float) -> None:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._late()
            try:
                work.wait(timedelta(seconds=min(remaining, POLL_S)))
                return
            except RuntimeError:
                # An expired slice and a failed transfer raise alike. A completed one has failed, or has succeeded just
                # after its slice: asked again it says which.
                if work.is_completed():
                    work.wait()
                    return
            if self._aborted.is_set():
                raise WeightGroupError("aborted")

    def abort(self) -> None:
        """Nothing: a wait sees the event, and gloo's own part ends with the group."""


class NcclTransport(_Collective):
    """ProcessGroupNCCL with a non-blocking communicator: abort is safe on no other kind."""

    def __init__(self, spec: WeightGroupSpec, device: torch.device, aborted: threading.Event) -> None:
        if device.type != "cuda":
            raise WeightGroupError(f"nccl needs a cuda device, not {device}; use gloo")
        super().__init__(spec, device, aborted)

    def form(self, timeout_s: float) -> None:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
        options.config.blocking = 0
        options._timeout = timedelta(seconds=timeout_s)
        environment = {
            # A lost generator must not end the learner: no watchdog, no teardown of the process on error.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
            "TORCH_NCCL_ENABLE_MONITORING": "0",
            "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(max(1, round(timeout_s))),
        }
        with _environment.holding(environment):
            store = connect_store(self._spec, timeout_s)
            self._group = dist.ProcessGroupNCCL(store, self._spec.rank, self._spec.world_size, options)
            self._group.eager_connect_single_device(self._device)  # connect now, under the forming deadline

    def _wait(self, work: Any, deadline: float) -> None:
        while not work.is_completed():
            if self._aborted.wait(NCCL_POLL_S):
                raise WeightGroupError("aborted")
            if time.monotonic() > deadline:
                # NCCL has no timeout for a collective: it waits for the dead until `close` aborts the communicator.
                raise self._late()
        failure = work.exception()
        if failure is not None:
            raise WeightGroupError(str(failure))

    def abort(self) -> None:
        group = self._group
        if group is not None:
            group.abort()

    def _release(self, group: Any) -> None:
        group.abort()


def _options(deadline: float) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
    return options


class _Environment:
    """Variables that NCCL groups are formed under, and no others: those of the training itself want their watchdog.

    Groups may be formed from several threads at once: the first one in sets them, the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: dict[str, str | None] = {}

    @contextmanager
    def holding(self, values: Mapping[str, str]) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = {key: os.environ.get(key) for key in values}
            self._users += 1
            os.environ.update(values)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def _restore(self) -> None:
        for key, value in self._before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


_environment = _Environment()
