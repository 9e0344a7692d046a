"""Weight channels: the learner broadcasts, workers of generators receive.

A channel has a store connection and a key prefix of its own, and a transport that does the work (`TRANSPORTS`). A
prefix is never used twice: a second channel on the keys of a broken one would join half of its dead members.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.base import Transport
from asyncrl.weights.channels.collectives import GlooTransport, NcclTransport
from asyncrl.weights.channels.ipc import IpcTransport
from asyncrl.weights.channels.rendezvous import CLOSE_TIMEOUT_S, SLACK_S, WeightStore, within

# By the name that `weights.backend` gives.
TRANSPORTS: Mapping[str, type[Transport]] = {"gloo": GlooTransport, "nccl": NcclTransport, "ipc": IpcTransport}


class WeightChannel:
    """One member of a weight channel. The ranks below `spec.senders` send, all others receive.

    Life: `WeightChannel.host(spec)` on rank 0, `WeightChannel(spec)` elsewhere; `join`; `broadcast` any number of
    times; `close`. Calls come from one thread at a time, `abort` from any thread. After the first failure the
    channel is dead: close it and form another. Every call ends at its deadline, whatever the transport does.

    Args:
        spec: where the members meet, and which of them this is.
        device: of all tensors that are broadcast.
        transports: the backends there are, by name.
        close_timeout_s: bounds `abort` and `close`.

    Raises:
        ChannelError: no such backend, or it cannot work on `device`.
    """

    def __init__(
        self,
        spec: ChannelSpec,
        device: torch.device | str = "cpu",
        *,
        transports: Mapping[str, type[Transport]] = TRANSPORTS,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._close_timeout_s = close_timeout_s
        self._store: WeightStore | None = None
        self._aborted = threading.Event()
        self._broken: str | None = None
        self._joined = False
        transport = transports.get(spec.backend)
        if transport is None:
            raise ChannelError(f"{self._name}: backend {spec.backend!r} is none of {sorted(transports)}")
        try:
            self._transport: Transport | None = transport(spec, self.device, self._aborted)
        except ChannelError as error:
            raise ChannelError(f"{self._name}: {error}") from None

    @classmethod
    def host(
        cls,
        spec: ChannelSpec,
        device: torch.device | str = "cpu",
        *,
        shared_store: WeightStore | None = None,
        transports: Mapping[str, type[Transport]] = TRANSPORTS,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> WeightChannel:
        """Rank 0, with the store that the others will meet at; returns at once. Port 0 takes any free port.

        `shared_store` serves several channels and is the caller's to close; without it the channel has one of its own.

        Raises:
            BindError: the store cannot listen at the address of the spec.
            ChannelError: as for any member.
        """
        assert spec.rank == 0, spec
        if shared_store is not None:
            here = replace(spec, store_port=shared_store.port)
            return cls(here, device, transports=transports, close_timeout_s=close_timeout_s)
        store = WeightStore(spec.store_host, spec.store_port)
        try:
            here = replace(spec, store_port=store.port)
            channel = cls(here, device, transports=transports, close_timeout_s=close_timeout_s)
        except ChannelError:
            store.close()
            raise
        channel._store = store
        return channel

    @property
    def store_port(self) -> int:
        """Where the others meet rank 0."""
        return self.spec.store_port

    @property
    def _name(self) -> str:
        return f"weight channel {self.spec.prefix!r}"

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until all members are connected; at once when they already are.

        Args:
            timeout_s: None = `spec.timeout_s`.

        Raises:
            ChannelError: not all members came in time, or `abort` was called.
        """
        if self._joined:
            return
        spec = self.spec
        limit_s = spec.timeout_s if timeout_s is None else timeout_s
        what = (
            f"forming {self._name} as rank {spec.rank} of {spec.world_size} over {spec.backend} "
            f"at {spec.store_host}:{spec.store_port}"
        )
        self._carry_out(what, limit_s, lambda transport: transport.form(limit_s))
        self._joined = True

    def broadcast(
        self,
        parts: Sequence[torch.Tensor],
        timeout_s: float,
        on_part: Callable[[int], None] = lambda num_bytes: None,
        senders: Sequence[int] | None = None,
    ) -> None:
        """Send or receive `parts`; returns when all their bytes are in place.

        After a failure the transport may write to `parts` until `close` has returned without an error: throw the buffer
        away. At a sender the buffer may change again once this has returned; a receiver that is still reading it then
        finds other bytes than the digests promise.

        Args:
            parts: contiguous, on the channel's device; the same numbers of bytes on every member.
            timeout_s: bounds the whole broadcast.
            on_part: is told the bytes of each part when it is done, in another thread; so a failure can say how far
                the broadcast was.
            senders: the rank that each part comes from; None = rank 0. See `Transport.broadcast` on what a sender gives
                for the parts of other senders.

        Raises:
            ChannelError: a member vanished, the deadline passed, or `abort` was called.
        """
        what = f"broadcast of {sum(part.nbytes for part in parts)} bytes in {self._name}"
        self._check_alive(what)
        if not self._joined:
            raise ChannelError(f"{what}: the channel was not joined")
        for part in parts:
            if part.device.type != self.device.type or not part.is_contiguous():
                raise ChannelError(f"{what}: the buffer must be contiguous on {self.device}, is on {part.device}")

        origins = [0] * len(parts) if senders is None else senders
        if len(origins) != len(parts) or not all(0 <= sender < self.spec.senders for sender in origins):
            raise ChannelError(f"{what}: {len(parts)} parts come from ranks {sorted(set(origins))}; see spec.senders")

        def done(num_bytes: int) -> None:
            if self._broken is None:  # a call that was abandoned says nothing any more
                on_part(num_bytes)

        self._carry_out(what, timeout_s, lambda transport: transport.broadcast(parts, timeout_s, done, origins))

    def abort(self) -> None:
        """Make a `join` or `broadcast` under way in another thread fail. The channel is dead; call `close` too.

        Raises:
            ChannelError: the transport could not be aborted in time. Over NCCL replace the process: its CUDA
                context may be stuck.
        """
        self._aborted.set()
        self._broken = self._broken or "aborted"
        transport = self._transport
        if transport is not None:
            self._call(transport, self._close_timeout_s, f"abort of {self._name}", transport.abort)

    def close(self) -> None:
        """Disconnect; members still at work see a lost peer. Idempotent.

        Raises:
            ChannelError: the transport did not let go within its deadline.
        """
        self._aborted.set()
        self._broken = self._broken or "closed"
        store, self._store = self._store, None
        if store is not None:
            store.close()
        transport, self._transport = self._transport, None
        if transport is not None:
            self._call(transport, self._close_timeout_s, f"closing {self._name}", transport.close)

    def _check_alive(self, what: str) -> None:
        if self._broken is not None:
            raise ChannelError(f"{what}: the channel is dead ({self._broken}); form a new one")

    def _carry_out(self, what: str, timeout_s: float, work: Callable[[Transport], None]) -> None:
        """Lets the transport do its work, which may hang for ever; after a failure the channel is dead."""
        self._check_alive(what)
        transport = self._transport
        assert transport is not None
        try:
            # A transport that keeps the deadline itself can name the fault; the slack is for one that does not.
            self._call(transport, timeout_s + SLACK_S, what, lambda: work(transport), self._aborted)
        except BaseException as error:  # whatever it is, also an error of our own leaves members between two parts
            self._broken = self._broken or str(error) or type(error).__name__
            raise

    def _call(
        self,
        transport: Transport,
        timeout_s: float,
        what: str,
        call: Callable[[], None],
        cancelled: threading.Event | None = None,
    ) -> None:
        device = self.device

        def run() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # this is a fresh thread
            call()

        within(timeout_s, what, run, cancelled, lambda: transport.waiting_for)
