"""The generator's end of a session: no sockets, no clock. Times are seconds of a monotonic clock, passed in.

A result is kept from `put` until the desk says that it is on disk, across lost messages, reconnects and restarts
of the learner. Results of at most `credit_bytes` are under way at once, the oldest first.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator
from enum import StrEnum

from asyncrl.errors import ProtocolError
from asyncrl.link import codec, limits
from asyncrl.link.messages import Ack, ActiveLease, GroupResult, Hello, LeaseFailed, Nack, Refusal, Welcome
from asyncrl.link.schema.message_base import Message, RunMessage
from asyncrl.link.wire_types import NackCode, RefusalCode
from asyncrl.types import LeaseKind

Result = GroupResult | LeaseFailed


class GeneratorState(StrEnum):
    """HELLO: not (or no longer) admitted, saying hello. REFUSED is final."""

    HELLO = "hello"
    WELCOMED = "welcomed"
    REFUSED = "refused"


@dataclasses.dataclass(slots=True)
class _Unacked:
    """A result in the outbox, and when it is sent next."""

    frame: bytes
    lease: ActiveLease
    due_at: float
    wait_s: float = limits.RESEND_FIRST_S

    def sent(self, now: float) -> None:
        self.due_at = now + self.wait_s
        self.wait_s = min(2 * self.wait_s, limits.RESEND_MAX_S)

    def send_now(self, now: float) -> None:
        self.due_at, self.wait_s = now, limits.RESEND_FIRST_S


class GeneratorSession:
    """One incarnation of a generator, talking to whichever learner has the highest run epoch.

    The owner passes each message to `receive` and sends the frames that `due` returns, at the latest at
    `next_due`; what gets lost is due again later. While `welcomed` it sends a Beat every `beat_s` from the loop that
    does the work; each is answered. When `reconnect_due`, it replaces its socket and calls `reconnected`. Whenever a
    socket has connected, it calls `connected`.

    hello: who this generator is; first_unacked_seq, instance and the later max_run_epoch are filled in here.
    run_name, max_frame_bytes: of the configuration; a learner that differs in them counts as a refusal.
    outbox_bytes: above this `has_room` is false, and no new leases should be taken.
    """

    def __init__(self, hello: Hello, *, run_name: str, outbox_bytes: int, max_frame_bytes: int, now: float) -> None:
        self.state = GeneratorState.HELLO
        self.run_epoch = hello.max_run_epoch
        self.held_version = hello.held_version
        self.refusal: Refusal | None = None  # the last one; that of an older learner is not final
        self.outbox_bytes = 0
        self.beat_s = limits.BEAT_S  # as the desk last said; by it the silence of the desk is judged, too
        self._hello = dataclasses.replace(hello, instance=hello.instance or uuid.uuid4().hex)
        self._run_name = run_name
        self._budget_bytes = outbox_bytes
        self._max_frame_bytes = max_frame_bytes
        self._unacked: dict[int, _Unacked] = {}  # by seq, ascending
        self._last_seq = 0
        self._credit_bytes = 0
        self._hello_at = self._heard_at = self._connected_at = now

    @property
    def welcomed(self) -> bool:
        """Whether a learner has admitted this generator on the present connection."""
        return self.state is GeneratorState.WELCOMED

    # -- results

    def put(self, make: Callable[[int, int], Result], now: float) -> int:
        """Takes a result into the outbox; `make` gets its seq and the run epoch. Returns the seq.

        Finished work is never refused for lack of room: see `has_room`. Raises FrameError, with no seq used,
        when the frame is over the limit.
        """
        seq = self._last_seq + 1
        message = make(seq, self.run_epoch)
        frame = self._encode(message)
        self._last_seq = seq
        self._unacked[seq] = _Unacked(frame, ActiveLease(*message.key), due_at=now)
        self.outbox_bytes += len(frame)
        return seq

    @property
    def has_room(self) -> bool:
        """Whether the outbox may grow: leases are to be taken only while it may."""
        return self.outbox_bytes < self._budget_bytes

    @property
    def blocked(self) -> bool:
        """Whether results cannot leave as they come: the outbox is full, or the desk takes none for now."""
        return not self.has_room or (self.welcomed and self._credit_bytes <= 0 and bool(self._unacked))

    def unacked_leases(self) -> list[ActiveLease]:
        """The leases whose results are in the outbox, for Beat.active."""
        return [item.lease for item in self._unacked.values()]

    # -- time

    def due(self, now: float) -> list[bytes]:
        """Frames to send now. They count as sent: what the socket does not take is due again later."""
        if self.state is GeneratorState.HELLO and now >= self._hello_at:
            self._hello_at = now + limits.BEAT_S
            return [self._encode(self._current_hello())]
        items = [item for item in self._under_way() if now >= item.due_at]
        for item in items:
            item.sent(now)
        return [item.frame for item in items]

    def next_due(self, now: float) -> float:
        """When `due` or `reconnect_due` next has something; infinity after a refusal."""
        if self.state is GeneratorState.REFUSED:
            return float("inf")
        reconnect_at = self._reconnect_at()
        if self.state is GeneratorState.HELLO:
            return min(self._hello_at, reconnect_at)
        return min((item.due_at for item in self._under_way()), default=reconnect_at)

    def silence_s(self, now: float) -> float:
        """Seconds since the learner was last heard, or since the start."""
        return now - self._heard_at

    def reconnect_due(self, now: float) -> bool:
        """Silence although beats are answered: the link may be half-open, a fresh socket is worth a try."""
        return now >= self._reconnect_at() and self.state is not GeneratorState.REFUSED

    def _reconnect_at(self) -> float:
        return max(self._heard_at, self._connected_at) + limits.suspect_s(self.beat_s)

    def reconnected(self, now: float) -> None:
        """The socket is new, so the desk does not know it: says hello again. Unacked results stay."""
        self._connected_at = now
        self._say_hello(now)

    def connected(self, now: float) -> None:
        """The socket has a connection from now on: what was said without one is lost, and the learner may be another.

        Says hello at once, also where the last one was a moment ago.
        """
        self._say_hello(now)
        self._hello_at = min(self._hello_at, now)

    # -- messages

    def receive(self, message: Message, now: float) -> bool:
        """Takes in a message of the desk. True: it is current and the owner may act on it. False: ignore it.

        Raises ProtocolError when it acknowledges what was never sent.
        """
        if self.state is GeneratorState.REFUSED:
            return False
        if isinstance(message, Refusal):
            return self._refused(message)
        if not isinstance(message, RunMessage):
            raise ProtocolError(f"{type(message).__name__} is not a message of the desk to a generator")
        if message.run_epoch < self.run_epoch:
            return False  # from a learner that has been replaced
        if isinstance(message, Welcome):
            return self._welcomed(message, now)
        if message.run_epoch > self.run_epoch or (isinstance(message, Nack) and message.code is NackCode.HELLO):
            self._say_hello(now)
            return False
        self._heard_at = now
        if isinstance(message, Ack):
            self._settle(message.acked_seq, message.beyond)
            self._credit_bytes = message.credit_bytes
            self.beat_s = message.beat_s
        elif isinstance(message, Nack):
            return self._nacked(message)
        return True

    def _welcomed(self, message: Welcome, now: float) -> bool:
        # A learner that takes smaller frames would drop the link at each of ours, for ever.
        for code, name, theirs, ours in (
            (RefusalCode.RUN, "run.name", message.run_name, self._run_name),
            (RefusalCode.CONFIG, "transport.max_frame_bytes", message.max_frame_bytes, self._max_frame_bytes),
        ):
            if theirs != ours:
                reason = f"learner and generator differ in {name}: wrong transport.address, or another configuration"
                return self._refused(Refusal(code, reason, expected=str(theirs), got=str(ours)))
        fresh = not self.welcomed or message.run_epoch > self.run_epoch
        self._heard_at = now
        self.state = GeneratorState.WELCOMED
        self.run_epoch = message.run_epoch
        self.refusal = None
        self._credit_bytes = message.credit_bytes
        self.beat_s = message.beat_s
        self._settle(message.acked_seq, [])
        if fresh:
            for item in self._unacked.values():
                item.send_now(now)
        return fresh

    def _refused(self, message: Refusal) -> bool:
        self.refusal = message
        if message.code is RefusalCode.RUN_EPOCH:
            # An older learner that has not noticed yet that it was replaced; the newer one may take its place.
            return False
        self.state = GeneratorState.REFUSED
        return True

    def _nacked(self, message: Nack) -> bool:
        if message.seq > self._last_seq:
            raise ProtocolError(f"the desk refused seq {message.seq}, the last one sent is {self._last_seq}")
        return self._drop(message.seq)

    def _settle(self, acked_seq: int, beyond: list[int]) -> None:
        newest = max((acked_seq, *beyond))
        if newest > self._last_seq:
            raise ProtocolError(f"the desk acknowledged seq {newest}, the last one sent is {self._last_seq}")
        while self._unacked and (oldest := next(iter(self._unacked))) <= acked_seq:
            self._drop(oldest)
        for seq in beyond:
            self._drop(seq)

    def _drop(self, seq: int) -> bool:
        """Forgets a result that is settled. False when it is not in the outbox."""
        item = self._unacked.pop(seq, None)
        if item is None:
            return False
        self.outbox_bytes -= len(item.frame)
        return True

    def _under_way(self) -> Iterator[_Unacked]:
        """The oldest results that fit the credit and the desk's memory of seqs; the very oldest always does.

        Results of evaluations, which are small and leave no trace in the learner's journal, need no credit.
        """
        if not self.welcomed:
            return
        left = self._credit_bytes
        first = next(iter(self._unacked), 0)
        for seq, item in self._unacked.items():
            if seq >= first + limits.SEQ_WINDOW:
                return
            if left <= 0 or (seq != first and len(item.frame) > left):
                left = 0
                if item.lease.kind is not LeaseKind.EVAL:
                    continue
            left -= len(item.frame)
            yield item

    def _say_hello(self, now: float) -> None:
        if self.welcomed:  # otherwise the next hello has its time already
            self.state = GeneratorState.HELLO
            self._hello_at = now
            self.beat_s = limits.BEAT_S  # a hello comes as often, and is answered

    def _current_hello(self) -> Hello:
        return dataclasses.replace(
            self._hello,
            max_run_epoch=self.run_epoch,
            first_unacked_seq=next(iter(self._unacked), self._last_seq + 1),
            held_version=self.held_version,
        )

    def _encode(self, message: Message) -> bytes:
        return codec.encode(message, max_bytes=self._max_frame_bytes)
