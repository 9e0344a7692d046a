"""Weights between processes that share a GPU, or on CPUs a machine: receivers copy out of the learner's own buffer.

A sender says through the channel's store where the bytes are (`ready/k`); each receiver maps that memory once, copies
the bytes and says so (`taken/k/RANK`). The sender goes on when all have; other senders pay no heed to it. The death of
a member is noticed by its process; a member that stands still costs one deadline. Bytes that lie elsewhere (deltas) go
through a shared buffer that belongs to the channel.

The same code serves CPUs and GPUs; `weights.bytes.memory` knows where the two differ. The store holds JSON alone.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch._C._distributed_c10d import Store

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.bytes.memory import Handle, Opened, Place, handle_of, place, shared_buffer, wait_written
from asyncrl.weights.channels.rendezvous import connect_store

POLL_FIRST_S, POLL_MAX_S = 0.0001, 0.005  # between questions to the store; its own wait logs a warning at every expiry


_RecordT = TypeVar("_RecordT", bound="_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """What a member stores under a key, as JSON. An error ends the channel for the member that takes it."""

    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joined(_Record):
    """A member is here, in this process."""

    pid: int
    place: dict[str, int | str]  # a `Place`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready(_Record):
    """A part can be copied: `num_bytes` from `offset` in the memory that `handle` leads to."""

    handle: Handle
    offset: int
    num_bytes: int


class IpcTransport:
    """One member's end. All calls run in threads that `WeightChannel` abandons if they overrun.

    Known: on a GPU a receiver that is killed costs the learner the channel's own buffer, see `weights.bytes.memory`;
    that is up to twice the largest delta sent in the channel, and nothing where only whole versions were sent.
    """

    def __init__(self, spec: ChannelSpec, device: torch.device, aborted: threading.Event) -> None:
        self._spec = spec
        self._device = device
        self._aborted = aborted
        self._store: Store | None = None
        self._peers: dict[int, _Process] = {}  # by rank: the receivers, or the senders
        self._rounds = 0
        self._opened: dict[str, Opened] = {}  # by handle: mapped once in the life of the channel
        self._own: torch.Tensor | None = None
        self.waiting_for = "the store"

    # -- Transport -----------------------------------------------------------------------------------------------------

    def form(self, timeout_s: float) -> None:
        """See `Transport.form`. A member in a place from which memory cannot be opened is refused, on both sides."""
        deadline = time.monotonic() + timeout_s
        self.waiting_for = "the store"
        self._store = connect_store(self._spec, timeout_s)
        mine, rank = self._place(), self._spec.rank
        joined = _Joined(pid=os.getpid(), place=asdict(mine))
        if rank < self._spec.senders:
            self._put(f"sender/{rank}", joined)
            for member in self._receivers():
                self._peers[member] = _Process(self._take(f"member/{member}/{rank}", member, deadline, _Joined).pid)
            self._put(f"formed/{rank}", _Record())
            return
        senders = [self._take(f"sender/{s}", s, deadline, _Joined) for s in range(self._spec.senders)]
        refusal = next(filter(None, (_differences(sender.place, mine) for sender in senders)), "")
        for sender in range(self._spec.senders):
            self._put(f"member/{rank}/{sender}", replace(joined, error=refusal))
        if refusal:
            raise ChannelError(refusal)
        for sender, there in enumerate(senders):
            self._peers[sender] = _Process(there.pid)  # not before: elsewhere the number means another process
            self._take(f"formed/{sender}", sender, deadline, _Record)

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None],
        senders: Sequence[int],
    ) -> None:
        """See `Transport.broadcast`."""
        deadline = time.monotonic() + timeout_s
        rank = self._spec.rank
        for part, sender in zip(parts, senders, strict=True):
            flat = part.view(-1).view(torch.uint8)
            number, self._rounds = self._rounds, self._rounds + 1
            if rank == sender:
                self._send(flat, number, deadline)
            elif rank >= self._spec.senders:
                self._receive(flat, number, sender, deadline)
            on_part(part.nbytes)

    def abort(self) -> None:
        """Nothing: all waits look at the event."""

    def close(self) -> None:
        """See `Transport.close`."""
        # Dropped, not closed: a call that was abandoned in the store still uses it, and it ends with that call.
        self._store = None
        self._own = None
        self._opened.clear()
        self._peers.clear()

    def _place(self) -> Place:
        return place(self._device)

    # -- the two ends --------------------------------------------------------------------------------------------------

    def _send(self, flat: torch.Tensor, number: int, deadline: float) -> None:
        shared = handle_of(flat)
        if shared is None:
            shared = handle_of(self._copied(flat))
        assert shared is not None
        wait_written(flat, deadline)
        handle, offset = shared
        self._put(f"ready/{number}", _Ready(handle=handle, offset=offset, num_bytes=flat.numel()))
        for rank in self._receivers():
            self._take(f"taken/{number}/{rank}", rank, deadline, _Record)
        assert self._store is not None
        self._store.delete_key(f"ready/{number}")  # the last receiver has read it

    def _receivers(self) -> range:
        return range(self._spec.senders, self._spec.world_size)

    def _receive(self, flat: torch.Tensor, number: int, sender: int, deadline: float) -> None:
        key = f"taken/{number}/{self._spec.rank}"
        ready = self._take(f"ready/{number}", sender, deadline, _Ready)
        try:
            self._copy(ready, flat, sender, deadline)
        except Exception as error:
            # Whatever it is, the sender must not wait in vain.
            self._put(key, _Record(error=str(error) or type(error).__name__))
            raise
        self._put(key, _Record())

    def _copy(self, ready: _Ready, flat: torch.Tensor, sender: int, deadline: float) -> None:
        if ready.num_bytes != flat.numel():
            raise ChannelError(f"rank {sender} sends {ready.num_bytes} bytes, {flat.numel()} are expected")
        self._open(ready.handle).copy(ready.offset, flat, deadline)
        self._check(deadline, "the copy")

    def _copied(self, flat: torch.Tensor) -> torch.Tensor:
        if self._own is None or self._own.numel() < flat.numel():
            # Twice as large as before: receivers keep what they mapped, which so stays below twice the largest.
            self._own = shared_buffer(1 << max(0, flat.numel() - 1).bit_length(), self._device)
        part = self._own[: flat.numel()]
        part.copy_(flat)
        return part

    def _open(self, handle: Handle) -> Opened:
        key = json.dumps(handle, sort_keys=True)
        if key not in self._opened:
            self._opened[key] = Opened(handle, self._device)
        return self._opened[key]

    # -- the store -----------------------------------------------------------------------------------------------------

    def _put(self, key: str, record: _Record) -> None:
        self.waiting_for = f"the store to take {key}"
        assert self._store is not None
        self._store.set(key, json.dumps(asdict(record)))

    def _take(self, key: str, rank: int, deadline: float, kind: type[_RecordT]) -> _RecordT:
        """The record that `rank` puts under `key`.

        Raises:
            ChannelError: it does not by `deadline`, its process ended, it reports an error, or the channel was aborted.
        """
        self.waiting_for = what = f"{key} of rank {rank}"
        store, pause_s = self._store, POLL_FIRST_S
        assert store is not None
        while not store.check([key]):
            self._check(deadline, what)
            peer = self._peers.get(rank)
            if peer is not None and peer.ended:
                raise ChannelError(f"rank {rank} (process {peer.pid}) ended before {key}")
            self._aborted.wait(pause_s)
            pause_s = min(1.5 * pause_s, POLL_MAX_S)
        text = store.get(key)
        if self._spec.rank < self._spec.senders:
            store.delete_key(key)  # nobody else reads it, and the store would only ever grow
        self._check(deadline, what)  # the store may have stood still: what follows must not come late
        try:
            record = kind(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ChannelError(f"{what} is malformed: {error}; all members must run one version") from None
        if record.error:
            raise ChannelError(f"rank {rank}: {record.error}")
        return record

    def _check(self, deadline: float, what: str) -> None:
        if self._aborted.is_set():
            raise ChannelError("aborted")
        if time.monotonic() > deadline:
            raise ChannelError(f"{what} did not come in time")


class _Process:
    """Another process of this machine, by a descriptor: a number may be given to a new process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._poll = select.poll()
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ChannelError(f"process {pid} ended while the channel was formed") from None
        except OSError:
            return  # a sandbox without pidfds: the death of a member then costs the deadline, as a hang does
        self._poll.register(self._fd, select.POLLIN)

    @property
    def ended(self) -> bool:
        return bool(self._poll.poll(0))

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


_PLACES = {
    "machine": "run on two machines; only learner and generators of one machine share memory",
    "pid_namespace": "run in two PID namespaces (containers); give them one",
    "user": "run as two users; run them as one",
    "device": "use two devices; put both on one GPU, or both on the CPU",
}


def _differences(learner: dict[str, int | str], mine: Place) -> str:
    """Why memory of the learner cannot be opened here; empty if it can."""
    here = asdict(mine)
    for key, sentence in _PLACES.items():
        if learner.get(key) != here[key]:
            return f"learner ({key} {learner.get(key)}) and generator ({here[key]}) {sentence}, or use gloo or nccl"
    return ""
