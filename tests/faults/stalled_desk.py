"""A desk that stands still while its peers come and go: run as a process, because libzmq may abort it.

    python -m tests.faults.stalled_desk SECONDS VANISHING STAYING

VANISHING peers close at once with 12 frames unread; STAYING peers send a frame every 0.1 s and make a new connection
every second. The desk reads nothing for SECONDS. Prints how many frames it reads afterwards and how many it was sent.
"""

from __future__ import annotations

import sys
import threading
import time

from asyncrl.link.sockets import ClientSocket, ServerSocket
from tests.waits import wait_until

MAX_BYTES = 2**20
UNREAD_FRAMES = 12


def vanish(address: str) -> None:
    """A peer that the desk never reads again."""
    client = ClientSocket(address, max_frame_bytes=MAX_BYTES)
    for _ in range(UNREAD_FRAMES):
        assert client.send(b"unread", timeout_s=5.0)
    # All of them are at the desk's end before the connection ends, as of a process that is killed.
    client.close(flush_s=0.2)


def stay(address: str, over: threading.Event) -> None:
    """A peer as a generator is one: it sends on, and tries a fresh connection when nobody answers."""
    client = ClientSocket(address, max_frame_bytes=MAX_BYTES)
    reconnect_at = time.monotonic() + 1.0
    while not over.wait(0.1):
        client.send(b"staying", timeout_s=0.0)
        if time.monotonic() >= reconnect_at:
            client.reconnect()
            reconnect_at = time.monotonic() + 1.0
    client.close()


def main(stall_s: float, num_vanishing: int, num_staying: int) -> None:
    """Stands still and then reads."""
    desk = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
    over = threading.Event()
    peers = [threading.Thread(target=vanish, args=(desk.address,)) for _ in range(num_vanishing)]
    peers += [threading.Thread(target=stay, args=(desk.address, over)) for _ in range(num_staying)]
    for peer in peers:
        peer.start()
    over.wait(stall_s)  # the desk is busy elsewhere
    newest = ClientSocket(desk.address, max_frame_bytes=MAX_BYTES)
    got: list[bytes] = []

    def read() -> None:
        newest.send(b"newest", timeout_s=0.1)
        got.extend(frame for _, frame in desk.poll(0.1))

    wait_until(lambda: b"newest" in got, "a frame that was sent after the stall", turn=read)
    over.set()
    for peer in peers:
        peer.join()
    print(f"alive: read {len(got)} frames")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
