"""Where weight channels meet, and how calls into torch get a deadline.

torch.distributed has no authentication: the store and the channels listen on one given (private) interface only.
Calls into torch that have no deadline of their own, or are known to overrun it, run in a daemon thread that is
abandoned when time is up (`within`). Measured: with the store's process stopped, `get` and `wait` of a client were
still blocked after 25 s although their timeout was 3 s.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's own, with their types

from asyncrl.errors import BindError, ChannelError
from asyncrl.host.addresses import listening_socket
from asyncrl.link.weight_records import ChannelSpec

_T = TypeVar("_T")

SLACK_S = 0.5  # how long an inner deadline has to name the fault before the outer one abandons the call
POLL_S = 0.1  # how soon a wait notices an abort
CLOSE_TIMEOUT_S = 10.0


class WeightStore:
    """The rendezvous of a weight channel, held by its rank 0: a TCPStore server bound to one interface.

    Several channels may share one, for their keys have a prefix each.

    gloo and NCCL use it to form the channel and for nothing else, and a formed channel outlives it; over ipc every part
    is announced and acknowledged through it. It is not a sign of life.

    Raises:
        BindError: host and port cannot be bound, or the store does not start there.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        # TCPStore by itself listens on every interface; a listening socket of our own keeps it to `host`.
        try:
            listener = listening_socket(host, port)
        except OSError as error:
            raise BindError(
                f"weight store cannot listen on {host}:{port} ({error}); "
                "give an address of this machine and a free port, or port 0"
            ) from error
        self.port: int = listener.getsockname()[1]
        try:
            self._server: TCPStore | None = TCPStore(
                host_name=host,
                port=self.port,
                world_size=None,
                is_master=True,
                timeout=timedelta(seconds=CLOSE_TIMEOUT_S),
                wait_for_workers=False,
                multi_tenant=False,
                master_listen_fd=listener.detach(),  # the store owns it from here on, also when it fails
                use_libuv=True,
            )
        except RuntimeError as error:
            raise BindError(f"weight store does not start on {host}:{self.port}: {first_line(error)}") from error

    def close(self) -> None:
        """Stop listening. Formed channels over gloo and NCCL go on, those over ipc do not."""
        self._server = None


def connect_store(spec: ChannelSpec, timeout_s: float) -> Store:
    """A new connection to the channel's store, its keys below the channel's prefix.

    Every member, rank 0 too, has its own: a blocked call on a shared one blocks all others.
    """
    client = TCPStore(
        host_name=spec.store_host,
        port=spec.store_port,
        world_size=None,
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    return PrefixStore(spec.prefix, client)


def local_address_towards(spec: ChannelSpec) -> str:
    """The address of this host from which the channel's store is reached."""
    family, kind, proto, _, address = socket.getaddrinfo(spec.store_host, spec.store_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)  # a datagram socket: nothing is sent, the kernel only picks the route
        return str(probe.getsockname()[0])


def within(
    timeout_s: float,
    what: str,
    call: Callable[[], _T],
    cancelled: threading.Event | None = None,
    waiting_for: Callable[[], str] | None = None,
) -> _T:
    """Run `call` in a daemon thread; give up on it when time is up or `cancelled` is set.

    Args:
        timeout_s: how long to wait for the call.
        what: begins the text of errors.
        call: may hang.
        cancelled: ends the wait early; the call is abandoned.
        waiting_for: what the call hangs in, asked when it is abandoned.

    Raises:
        ChannelError: the call failed with a ChannelError, RuntimeError or OSError, or did not return in time. Any other
            error of the call is raised as it is.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller raises it again in its own thread
            failure.append(error)

    thread = threading.Thread(target=run, name=f"asyncrl: {what}"[:60], daemon=True)
    started = time.monotonic()
    thread.start()
    while thread.is_alive():
        remaining = started + timeout_s - time.monotonic()
        if remaining <= 0:
            waited = f", waiting for {waiting_for()}" if waiting_for else ""
            raise ChannelError(f"{what}: no answer within {timeout_s:.3g} s{waited}; the call was abandoned")
        if cancelled is not None and cancelled.is_set():
            raise ChannelError(f"{what}: aborted")
        thread.join(min(remaining, POLL_S))
    if not failure:
        return result[0]
    error = failure.pop()
    if isinstance(error, (RuntimeError, OSError, ChannelError)):
        elapsed_s = time.monotonic() - started
        # Without its frames: they hold the transport's objects, and a connection closes only when nothing holds it.
        cause = error.with_traceback(None)
        raise ChannelError(f"{what} failed after {elapsed_s:.2f} s: {first_line(error)}") from cause
    raise error


def first_line(error: BaseException) -> str:
    """The first line of an error's text: torch appends stack traces of C++."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
