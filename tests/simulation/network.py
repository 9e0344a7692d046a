"""The network between generators and desk: it loses, repeats, delays and reorders, and cuts connections.

`Router` and `Dealer` have the methods of `link.sockets.ServerSocket` and `AsyncClientSocket`. A connection is named by
the routing id of its dealer; what is on its way in a connection that ended is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from asyncrl.link.codec import encode
from asyncrl.link.messages import Message

MAX_FRAME_BYTES = 1 << 20


@dataclass(slots=True)
class Weather:
    """How bad the network is. Shares are probabilities of each frame."""

    loss: float = 0.0
    repeat: float = 0.0
    reorder: bool = False  # without it, frames of one connection keep their order
    delay_s: float = 0.002  # mean
    spike: float = 0.0  # share of frames that take up to spike_s
    spike_s: float = 3.0


class Network:
    """Carries frames, each after a delay of its own. seen(to_desk, peer, frame) is told of each that arrives."""

    def __init__(self, loop: asyncio.AbstractEventLoop, chance: random.Random) -> None:
        self.weather = Weather()
        self.router: Router | None = None
        self.dealers: dict[bytes, Dealer] = {}  # connected ones
        self.owners: dict[bytes, Dealer] = {}  # of every connection there ever was
        self.cut_off: set[str] = set()  # generators behind a partition
        self.num_carried = 0
        self._loop = loop
        self._chance = chance
        self._not_before: dict[tuple[bool, bytes], float] = {}
        self._num_peers = 0

    def connect(self, dealer: Dealer) -> bytes:
        """A new routing id."""
        self._num_peers += 1
        peer = b"peer-%d" % self._num_peers
        self.dealers[peer] = self.owners[peer] = dealer
        return peer

    def disconnect(self, peer: bytes) -> None:
        """The connection ends, and with it what is on its way."""
        self.dealers.pop(peer, None)

    def carry(self, to_desk: bool, peer: bytes, frame: bytes, deliver: Callable[[], None]) -> None:
        """`deliver` is called when the frame arrives, if it does."""
        weather, chance = self.weather, self._chance
        if chance.random() < weather.loss:
            return
        self._carry_once(to_desk, peer, deliver)
        if chance.random() < weather.repeat:
            self._carry_once(to_desk, peer, deliver)

    def _carry_once(self, to_desk: bool, peer: bytes, deliver: Callable[[], None]) -> None:
        weather, chance = self.weather, self._chance
        delay_s = chance.expovariate(1 / weather.delay_s)
        if chance.random() < weather.spike:
            delay_s = chance.uniform(0, weather.spike_s)
        at = self._loop.time() + delay_s
        if not weather.reorder:
            at = max(at, self._not_before.get((to_desk, peer), 0.0))
            self._not_before[to_desk, peer] = at
        self._loop.call_at(at, deliver)


class Router:
    """The desk's end, for one life of the desk."""

    max_frame_bytes = MAX_FRAME_BYTES
    handshakes_refused = malformed_messages = disconnects = 0
    keys = None
    address = "sim"

    def __init__(
        self,
        network: Network,
        chance: random.Random,
        *,
        step: Callable[[], None],
        wake: Callable[[], None],
        sent: Callable[[bytes, Message], None],
        read: Callable[[bytes, bytes], None],
    ) -> None:
        """step() comes before each thing that the desk does here, sent and read after it; wake() when frames came."""
        self._network = network
        self._chance = chance
        self._step, self._wake, self._sent, self._read = step, wake, sent, read
        self._inbox: deque[tuple[bytes, bytes]] = deque()
        self.open = True
        network.router = self

    def arrive(self, peer: bytes, frame: bytes) -> None:
        if self.open:
            self._inbox.append((peer, frame))
            self._wake()

    @property
    def readable(self) -> bool:
        return bool(self._inbox)

    def receive(self) -> list[tuple[bytes, bytes]]:
        self._step()
        count = self._chance.randint(1, len(self._inbox)) if self._inbox else 0
        frames = [self._inbox.popleft() for _ in range(count)]
        for peer, frame in frames:
            self._read(peer, frame)
        return frames

    def send_message(self, peer: bytes, message: Message) -> bool:
        frame = encode(message, max_bytes=self.max_frame_bytes)
        self._step()
        self._sent(peer, message)
        dealer = self._network.dealers.get(peer)
        if dealer is None:
            return False
        self._network.carry(False, peer, frame, lambda: dealer.arrive(peer, frame))
        return True

    def reaches(self, peer: bytes, message: Message) -> bool:
        return self.send_message(peer, message)

    def close(self) -> None:
        self.open = False


class Dealer:
    """A generator's end, for one life of the generator."""

    max_frame_bytes = MAX_FRAME_BYTES
    address = link = "sim"
    disconnects, connects = 0, 1

    def __init__(
        self, network: Network, name: str, *, sent: Callable[[bytes], None], read: Callable[[bytes], None]
    ) -> None:
        self._network = network
        self._name = name
        self._sent, self._read = sent, read
        self._inbox: deque[bytes] = deque()
        self._came = asyncio.Event()
        self.peer = network.connect(self)
        self.open = True

    def reconnect(self, address: str | None = None) -> None:
        self._network.disconnect(self.peer)
        self._inbox.clear()
        self.peer = self._network.connect(self)
        self.disconnects += 1
        self.connects += 1

    def send(self, frame: bytes) -> bool:
        if not self.open:
            return False
        self._sent(frame)
        peer = self.peer
        if self._name in self._network.cut_off:
            return True

        def deliver() -> None:
            # To the desk of that moment: what a dealer has queued goes to the next one when it connects again.
            router = self._network.router
            reached = peer in self._network.dealers and self._name not in self._network.cut_off
            if router is not None and router.open and reached:
                self._network.num_carried += 1
                router.arrive(peer, frame)

        self._network.carry(True, peer, frame, deliver)
        return True

    def send_message(self, message: Message) -> bool:
        return self.send(encode(message, max_bytes=self.max_frame_bytes))

    def arrive(self, peer: bytes, frame: bytes) -> None:
        if self.open and peer == self.peer and self._name not in self._network.cut_off:
            self._network.num_carried += 1
            self._inbox.append(frame)
            self._came.set()

    async def receive(self, timeout_s: float, known_connects: int | None = None) -> list[bytes]:
        if not self._inbox:
            self._came.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._came.wait()
            except TimeoutError:
                return []
        frames = list(self._inbox)
        self._inbox.clear()
        for frame in frames:
            self._read(frame)
        return frames

    def kill(self) -> None:
        """The process is gone: nothing leaves and nothing arrives any more."""
        self.open = False
        self._network.disconnect(self.peer)

    async def close(self, flush_s: float = 0.0) -> None:
        self.open = False
        self._network.disconnect(self.peer)
