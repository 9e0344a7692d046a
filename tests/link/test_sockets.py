"""Real sockets over loopback and ipc: binding, limits, keys."""

from __future__ import annotations

import asyncio
import os
import socket as plain
import stat
import struct
import tempfile
import time

import psutil
import pytest
import zmq

from asyncrl.errors import BindError, ConfigError, FrameError
from asyncrl.host.addresses import IPC_PATH_BYTES, ipc_address, parse_address
from asyncrl.link import codec, limits
from asyncrl.link.curve_keys import ClientAuth, ServerAuth
from asyncrl.link.messages import Bye
from asyncrl.link.sockets import AsyncClientSocket, ClientSocket, ServerSocket, SocketPoller
from tests.waits import LATE_S, wait_until

MAX_BYTES = 1 << 20
ANY_PORT = "tcp://127.0.0.1:*"


@pytest.fixture
def made():
    """Makes sockets and closes them afterwards."""
    sockets = []

    def make(cls, address=ANY_PORT, **options):
        sockets.append(cls(address, **{"max_frame_bytes": MAX_BYTES, **options}))
        return sockets[-1]

    yield make
    for socket in sockets:
        socket.close()


def receive(server: ServerSocket, timeout_s: float = 5.0) -> tuple[bytes, bytes]:
    """The next frame; fails when none comes."""
    received = server.poll(timeout_s)
    assert len(received) == 1, f"{len(received)} frames within {timeout_s} s"
    return received[0]


def connections_to(address: str) -> list[object]:
    """Connections of this process that its kernel has not let go of, or that nobody has closed."""
    port = int(address.rpartition(":")[2])
    kept = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
    connections = psutil.Process().net_connections("tcp")
    return [c for c in connections if c.raddr and c.raddr.port == port and c.status in kept]


# -- frames go both ways


def test_frames_go_to_the_desk_and_back(made):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    assert client.send(b"up")
    peer, frame = receive(server)
    assert frame == b"up"
    assert server.send(peer, b"down")
    assert client.recv(5.0) == b"down"
    assert client.link == "up"


def test_large_frames_arrive_whole_and_in_order(made):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    frames = [bytes([n]) * (200_000 + n) for n in range(20)]
    for frame in frames:
        assert client.send(frame)
    got = []
    wait_until(lambda: len(got) == 20, turn=lambda: got.extend(frame for _, frame in server.poll(0.1)))
    assert got == frames


def test_a_frame_for_nobody_or_a_full_queue_is_refused_at_once(made):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    assert not server.send(b"nobody", b"x")
    client.send(b"hello")
    peer, _ = receive(server)
    frame = bytes(100_000)
    sent = 0
    while server.send(peer, frame):  # the client reads nothing
        sent += 1
        assert sent < 5000, "the queue has no bound"
    assert sent >= 64


def test_without_a_listener_sending_fails_by_its_deadline(made):
    client = made(ClientSocket, "tcp://127.0.0.1:1")
    started = time.monotonic()
    assert not client.send(b"x", timeout_s=0.2)
    assert client.recv(0.1) is None
    assert time.monotonic() - started < 0.3 + LATE_S
    wait_until(lambda: client.link == "nothing answers at this address")


def test_one_poller_serves_both_links_and_a_wake_up(made, tmp_path):
    tcp, ipc = made(ServerSocket), made(ServerSocket, ipc_address(tmp_path, "desk.sock"))
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    poller = SocketPoller()
    for source in (tcp, ipc, wake):
        poller.add(source)
    assert poller.wait(0.01) == []
    made(ClientSocket, ipc.address).send(b"trainer")
    assert poller.wait(5.0) == [ipc]
    assert receive(ipc)[1] == b"trainer"
    os.eventfd_write(wake, 1)
    assert poller.wait(5.0) == [wake]
    os.close(wake)


def test_one_call_returns_a_bounded_number_of_frames_and_bytes(made):
    server = made(ServerSocket, max_frame_bytes=10_000)
    client = made(ClientSocket, server.address)
    for size, number, most in ((10, 400, limits.DESK_DRAIN_FRAMES), (4_000, 100, 3)):
        left, calls = number, []
        while sum(calls) < number:
            while left and client.send(bytes(size), timeout_s=0.0):
                left -= 1
            calls.append(len(server.poll(0.1)))
        assert sum(calls) == number and max(calls) <= most


def test_the_event_loop_socket_sends_receives_and_survives_a_cancelled_receive(made):
    server = made(ServerSocket)

    async def run() -> list[bytes]:
        client = AsyncClientSocket(server.address, max_frame_bytes=MAX_BYTES)
        while not client.send(b"up"):
            await asyncio.sleep(0.01)
        peer, frame = receive(server)
        assert frame == b"up"
        waiting = asyncio.create_task(client.receive(5.0))
        await asyncio.sleep(0)
        waiting.cancel()
        server.send(peer, b"one")
        server.send(peer, b"two")
        got: list[bytes] = []
        while len(got) < 2:
            got += await client.receive(5.0)
        assert await client.receive(0.01) == []
        assert client.link == "up"
        await client.close()
        return got

    assert asyncio.run(run()) == [b"one", b"two"]


def test_closing_with_time_to_flush_delivers_the_last_frame(made):
    server = made(ServerSocket)

    async def leave() -> None:
        client = AsyncClientSocket(server.address, max_frame_bytes=MAX_BYTES)
        while not client.send(b"bye"):
            await asyncio.sleep(0.01)
        await client.close(flush_s=5.0)

    asyncio.run(leave())
    assert receive(server)[1] == b"bye"


def test_a_reconnect_comes_under_a_new_routing_id(made):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    client.send(b"one")
    first, _ = receive(server)
    client.reconnect()
    assert client.send(b"two", timeout_s=5.0)
    second, _ = receive(server)
    assert first != second
    wait_until(lambda: not server.send(first, b"x"), turn=server.receive)


# -- what is refused


def test_a_link_that_breaks_while_its_socket_is_replaced_does_not_keep_the_next_one_from_connecting(made):
    """As after a stop: heartbeats are overdue when the process goes on, and so is the session."""
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    wait_until(lambda: client.link == "up")
    client._link.close()  # the first half of a reconnect
    server.close()
    # libzmq notices in its own thread, and nobody is left to be told.
    wait_until(lambda: not connections_to(server.address), "the end of the connection")
    second = made(ServerSocket)
    client.address, client._where = second.address, parse_address(second.address)
    client.reconnect()
    wait_until(lambda: client.link == "up")


def test_an_oversized_frame_is_not_received_and_its_link_is_dropped(made):
    server = made(ServerSocket, max_frame_bytes=10_000)
    client = made(ClientSocket, server.address)
    client.send(bytes(10_000))
    assert len(receive(server)[1]) == 10_000
    client.send(bytes(10_001))
    wait_until(lambda: server.disconnects == 1, turn=server.receive)
    assert server.receive() == []
    got = []

    def again() -> None:  # the first ones may go into the dying connection
        client.send(b"small", timeout_s=0.1)
        got.extend(server.poll(0.1))

    wait_until(lambda: got, turn=again)
    assert {frame for _, frame in got} == {b"small"}


def test_a_message_of_many_frames_is_counted_and_dropped(made):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address)
    assert client.send(b"x") and receive(server)
    client._socket.send_multipart([b"a", b"b", b"c"])
    wait_until(lambda: server.malformed_messages == 1, turn=lambda: server.poll(0.1))
    client.send(b"after")
    assert receive(server)[1] == b"after"


def test_a_peer_that_is_not_zeromq_does_no_harm(made):
    """Without keys libzmq takes any bytes for a peer of its first protocol: what comes of it are no frames of ours."""
    server = made(ServerSocket)
    ours = codec.encode(Bye("done"), max_bytes=MAX_BYTES)
    got = []
    with plain.create_connection(("127.0.0.1", parse_address(server.address).port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: learner\r\n\r\n" * 50)
        made(ClientSocket, server.address).send(ours)
        wait_until(lambda: ours in got, turn=lambda: got.extend(frame for _, frame in server.poll(0.1)))
    got.remove(ours)
    for frame in got:
        with pytest.raises(FrameError):
            codec.decode(frame, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "[::]", ""])
def test_a_wildcard_is_refused(host):
    with pytest.raises(BindError, match="is a wildcard: name the one private address"):
        ServerSocket(f"tcp://{host}:5770", max_frame_bytes=MAX_BYTES)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:70000", "udp://a:1", "x"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(BindError, match="must be tcp://HOST:PORT or ipc://PATH"):
        ServerSocket(address, max_frame_bytes=MAX_BYTES)


def test_a_public_address_needs_keys_on_both_ends():
    with pytest.raises(BindError, match="can be reached from other hosts and no keys are configured.*server_key_file"):
        ServerSocket("tcp://192.0.2.1:5770", max_frame_bytes=MAX_BYTES)
    with pytest.raises(ConfigError, match="not on this host and no keys are configured.*client_key_file"):
        ClientSocket("tcp://192.0.2.1:5770", max_frame_bytes=MAX_BYTES)


def test_an_address_of_another_host_cannot_be_listened_on(keyring):
    with pytest.raises(BindError, match="no interface of this host has this address"):
        ServerSocket("tcp://192.0.2.1:5770", max_frame_bytes=MAX_BYTES, auth=keyring.server)


def test_a_port_in_use_is_named_with_the_remedy(made):
    first = made(ServerSocket)
    with pytest.raises(BindError, match=rf"cannot listen on {first.address}: .*stop it, or choose another port"):
        ServerSocket(first.address, max_frame_bytes=MAX_BYTES)


def test_a_second_listener_does_not_steal_the_socket_file_but_a_stale_one_is_replaced(made, tmp_path):
    address = ipc_address(tmp_path, "desk.sock")
    first = made(ServerSocket, address)
    assert stat.S_IMODE((tmp_path / "desk.sock").stat().st_mode) == 0o600
    with pytest.raises(BindError, match="another process does"):
        ServerSocket(address, max_frame_bytes=MAX_BYTES)
    first.close()
    with plain.socket(plain.AF_UNIX) as crashed:  # leaves its file behind, as a killed process does
        (tmp_path / "desk.sock").unlink(missing_ok=True)
        crashed.bind(str(tmp_path / "desk.sock"))
    made(ServerSocket, address)


@pytest.fixture
def short_folder():
    """Where a socket's path fits, however deep pytest's folders are."""
    with tempfile.TemporaryDirectory() as name:
        yield name


def test_a_run_folder_too_deep_for_a_socket_file_gets_a_private_one_elsewhere(
    made, short_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", short_folder)
    deep = tmp_path / ("d" * 100)
    address = ipc_address(deep, "desk.sock")
    assert address == ipc_address(deep, "desk.sock") != ipc_address(tmp_path / ("e" * 100), "desk.sock")
    path = parse_address(address).path
    assert len(path) <= IPC_PATH_BYTES
    server = made(ServerSocket, address)
    made(ClientSocket, address).send(b"x")
    assert receive(server)[1] == b"x"
    os.chmod(os.path.dirname(path), 0o755)
    with pytest.raises(BindError, match="not a private folder"):
        ipc_address(deep, "desk.sock")


def test_a_socket_path_that_is_too_long_is_refused():
    with pytest.raises(BindError, match="has 120 bytes, at most 107: use a shorter run.dir"):
        ServerSocket(f"ipc:///{'x' * 119}", max_frame_bytes=MAX_BYTES)


# -- keys


class Keyring:
    """A server's keys, one admitted client and one stranger."""

    def __init__(self, folder) -> None:
        server_public, server_secret = zmq.curve_keypair()
        public, secret = zmq.curve_keypair()
        self.stranger_public, stranger_secret = zmq.curve_keypair()
        self.allowed = folder / "allowed_keys"
        self.allowed.write_bytes(public + b"\n")
        self.server = ServerAuth(server_secret, self.allowed)
        self.client = ClientAuth(secret, server_public)
        self.stranger = ClientAuth(stranger_secret, server_public)
        self.misled = ClientAuth(secret, public)  # expects another server


@pytest.fixture
def keyring(tmp_path):
    return Keyring(tmp_path)


def test_an_admitted_key_is_served(made, keyring):
    server = made(ServerSocket, auth=keyring.server)
    client = made(ClientSocket, server.address, auth=keyring.client)
    assert client.send(b"x", timeout_s=5.0)
    assert receive(server)[1] == b"x"
    assert (client.link, server.handshakes_refused) == ("up", 0)


@pytest.mark.parametrize(
    ("who", "says"),
    [("stranger", "does not admit this key"), ("misled", "handshake"), (None, "handshake")],
)
def test_a_strange_key_a_wrong_server_key_and_no_key_are_refused(made, keyring, who, says):
    server = made(ServerSocket, auth=keyring.server)
    client = made(ClientSocket, server.address, auth=getattr(keyring, who) if who else None)
    assert not client.send(b"x", timeout_s=0.5)
    wait_until(lambda: says in client.link, turn=server.receive)
    wait_until(lambda: server.handshakes_refused > 0, turn=server.receive)
    assert server.receive() == []


def test_a_client_with_keys_does_not_talk_to_a_server_without(made, keyring):
    server = made(ServerSocket)
    client = made(ClientSocket, server.address, auth=keyring.client)
    assert not client.send(b"x", timeout_s=0.5)
    wait_until(lambda: "handshake" in client.link, turn=server.receive)


def test_a_key_is_admitted_as_soon_as_it_is_in_the_list_and_refused_when_the_list_is_gone(made, keyring):
    server = made(ServerSocket, auth=keyring.server)
    keyring.allowed.write_bytes(keyring.stranger_public)
    made(ClientSocket, server.address, auth=keyring.stranger).send(b"rotated", timeout_s=5.0)
    assert receive(server)[1] == b"rotated"
    keyring.allowed.unlink()
    assert not made(ClientSocket, server.address, auth=keyring.stranger).send(b"x", timeout_s=0.5)
    keyring.allowed.write_bytes(keyring.stranger_public)  # and the server still works
    assert made(ClientSocket, server.address, auth=keyring.stranger).send(b"back", timeout_s=5.0)


def test_a_missing_allow_list_stops_the_start(keyring):
    keyring.allowed.unlink()
    with pytest.raises(ConfigError, match="allowed_keys_file .* cannot be read"):
        ServerSocket(ANY_PORT, max_frame_bytes=MAX_BYTES, auth=keyring.server)


def test_an_unauthenticated_flood_does_not_fill_the_memory(made, keyring):
    """A raw ZMTP peer that never ends its message: with keys it does not get past the handshake."""
    server = made(ServerSocket, auth=keyring.server)
    before = resident_bytes()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(23, b"\0") + bytes(32)
    more = b"\x03" + struct.pack(">Q", 60_000) + bytes(60_000)
    sent = 0
    with plain.create_connection(("127.0.0.1", parse_address(server.address).port)) as attacker:
        attacker.settimeout(1.0)
        try:
            attacker.sendall(greeting)
            for _ in range(2000):
                attacker.sendall(more)
                sent += len(more)
        except OSError:
            pass  # thrown out, as it should be
    assert server.receive() == []
    assert resident_bytes() - before < 20 * 2**20, f"grew after {sent} bytes"


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
