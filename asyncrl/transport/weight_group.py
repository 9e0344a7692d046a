"""Collective groups of the weight plane: the learner broadcasts, generator workers receive.

A group is a bare torch.distributed process-group object over its own store connection and key prefix. It is
never the default group, so that it can be formed, aborted and formed again while training and generation go
on. A prefix is never used twice: a second group on the keys of a broken one joins half of its dead members.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from asyncrl.errors import WeightGroupError
from asyncrl.transport.weight_layout import (
    SnapshotBuffer,
    WeightLayout,
    WeightManifest,
    digest,
    digest_buckets,
    plan_buckets,
    snapshot,
)
from asyncrl.transport.weight_rendezvous import (
    CLOSE_TIMEOUT_S,
    POLL_S,
    WeightGroupSpec,
    WeightStore,
    first_line,
    form_process_group,
    within,
)

__all__ = [  # the weight plane's transport, under one name
    "SnapshotBuffer",
    "WeightGroup",
    "WeightGroupSpec",
    "WeightLayout",
    "WeightManifest",
    "WeightStore",
    "digest",
    "digest_buckets",
    "plan_buckets",
    "snapshot",
]


class WeightGroup:
    """One member of a weight group. Rank 0 sends, all others receive.

    Life: `WeightGroup.host(spec)` on rank 0, `WeightGroup(spec)` elsewhere; `join`; `broadcast` any number of
    times; `close`. Calls come from one thread at a time, `abort` from any thread. After the first failure the
    group is dead: close it and form another.
    """

    def __init__(self, spec: WeightGroupSpec, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        if spec.backend == "nccl" and self.device.type != "cuda":
            raise WeightGroupError(f"group {spec.prefix}: nccl needs a cuda device, not {self.device}; use gloo")
        self._store: WeightStore | None = None
        self._group: Any = None
        self._aborted = threading.Event()
        self._broken: str | None = None

    @classmethod
    def host(cls, spec: WeightGroupSpec, device: torch.device | str = "cpu") -> WeightGroup:
        """Rank 0, with the store that the others will meet at; returns at once. Port 0 takes any free port.

        Raises:
            BindError: the store cannot listen at the address of the spec.
        """
        assert spec.rank == 0, spec
        store = WeightStore(spec.store_host, spec.store_port)
        group = cls(replace(spec, store_port=store.port), device)
        group._store = store
        return group

    @property
    def store_port(self) -> int:
        """Where the others meet rank 0."""
        return self.spec.store_port

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until all members are connected; at once when they already are.

        Args:
            timeout_s: None = `spec.timeout_s`.

        Raises:
            WeightGroupError: not all members came in time, or `abort` was called.
        """
        if self._group is not None:
            return
        spec = self.spec if timeout_s is None else replace(self.spec, timeout_s=timeout_s)
        self._check_alive("join")
        try:
            self._group = form_process_group(spec, self.device, self._aborted)
        except WeightGroupError as error:
            self._broken = str(error)
            raise

    def broadcast(self, flat: torch.Tensor, timeout_s: float) -> None:
        """Send `flat` from rank 0, or receive into it elsewhere; returns when its bytes are in place.

        After a failure the transport may write to `flat` until `close` has returned: throw the buffer away.

        Args:
            flat: contiguous, on the group's device; the same number of bytes on every member.

        Raises:
            WeightGroupError: a member vanished, the deadline passed, or `abort` was called.
        """
        what = f"broadcast of {flat.numel() * flat.element_size()} bytes in weight group {self.spec.prefix!r}"
        self._check_alive(what)
        if self._group is None:
            raise WeightGroupError(f"{what}: the group was not joined")
        if flat.device.type != self.device.type or not flat.is_contiguous():
            raise WeightGroupError(f"{what}: the buffer must be contiguous on {self.device}, is on {flat.device}")
        started = time.monotonic()
        try:
            if self.spec.backend == "gloo":
                self._broadcast_gloo(flat, timeout_s, what)
            else:
                self._broadcast_nccl(flat, timeout_s, what)
        except RuntimeError as error:
            self._broken = f"{what} failed after {time.monotonic() - started:.2f} s: {first_line(error)}"
            raise WeightGroupError(self._broken) from error
        except WeightGroupError as error:
            self._broken = str(error)
            raise

    def abort(self) -> None:
        """Make a `join` or `broadcast` under way in another thread fail. The group is dead; call `close` too.

        Raises:
            WeightGroupError: the nccl communicator could not be aborted in time. Replace the process: its
            CUDA
                context may be stuck.
        """
        self._aborted.set()
        self._broken = self._broken or "aborted"
        if self.spec.backend == "nccl" and self._group is not None:
            within(CLOSE_TIMEOUT_S, f"abort of weight group {self.spec.prefix!r}", self._group.abort)

    def close(self) -> None:
        """Disconnect; members still at work see a lost peer. Idempotent.

        Raises:
            WeightGroupError: the transport did not let go within its deadline.
        """
        self._aborted.set()
        self._broken = self._broken or "closed"
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._group is None:
            return
        holder = [self._group]
        self._group = None

        def release() -> None:
            group = holder.pop()
            if self.spec.backend == "nccl":
                group.abort()
            del group  # the destructor closes the connections; it waits for operations under way

        within(CLOSE_TIMEOUT_S, f"closing weight group {self.spec.prefix!r}", release)

    def _check_alive(self, what: str) -> None:
        if self._broken is not None:
            raise WeightGroupError(f"{what}: the group is dead ({self._broken}); form a new one")

    def _broadcast_gloo(self, flat: torch.Tensor, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        work = self._group.broadcast([flat], _broadcast_options(timeout_s))
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise WeightGroupError(f"{what}: a member did not take part within {timeout_s:g} s")
            try:
                work.wait(timedelta(seconds=min(remaining, POLL_S)))
                return
            except RuntimeError:
                # An expired slice and a failed transfer raise alike; only a failed one is also completed.
                if work.is_completed():
                    raise
            if self._aborted.is_set():
                raise WeightGroupError(f"{what}: aborted")

    def _broadcast_nccl(self, flat: torch.Tensor, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        group, device, options = self._group, self.device, _broadcast_options(timeout_s)

        def issue() -> Any:  # in a thread: on a communicator in trouble the call itself can block
            torch.cuda.set_device(device)
            return group.broadcast([flat], options)

        work = within(timeout_s, what, issue, self._aborted)
        while not work.is_completed():
            if self._aborted.wait(0.001):
                raise WeightGroupError(f"{what}: aborted")
            if time.monotonic() > deadline:
                # NCCL has no timeout for a collective: it waits for the dead until the communicator is
                # aborted.
                self.abort()
                raise WeightGroupError(f"{what}: a member did not take part within {timeout_s:g} s")
        failure = work.exception()
        if failure is not None:
            raise WeightGroupError(f"{what} failed: {failure}")


def _broadcast_options(timeout_s: float) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=max(timeout_s, 0.001))
    return options
