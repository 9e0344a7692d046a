"""Where the learner is: a socket file for its user alone, one of several addresses, or whatever a file says now."""

from __future__ import annotations

import asyncio
import socket
import stat
import struct
import time
from pathlib import Path

import pytest

from asyncrl.config import Config
from asyncrl.desk.daemon import _rollout_socket
from asyncrl.errors import BindError, ConfigError
from asyncrl.generator.learner_link import LearnerLink
from asyncrl.host.addresses import Address, first_of_this_host, parse_address, rollout_addresses
from asyncrl.link import limits, messages
from asyncrl.link.codec import decode
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.sockets import AsyncClientSocket, ClientSocket, ServerSocket
from tests.desk.desk_parts import MEBIBYTE, hello, make_parts
from tests.link.test_link_faults import free_port
from tests.waits import wait_until

LATE_S = 20.0
FAR = "tcp://192.0.2.1:5770"  # of no host


def tcp():
    return f"tcp://127.0.0.1:{free_port()}"


class Learner:
    """A desk's sessions behind a socket."""

    def __init__(self, folder, address, run_epoch):
        self.parts = make_parts(folder, run_epoch=run_epoch)
        self.socket = ServerSocket(address, max_frame_bytes=MEBIBYTE)

    def serve(self):
        now = time.monotonic()
        for peer, frame in self.socket.receive():
            message = decode(frame, max_bytes=MEBIBYTE)
            if isinstance(message, messages.Hello):
                self.socket.send_message(peer, self.parts.sessions.hello(peer, message, version=0, now=now).reply)
            elif (session := self.parts.sessions.of(peer, now)) is not None:
                self.socket.send_message(peer, self.parts.sessions.ack(session))

    def close(self):
        self.socket.close()
        self.parts.journal.close()


class Generator:
    """A generator's link, in a task that does what the daemon's loop does."""

    def __init__(self, config):
        session = GeneratorSession(
            hello("g"), run_name="run", outbox_bytes=MEBIBYTE, max_frame_bytes=MEBIBYTE, now=time.monotonic()
        )
        first = rollout_addresses(config.transport.address, config.run.dir)[0]
        self.client = AsyncClientSocket(first.text, max_frame_bytes=MEBIBYTE)
        self.link = LearnerLink(config, session, self.client)

    async def turn(self):
        self.link.keep_up(None)
        for frame in await self.link.receive():
            self.link.accept(frame)

    async def until(self, condition, learner):
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < LATE_S, f"{self.client.address}: {self.client.link}"
            learner.serve()
            await self.turn()


def config_with(folder, address):
    config = Config()
    config.run.dir, config.transport.address, config.transport.max_frame_bytes = str(folder), address, MEBIBYTE
    return config


@pytest.mark.parametrize("by_file", [False, True], ids=["list", "file"])
def test_U6_a_generator_finds_the_learner_that_moved_within_seconds(tmp_path, monkeypatch, by_file):
    monkeypatch.setattr(limits, "SUSPECT_S", 0.3)
    monkeypatch.setattr("asyncrl.generator.learner_link.RECEIVE_WAIT_S", 0.05)
    before, after = tcp(), tcp()
    file = tmp_path / "learner_address"
    file.write_text(f"{before}\n")
    config = config_with(tmp_path, f"file:{file}" if by_file else f"{before},{after}")

    async def run():
        generator = Generator(config)
        first = Learner(tmp_path / "first", before, run_epoch=1)
        await generator.until(lambda: generator.link.session.welcomed, first)
        first.close()
        file.write_text(f"{after}\n")  # which only the generator with a file reads
        moved_at = time.monotonic()
        second = Learner(tmp_path / "second", after, run_epoch=2)
        session = generator.link.session
        await generator.until(lambda: session.welcomed and session.run_epoch == 2, second)
        took_s = time.monotonic() - moved_at
        await generator.link.close()
        second.close()
        return took_s

    assert asyncio.run(run()) < LATE_S
    assert config.generator.unreachable_timeout_s > limits.SUSPECT_S * 2


def test_U6_a_file_that_is_gone_or_wrong_leaves_the_generator_where_it_is(tmp_path, caplog):
    address = tcp()
    file = tmp_path / "learner_address"
    file.write_text(address)

    async def run():
        generator = Generator(config_with(tmp_path, f"file:{file}"))
        for text in (None, "", "nonsense", FAR):
            file.unlink() if text is None else file.write_text(text)
            generator.link._reconnect()
            assert generator.client.address == address
        await generator.link.close()

    asyncio.run(run())
    assert caplog.text.count(f"stays with {address}") == 4


def test_U6_a_learner_listens_on_the_first_address_of_its_host():
    here = parse_address(tcp())
    assert first_of_this_host([parse_address(FAR), here, parse_address(tcp())]) == here
    assert first_of_this_host([parse_address(FAR)]).text == FAR, "its bind says what is wrong"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file:/nowhere/at/all", "file:/nowhere/at/all cannot be read"),
        ("tcp://127.0.0.1:5770,nonsense", "'nonsense' must be tcp://HOST:PORT"),
        ("tcp://127.0.0.1:5770,tcp://*:1", "listens on every interface"),
        ("", "must be tcp://HOST:PORT"),
        (",", "must be tcp://HOST:PORT"),
    ],
)
def test_U6_an_address_of_another_form_is_refused(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says.replace("*", r"\*")):
        rollout_addresses(text, tmp_path)


def test_U6_several_addresses_are_read_in_their_order(tmp_path):
    file = tmp_path / "addresses"
    file.write_text("tcp://10.0.0.1:1\n\n tcp://10.0.0.2:2 , tcp://localhost:3\n")
    texts = [address.text for address in rollout_addresses(f"file:{file}", tmp_path)]
    assert texts == ["tcp://10.0.0.1:1", "tcp://10.0.0.2:2", "tcp://127.0.0.1:3"]


def test_R8_without_keys_the_default_is_a_socket_that_only_its_user_can_reach(tmp_path):
    config = config_with(tmp_path / "run", Config().transport.address)
    (tmp_path / "run").mkdir(mode=0o755)
    (address,) = rollout_addresses(config.transport.address, config.run.dir)
    assert address == Address(address.text, path=str(tmp_path / "run" / "rollouts.sock"))
    server = _rollout_socket(config)
    try:
        assert stat.S_IMODE(Path(address.path).stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as mine:
            mine.connect(address.path)
    finally:
        server.close()


def test_R8_generator_and_learner_meet_at_the_default_address(tmp_path):
    config = config_with(tmp_path, "auto")

    async def run():
        learner = Learner(tmp_path / "learner", rollout_addresses("auto", tmp_path)[0].text, run_epoch=1)
        generator = Generator(config)
        await generator.until(lambda: generator.link.session.welcomed, learner)
        await generator.link.close()
        learner.close()

    asyncio.run(run())


def test_R8_without_keys_no_address_of_a_network_is_listened_to(tmp_path):
    for address in ("tcp://10.0.0.1:5770", "tcp://192.0.2.1:5770", "tcp://[2001:db8::1]:5770"):
        with pytest.raises(BindError, match=r"no keys are configured: set transport\.server_key_file"):
            _rollout_socket(config_with(tmp_path, address))
    _rollout_socket(config_with(tmp_path, tcp())).close()


def raw_dealer(path: str) -> socket.socket:
    """A DEALER by hand, past its handshake: libzmq's own would keep the parts of a message until its end."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    peer.sendall(bytes([4, len(ready)]) + ready)
    peer.settimeout(LATE_S)
    return peer


def part(size: int) -> bytes:
    """A part of a message that goes on."""
    return b"\x03" + struct.pack(">Q", size) + bytes(size)


def test_R8_a_part_over_the_limit_ends_its_connection_whatever_came_before(tmp_path):
    path = tmp_path / "rollouts.sock"
    server = ServerSocket(f"ipc://{path}", max_frame_bytes=MEBIBYTE)
    try:
        with raw_dealer(str(path)) as peer:
            peer.sendall(part(MEBIBYTE) * 8)
            peer.sendall(part(MEBIBYTE + 1)[:4096])  # its length is enough
            wait_until(lambda: server.disconnects == 1, turn=server.receive)
        assert server.receive() == []
    finally:
        server.close()


def test_R8_a_message_without_end_keeps_nobody_waiting_and_is_let_go_of_with_its_connection(tmp_path):
    """Its memory is not bounded: link/README.md says what that means. This is what holds all the same."""
    path = tmp_path / "rollouts.sock"
    server = ServerSocket(f"ipc://{path}", max_frame_bytes=MEBIBYTE)
    honest = ClientSocket(f"ipc://{path}", max_frame_bytes=MEBIBYTE)
    try:
        with raw_dealer(str(path)) as peer:
            for number in range(8):
                peer.sendall(part(MEBIBYTE) * 2)
                assert honest.send(b"%d" % number, timeout_s=LATE_S)
                got = []
                wait_until(lambda got=got: got, turn=lambda got=got: got.extend(server.poll(0.1)))
                assert [frame for _, frame in got] == [b"%d" % number]
        wait_until(lambda: server.disconnects == 1, turn=server.receive)
        assert (server.receive(), server.malformed_messages) == ([], 0)
    finally:
        honest.close()
        server.close()
