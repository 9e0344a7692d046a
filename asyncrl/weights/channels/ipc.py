"""Weights between processes that share a GPU, or on CPUs a machine: receivers copy out of the learner's own buffer.

Rank 0 says through the group's store where the bytes are (`ready/k`), each receiver maps that memory once, copies them
and says so (`taken/k/RANK`). Rank 0 goes on when all have. Whoever is dead is noticed by its process, whoever stands
still costs one deadline. Bytes that lie elsewhere (deltas) go through a shared buffer of the group's own.

The same code serves CPUs and GPUs; where the two differ is `weight_memory`. The store holds JSON and nothing else.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.bytes.memory import Opened, handle_of, place, shared_buffer, wait_written
from asyncrl.weights.channels.rendezvous import connect_store

POLL_FIRST_S, POLL_MAX_S = 0.0001, 0.005  # between questions to the store; its own wait logs a warning at every expiry


class IpcTransport:
    """One member's end. All calls run in threads that `WeightChannel` abandons if they overrun.

    Known: on a GPU a receiver that is killed costs the learner the group's own buffer, see `weight_memory`; that is up
    to twice the largest delta sent in the group, and nothing where only whole versions were sent.
    """

    def __init__(self, spec: ChannelSpec, device: torch.device, aborted: threading.Event) -> None:
        self._spec = spec
        self._device = device
        self._aborted = aborted
        self._store: Any = None
        self._peers: dict[int, _Process] = {}  # by rank: the receivers, or the learner
        self._rounds = 0
        self._opened: dict[str, Opened] = {}  # by handle: mapped once in the life of the group
        self._own: torch.Tensor | None = None
        self.waiting_for = "the store"

    # -- Transport -----------------------------------------------------------------------------------------------------

    def form(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self.waiting_for = "the store"
        self._store = connect_store(self._spec, timeout_s)
        mine = place(self._device)
        if self._spec.rank == 0:
            self._put("learner", {"pid": os.getpid(), "place": mine})
            for rank in range(1, self._spec.world_size):
                member = self._take(f"member/{rank}", rank, deadline)
                self._peers[rank] = _Process(int(member["pid"]))
            self._put("formed", {})
        else:
            learner = self._take("learner", 0, deadline)
            refusal = _differences(learner["place"], mine)
            self._put(f"member/{self._spec.rank}", {"pid": os.getpid(), "error": refusal})
            if refusal:
                raise ChannelError(refusal)
            self._peers[0] = _Process(int(learner["pid"]))  # not before: elsewhere the number means another process
            self._take("formed", 0, deadline)

    def broadcast(self, parts: Sequence[torch.Tensor], timeout_s: float, on_part: Callable[[int], None]) -> None:
        deadline = time.monotonic() + timeout_s
        for part in parts:
            flat = part.view(-1).view(torch.uint8)
            number, self._rounds = self._rounds, self._rounds + 1
            if self._spec.rank == 0:
                self._send(flat, number, deadline)
            else:
                self._receive(flat, number, deadline)
            on_part(part.nbytes)

    def abort(self) -> None:
        """Nothing: all waits look at the event."""

    def close(self) -> None:
        # Dropped, not closed: a call that was abandoned in the store still uses it, and it ends with that call.
        self._store, self._own = None, None
        self._opened.clear()
        self._peers.clear()

    # -- the two sides -------------------------------------------------------------------------------------------------

    def _send(self, flat: torch.Tensor, number: int, deadline: float) -> None:
        shared = handle_of(flat)
        if shared is None:
            shared = handle_of(self._copied(flat))
        assert shared is not None
        wait_written(flat, deadline)
        handle, offset = shared
        self._put(f"ready/{number}", {"handle": handle, "offset": offset, "bytes": flat.numel()})
        for rank in range(1, self._spec.world_size):
            self._take(f"taken/{number}/{rank}", rank, deadline)
        self._store.delete_key(f"ready/{number}")  # the last receiver has read it

    def _receive(self, flat: torch.Tensor, number: int, deadline: float) -> None:
        key = f"taken/{number}/{self._spec.rank}"
        ready = self._take(f"ready/{number}", 0, deadline)
        try:
            if ready["bytes"] != flat.numel():
                raise ChannelError(f"rank 0 sends {ready['bytes']} bytes, {flat.numel()} are expected")
            self._open(ready["handle"]).copy(ready["offset"], flat, deadline)
            self._check(deadline, "the copy")
        except Exception as error:
            self._put(key, {"error": str(error) or type(error).__name__})  # so that rank 0 does not wait in vain
            raise
        self._put(key, {})

    def _copied(self, flat: torch.Tensor) -> torch.Tensor:
        if self._own is None or self._own.numel() < flat.numel():
            # Twice as large as before: receivers keep what they mapped, which so stays below twice the largest.
            self._own = shared_buffer(1 << max(0, flat.numel() - 1).bit_length(), self._device)
        part = self._own[: flat.numel()]
        part.copy_(flat)
        return part

    def _open(self, handle: dict[str, Any]) -> Opened:
        key = json.dumps(handle, sort_keys=True)
        if key not in self._opened:
            self._opened[key] = Opened(handle, self._device)
        return self._opened[key]

    # -- the store -----------------------------------------------------------------------------------------------------

    def _put(self, key: str, value: dict[str, Any]) -> None:
        self.waiting_for = f"the store to take {key}"
        self._store.set(key, json.dumps(value))

    def _take(self, key: str, rank: int, deadline: float) -> dict[str, Any]:
        """The value that `rank` puts under `key`.

        Raises:
            ChannelError: it does not by `deadline`, its process ended, it reports an error, or the group was
                aborted.
        """
        self.waiting_for = what = f"{key} of rank {rank}"
        store, pause_s = self._store, POLL_FIRST_S
        while not store.check([key]):
            self._check(deadline, what)
            peer = self._peers.get(rank)
            if peer is not None and peer.ended:
                raise ChannelError(f"rank {rank} (process {peer.pid}) ended before {key}")
            self._aborted.wait(pause_s)
            pause_s = min(1.5 * pause_s, POLL_MAX_S)
        value = json.loads(store.get(key))
        if self._spec.rank == 0:
            store.delete_key(key)  # nobody else reads it, and the store would only ever grow
        self._check(deadline, what)  # the store may have stood still: what follows must not come late
        if value.get("error"):
            raise ChannelError(f"rank {rank}: {value['error']}")
        return value

    def _check(self, deadline: float, what: str) -> None:
        if self._aborted.is_set():
            raise ChannelError("aborted")
        if time.monotonic() > deadline:
            raise ChannelError(f"{what} did not come in time")


class _Process:
    """Another process of this machine, by a descriptor that stays its own when the number is given to another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._poll = select.poll()
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ChannelError(f"process {pid} ended while the group was formed") from None
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


def _differences(learner: dict[str, Any], mine: dict[str, Any]) -> str:
    """Why memory of the learner cannot be opened here; empty if it can."""
    for key, sentence in _PLACES.items():
        if learner.get(key) != mine[key]:
            return f"learner ({key} {learner.get(key)}) and generator ({mine[key]}) {sentence}, or use gloo or nccl"
    return ""
