"""The ranks of a trainer as one: where they meet, how rank 0 tells the others what to do, what they add up.

    rank 0   talks to the desk, plans each step, tells   ──┐  control group: gloo over one interface
    others   wait for an order, follow it, wait again    ──┘

Every rank makes the same calls in the same order. Rank 0 repeats `Order.WAIT` while it has nothing to do, so that a
rank that hears nothing for DEADLINE_S knows that rank 0 is gone: no wait here is without a deadline.

Models have a process group of their own, torch's default one: gloo between CPUs, NCCL between GPUs. Parts of that are
    sequence groups   neighbouring ranks that have the same share, and compute a slice of its tokens each
    replicas          neighbouring ranks that hold one copy of a model, a slice of every tensor each
    counterparts      ranks of all replicas that hold the same slices
How ranks share sequences and how they hold a model are two questions: either group may be the larger one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's own, with their types

from asyncrl.algorithms.reducer import Reducer
from asyncrl.errors import BindError, PeerUnreachable, RankLost
from asyncrl.host.addresses import interface_towards, listening_socket
from asyncrl.link.trainer_link import STORE_FD
from asyncrl.weights.channels.rendezvous import first_line

DEADLINE_S = 60.0  # of one collective: a rank that is late by that much counts as lost
FORM_TIMEOUT_S = 300.0  # of the start: imports and the loading of a model differ by disk and host
KEEP_ALIVE_S = 5.0
LAST_NOTES_S = 3.0  # how long a rank that lost another one waits for the notes of the others
LOOPBACK = "lo"


class Order(IntEnum):
    """What rank 0 tells the others to do next."""

    WAIT = 0  # nothing: rank 0 is alive
    STEP = 1
    PUBLISH = 2  # the policy as it is now; the number is that of the publisher's slot
    OPEN_PUBLISHER = 3
    CHECKPOINT = 4
    EXPORT = 5
    CHECK = 6  # that no rank differs
    STOP = 7


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank a process is, and where the ranks meet; from the variables of torch's rendezvous by environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    listen_fd: int | None = None  # rank 0: the socket at which the store listens; None: it binds host and port itself

    @classmethod
    def from_environment(cls) -> RankPlace:
        """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; one rank where they are not set."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(local_rank=int(os.environ.get("LOCAL_RANK", "0")))
        return cls(
            rank=int(os.environ["RANK"]),
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            host=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            listen_fd=int(fd) if (fd := os.environ.get(STORE_FD)) else None,
        )


class World:
    """One rank's connection to the others. With one rank every method is there and does nothing.

    `sum`, `largest` and `gather` are what `algorithms.reducer` asks for: whole-batch quantities need no more.
    """

    def __init__(self, place: RankPlace, store: Store | None = None, control: Any = None) -> None:
        self.rank = place.rank
        self.size = place.size
        self.local_rank = place.local_rank
        self._place = place
        self._timeout = timedelta(seconds=FORM_TIMEOUT_S)  # of what is sent from one rank to another
        self._store = store
        self._control = control
        self.sequence_ranks = 1  # how many share the tokens of one micro-batch
        self.sequence_group: Any = None  # those that this rank shares them with; None with one
        self.num_replicas = 1
        self.replica_group: Any = None  # the ranks of this one's replica; None where there is one replica
        self.counterpart_group: Any = None  # those that hold the same slices; None where there is one replica
        # What is entered for as long as rank 0 waits for the others and for nothing else; for its time ledger.
        self.meeting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def alone(cls) -> World:
        """The world of one rank."""
        return cls(RankPlace())

    @classmethod
    def form(cls, place: RankPlace, device: torch.device, *, timeout_s: float = FORM_TIMEOUT_S) -> World:
        """Meets the other ranks and makes both process groups.

        Raises BindError when the store cannot listen, PeerUnreachable when there is none in time, RankLost when not all
        ranks come in time.
        """
        if place.size == 1:
            return cls(place)
        assert device.type != "cuda" or device.index == torch.cuda.current_device(), "set_device must come first"
        with _lost(f"rank {place.rank} of {place.size} found not all others at {place.host}:{place.port}"):
            store = _open_store(place, timeout_s)
            _take_seat(store, place.rank)
            # gloo would ask for the address of the host's name otherwise, and may end on a public network. For NCCL the
            # process was started with an interface (`nccl_environment`).
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(place.host) or LOOPBACK)
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("ranks", store),
                rank=place.rank,
                world_size=place.size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            world = cls(place, store, control)
            world.sum(torch.zeros(1))  # all connections stand before the deadlines become short
        return world

    def hurry(self) -> None:
        """From now on a collective may take DEADLINE_S: models are loaded, and ranks go in step."""
        if self.size > 1:
            self._barrier()
            self._timeout = timedelta(seconds=DEADLINE_S)
            parts = [self.sequence_group, self.replica_group, self.counterpart_group]
            for group in [self._control, dist.group.WORLD, *(part for part in parts if part is not None)]:
                dist.distributed_c10d._set_pg_timeout(self._timeout, group)

    def share_sequences(self, count: int) -> None:
        """Has every `count` neighbouring ranks share the tokens of micro-batches. All ranks call this, and once."""
        assert self.size % count == 0 and self.sequence_ranks == 1, (self.size, count)
        if count > 1:
            self.sequence_ranks = count
            self.sequence_group = self._own_part([range(n, n + count) for n in range(0, self.size, count)])

    def hold_replicas(self, count: int) -> None:
        """Has the ranks hold `count` copies of each model. All ranks call this, and once, before a model is sharded."""
        assert self.size % count == 0 and self.num_replicas == 1, (self.size, count)
        if count > 1:
            self.num_replicas = count
            slices = self.size // count
            self.replica_group = self._own_part([range(n, n + slices) for n in range(0, self.size, slices)])
            self.counterpart_group = self._own_part([range(n, self.size, slices) for n in range(slices)])

    def first_counterpart(self, rank: int) -> int:
        """The rank of the first replica that holds the same slices as `rank`."""
        return rank % (self.size // self.num_replicas)

    def _own_part(self, parts: Sequence[range]) -> Any:
        """The group of that part of the ranks to which this one belongs."""
        own = None
        with _lost("the ranks cannot make groups among them"):
            for part in parts:  # all ranks make every group, in the same order
                group = dist.new_group(list(part), timeout=self._timeout)
                if self.rank in part:
                    own = group
        return own

    @property
    def num_shares(self) -> int:
        """Shares that a plan is dealt into: one for each sequence group, or for each rank."""
        return self.size // self.sequence_ranks

    def share_of(self, rank: int) -> int:
        """Number of the share that `rank` trains on."""
        return rank // self.sequence_ranks

    @property
    def data_ranks(self) -> Reducer:
        """Reduces what ranks know of their shares; what a sequence group knows alike counts once."""
        return self if self.sequence_ranks == 1 else _DataRanks(self)

    def new_group(self, timeout_s: float) -> Any:
        """Another gloo group of all ranks, for one user beside training; None with one rank. All ranks call this."""
        if self.size == 1:
            return None
        with _lost("the ranks cannot make another group"):
            return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Leaves both groups, in step with the others."""
        if self.size > 1 and dist.is_initialized():
            with contextlib.suppress(RankLost):
                self._barrier()
            dist.destroy_process_group()

    # -- orders ----------------------------------------------------------------------------------------------------

    def tell(self, order: Order, number: int = 0) -> None:
        """Rank 0: tells all others what to do next."""
        if self.size > 1:
            assert self.rank == 0, self.rank
            with _lost(f"rank 0 cannot tell the others to {order.name.lower()}"):
                dist.broadcast(torch.tensor([int(order), number], dtype=torch.int64), 0, group=self._control)

    def listen(self) -> tuple[Order, int]:
        """Others: the next order and its number, WAIT left out. Raises RankLost when rank 0 falls silent."""
        assert self.rank > 0, "rank 0 gives the orders"
        message = torch.empty(2, dtype=torch.int64)
        with _lost(f"rank {self.rank} hears nothing of rank 0"):
            while True:
                dist.broadcast(message, 0, group=self._control)
                order, number = message.tolist()
                if order != Order.WAIT:
                    return Order(order), number

    @contextlib.contextmanager
    def others_wait(self) -> Iterator[None]:
        """Rank 0 does something alone that may take long; a thread tells the others that it is alive."""
        if self.size == 1:
            yield
            return
        done = threading.Event()
        failure: list[BaseException] = []

        def keep_alive() -> None:
            try:
                while not done.wait(KEEP_ALIVE_S):
                    self.tell(Order.WAIT)
            except RankLost as error:
                failure.append(error)

        thread = threading.Thread(target=keep_alive, name="keep-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        if failure:
            raise failure[0]

    # -- data ------------------------------------------------------------------------------------------------------

    def scatter(self, parts: Sequence[bytes] | None) -> bytes:
        """Gives each rank its part; rank 0 has them all, in the order of ranks, the others bring None."""
        if self.size == 1:
            assert parts is not None
            return parts[0]
        with self.meeting(), _lost(f"rank {self.rank} of {self.size} in the scattering of a batch"):
            if self.rank == 0:
                assert parts is not None and len(parts) == self.size
                sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64)
                dist.broadcast(sizes, 0, group=self._control)
                sent = [
                    dist.isend(torch.frombuffer(bytearray(part), dtype=torch.uint8), rank, group=self._control)
                    for rank, part in enumerate(parts)
                    if rank
                ]
                for work in sent:
                    assert work is not None, "every rank is in the control group"
                    work.wait(self._timeout)
                return parts[0]
            sizes = torch.empty(self.size, dtype=torch.int64)
            dist.broadcast(sizes, 0, group=self._control)
            own = torch.empty(int(sizes[self.rank]), dtype=torch.uint8)
            work = dist.irecv(own, 0, group=self._control)
            assert work is not None, "every rank is in the control group"
            work.wait(self._timeout)
            return own.numpy().tobytes()

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of all ranks' `values`, on the device they came from."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum of all ranks' `values`; NaN is not kept."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return values
        with _lost(f"rank {self.rank} of {self.size} in a reduction"):
            own = values.detach().cpu().clone(memory_format=torch.contiguous_format)  # waits for a GPU, not for a rank
            with self.meeting():
                dist.all_reduce(own, op=operation, group=self._control)
        return own.to(values.device)

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """All ranks' `values` [N of each], one after the other, and where this rank's begin."""
        if self.size == 1:
            return values, 0
        with _lost(f"rank {self.rank} of {self.size} in a gathering"):
            counts = torch.zeros(self.size, dtype=torch.int64)
            counts[self.rank] = len(values)
            own = values.detach().cpu()
            with self.meeting():
                dist.all_reduce(counts, group=self._control)
                padded = torch.zeros(int(counts.max()), dtype=values.dtype)
                padded[: len(values)] = own
                parts = [torch.empty_like(padded) for _ in range(self.size)]
                dist.all_gather(parts, padded, group=self._control)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
        return whole.to(values.device), int(counts[: self.rank].sum())

    def gather_row(self, values: Sequence[int]) -> list[list[int]]:
        """Each rank's row of int64 numbers, in the order of ranks; all rows are of one length."""
        row = torch.tensor(list(values), dtype=torch.int64)
        whole, _ = self.gather(row)
        rows: list[list[int]] = whole.reshape(self.size, -1).tolist()
        return rows

    def first_difference(self, own: Mapping[str, int], compared_with: Callable[[int], int]) -> str | None:
        """The first thing in which a rank's numbers differ from those of another, in words. All ranks call this.

        compared_with  the rank that must have the same as a given one
        """
        names = sorted(own)
        rows = self.gather_row([zlib.crc32(repr(names).encode()), *(own[name] for name in names)])
        for rank, row in enumerate(rows):
            other = compared_with(rank)
            for name, theirs, expected in zip(("what there is to compare", *names), row, rows[other], strict=True):
                if theirs != expected:
                    return f"trainer rank {rank} and rank {other} differ in {name} ({theirs:#x} and {expected:#x})"
        return None

    def _barrier(self) -> None:
        self.sum(torch.zeros(1))

    # -- the end of a rank -----------------------------------------------------------------------------------------

    def silent_ranks(self) -> list[int]:
        """After a loss: the ranks that did not note within LAST_NOTES_S that they, too, have lost another one."""
        if self._store is None:
            return []
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store = _client(self._place, LAST_NOTES_S)
            store.set(f"lost/{self.rank}", "1")
            deadline = time.monotonic() + LAST_NOTES_S
            while time.monotonic() < deadline and not store.check([f"lost/{rank}" for rank in others]):
                threading.Event().wait(0.1)
            return [rank for rank in others if not store.check([f"lost/{rank}"])]
        except RuntimeError:
            return [0]  # it holds the store


class _DataRanks:
    """The first rank of each sequence group speaks for it; all hear what comes of it, and so all hear the same."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._speaks = world.rank % world.sequence_ranks == 0

    def sum(self, values: Tensor) -> Tensor:
        """See `Reducer.sum`."""
        return self._world.sum(values if self._speaks else torch.zeros_like(values))

    def largest(self, values: Tensor) -> Tensor:
        """See `Reducer.largest`."""
        return self._world.largest(values)

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """See `Reducer.gather`."""
        whole, start = self._world.gather(values if self._speaks else values[:0])
        return whole, start if self._speaks else start - len(values)


def is_loss(error: BaseException) -> bool:
    """Whether torch's error says that another rank is gone or late: models' collectives raise it in any place."""
    if isinstance(error, dist.DistError | RankLost):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "nccl" in str(error).lower())


def _open_store(place: RankPlace, timeout_s: float) -> Store:
    """The store of rendezvous: rank 0 holds it, all others connect."""
    if place.rank:
        try:
            return _client(place, timeout_s)
        except RuntimeError as error:
            raise PeerUnreachable(
                f"no learner answered at {place.host}:{place.port} within {timeout_s:.0f} s; see weights.host and "
                f"learner.port: {first_line(error)}"
            ) from error
    fd = place.listen_fd
    if fd is None:
        fd = _listen(place.host, place.port)
    return TCPStore(
        host_name=place.host,
        port=place.port,
        world_size=None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=False,
        master_listen_fd=fd,
        use_libuv=True,
    )


def _client(place: RankPlace, timeout_s: float) -> TCPStore:
    return TCPStore(
        host_name=place.host,
        port=place.port,
        world_size=None,
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _listen(host: str, port: int) -> int:
    """A listening socket of our own: TCPStore by itself would listen on every interface."""
    try:
        return listening_socket(host, port).detach()
    except OSError as error:
        raise BindError(f"trainer ranks cannot meet at {host}:{port} ({error}); choose a free port") from error


def _take_seat(store: Store, rank: int) -> None:
    """Refuses a second process of one rank: it belongs to the next world, whose store is not there yet."""
    if store.add(f"seat/{rank}", 1) != 1:
        raise RankLost(f"these ranks have a rank {rank} already, whose world has not ended yet")


@contextlib.contextmanager
def _lost(what: str) -> Iterator[None]:
    """Torch's errors of a connection become RankLost."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"{what}: {first_line(error)}") from error
