"""Where weight groups meet and how their process groups come to be, under deadlines.

torch.distributed has no authentication: the store and the groups listen on one given (private) interface
only. Calls into torch that have no deadline of their own, or are known to overrun it, run in a daemon thread
that is abandoned when time is up (`within`). Measured: with the store's process stopped, `get` and `wait` of
a client were still blocked after 25 s although their timeout was 3 s.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asyncrl.errors import BindError, ProtocolError, WeightGroupError

_T = TypeVar("_T")

SLACK_S = 0.5  # how long an inner deadline has to name the fault before the outer one abandons the call
POLL_S = 0.1  # how soon a wait notices an abort
CLOSE_TIMEOUT_S = 10.0
BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True, slots=True)
class WeightGroupSpec:
    """Where a group meets. Rank 0 is the learner; a generator's tensor-parallel workers take consecutive
    ranks.

    `prefix` names the group in the store and must never be used twice, also not after a failure.
    `timeout_s` bounds the forming of the group.
    """

    store_host: str
    store_port: int
    prefix: str
    rank: int
    world_size: int
    backend: str
    timeout_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values: fit for msgpack."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightGroupSpec:
        """Read what a peer sent.

        Raises:
            ProtocolError: a field is missing or out of range.
        """
        try:
            spec = cls(
                store_host=str(data["store_host"]),
                store_port=int(data["store_port"]),
                prefix=str(data["prefix"]),
                rank=int(data["rank"]),
                world_size=int(data["world_size"]),
                backend=str(data["backend"]),
                timeout_s=float(data["timeout_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"weight group spec is malformed: {error!r}") from error
        if spec.backend not in BACKENDS or not 0 <= spec.rank < spec.world_size or not spec.timeout_s > 0:
            raise ProtocolError(f"weight group spec is out of range: {spec}; backends are {BACKENDS}")
        return spec

    def for_rank(self, rank: int) -> WeightGroupSpec:
        """The same group seen from another rank."""
        return replace(self, rank=rank)


class WeightStore:
    """The rendezvous of all weight groups of one learner: a TCPStore server bound to one interface.

    It is used to form groups and for nothing else; it is not a sign of life.

    Raises:
        BindError: host and port cannot be bound.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        # TCPStore by itself listens on every interface; a listening socket of our own keeps it to `host`.
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(256)
        except OSError as error:
            raise BindError(
                f"weight store cannot listen on {host}:{port} ({error}); "
                "give an address of this machine and a free port, or port 0"
            ) from error
        self.host = host
        self.port: int = listener.getsockname()[1]
        self._server: dist.TCPStore | None = dist.TCPStore(
            host_name=host,
            port=self.port,
            world_size=None,
            is_master=True,
            timeout=timedelta(seconds=CLOSE_TIMEOUT_S),
            wait_for_workers=False,
            multi_tenant=False,
            master_listen_fd=listener.detach(),  # the store owns it from here on
            use_libuv=True,
        )

    def close(self) -> None:
        """Stop listening. Groups already formed go on."""
        self._server = None


def form_process_group(spec: WeightGroupSpec, device: torch.device, cancelled: threading.Event) -> Any:
    """A ProcessGroupGloo or ProcessGroupNCCL with all members of `spec` connected.

    Raises:
        WeightGroupError: not all members came within `spec.timeout_s`, or `cancelled` was set.
    """
    form = _form_gloo if spec.backend == "gloo" else _form_nccl
    what = (
        f"forming weight group {spec.prefix!r} as rank {spec.rank} of {spec.world_size} "
        f"at {spec.store_host}:{spec.store_port}"
    )
    return within(spec.timeout_s + SLACK_S, what, lambda: form(spec, device), cancelled)


def _connect_store(spec: WeightGroupSpec) -> dist.Store:
    # Every member, rank 0 too, has its own connection: a blocked call on a shared one blocks all others.
    client = dist.TCPStore(
        host_name=spec.store_host,
        port=spec.store_port,
        world_size=None,
        is_master=False,
        timeout=timedelta(seconds=spec.timeout_s),
        wait_for_workers=False,
    )
    return dist.PrefixStore(spec.prefix, client)


def _form_gloo(spec: WeightGroupSpec, device: torch.device) -> Any:
    options = dist.ProcessGroupGloo._Options()
    # The interface that reaches the store is the private one; gloo by itself would ask the host's name.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_local_address_towards(spec))]
    options._timeout = timedelta(seconds=spec.timeout_s)
    options._threads = 1
    return dist.ProcessGroupGloo(_connect_store(spec), spec.rank, spec.world_size, options)


def _form_nccl(spec: WeightGroupSpec, device: torch.device) -> Any:
    torch.cuda.set_device(device)  # this is a fresh thread
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=False)
    options.config.blocking = 0  # abort is safe on non-blocking communicators only
    options._timeout = timedelta(seconds=spec.timeout_s)
    environment = {
        # A lost generator must not end the learner: no watchdog, no teardown of the process on error.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(max(1, round(spec.timeout_s))),
    }
    with _environment(environment):
        group = dist.ProcessGroupNCCL(_connect_store(spec), spec.rank, spec.world_size, options)
        group.eager_connect_single_device(device)  # connect now, under the forming deadline
    return group


def _local_address_towards(spec: WeightGroupSpec) -> str:
    family, kind, proto, _, address = socket.getaddrinfo(spec.store_host, spec.store_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent, the kernel only picks the route
        return probe.getsockname()[0]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def within(timeout_s: float, what: str, call: Callable[[], _T], cancelled: threading.Event | None = None) -> _T:
    """Run `call` in a daemon thread; give up on it when time is up or `cancelled` is set.

    Raises:
        WeightGroupError: it failed, or it did not return within `timeout_s`.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, in its thread
            failure.append(error)

    thread = threading.Thread(target=run, name=f"asyncrl: {what}"[:60], daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive():
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise WeightGroupError(f"{what}: no answer within {timeout_s:g} s; the call was abandoned")
        if cancelled is not None and cancelled.is_set():
            raise WeightGroupError(f"{what}: aborted")
        thread.join(min(remaining, POLL_S))
    if not failure:
        return result[0]
    if isinstance(failure[0], (RuntimeError, OSError)):
        raise WeightGroupError(f"{what}: {first_line(failure[0])}") from failure[0]
    raise failure[0]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
