"""Keys: each speaks for its own generator, and a key that is removed loses its connection."""

from __future__ import annotations

import dataclasses
import stat
import subprocess
from pathlib import Path

import pytest
import zmq

from asyncrl.config import TransportConfig
from asyncrl.desk.boundary import Boundary
from asyncrl.desk.desk import FROM_GENERATOR
from asyncrl.errors import ConfigError
from asyncrl.link import messages
from asyncrl.link.allowed_keys import LOOK_EVERY_S, AllowList, PeerKeys
from asyncrl.link.codec import decode, encode
from asyncrl.link.curve_keys import client_auth, server_auth
from asyncrl.link.key_commands import add, make, revoke
from asyncrl.link.sockets import ClientSocket, ServerSocket
from tests.desk.desk_parts import MEBIBYTE, beat, hello
from tests.desk.test_generators import World
from tests.waits import wait_until

ROOT = Path(__file__).resolve().parents[2]


def transport(folder, name):
    return TransportConfig(
        server_key_file=str(folder / "learner.key"),
        allowed_keys_file=str(folder / "allowed_keys"),
        server_public_key_file=str(folder / "learner.pub"),
        client_key_file=str(folder / f"{name}.key"),
    )


class KeyedDesk(World):
    """A desk's generators behind a real ROUTER with keys."""

    def __init__(self, folder, keys):
        super().__init__(folder)
        self.keys = keys
        auth = server_auth(transport(keys, "learner"))
        self.socket = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MEBIBYTE, auth=auth)
        self.generators.socket = self.socket
        self.boundary = Boundary(self.generators)
        self.clients = []
        self.now = 0.0

    def client(self, key_name):
        auth = client_auth(transport(self.keys, key_name))
        self.clients.append(ClientSocket(self.socket.address, max_frame_bytes=MEBIBYTE, auth=auth))
        return self.clients[-1]

    def handle(self, peer, message, frame, now):
        if isinstance(message, messages.Hello):
            self.generators.hello(peer, message, now)
        elif (session := self.generators.session_of(peer, now)) is not None:
            self.generators.beat(session, message, now)

    def ask(self, client, message):
        """The answer to a message."""
        assert client.send(encode(message, max_bytes=MEBIBYTE), timeout_s=5.0)
        return self.read(client)

    def read(self, client):
        got = []

        def turn():
            self.boundary.from_generators(self.socket, FROM_GENERATOR, self.handle, self.now)
            if (frame := client.recv(0.05)) is not None:
                got.append(decode(frame, max_bytes=MEBIBYTE))

        wait_until(lambda: got, "an answer of the desk", turn=turn)
        return got[0]

    def close(self):
        for client in self.clients:
            client.close()
        self.socket.close()
        self.parts.journal.close()


@pytest.fixture
def keys(tmp_path):
    folder = tmp_path / "keys"
    make(folder, ["gen-a", "gen-b"])
    return folder


@pytest.fixture
def desk(tmp_path, keys):
    desk = KeyedDesk(tmp_path, keys)
    yield desk
    desk.close()


def test_R7_a_key_speaks_for_the_generator_it_is_listed_for_and_for_no_other(desk):
    other = desk.client("gen-b")
    refusal = desk.ask(other, hello("gen-a", incarnation=2**61))
    assert (refusal.code, refusal.got) == ("fenced", "gen-a")
    assert "its key is listed in transport.allowed_keys_file for gen-b: set generator.id to that" in refusal.reason
    assert isinstance(desk.ask(desk.client("gen-a"), hello("gen-a")), messages.Welcome), "the real one is not fenced"
    assert isinstance(desk.ask(other, hello("gen-b")), messages.Welcome)
    assert {session.generator_id for session in desk.generators.alive()} == {"gen-a", "gen-b"}


def test_R7_a_key_without_an_id_is_bound_to_the_first_one_it_uses(tmp_path):
    keys = tmp_path / "keys"
    make(keys, [])
    add(keys, ["gen-a"])
    desk = KeyedDesk(tmp_path, keys)
    try:
        bare = desk.client("generator")
        assert "another key speaks for gen-a" in desk.ask(bare, hello("gen-a")).reason
        assert isinstance(desk.ask(bare, hello("host-0")), messages.Welcome)
        assert "its key spoke for host-0 first" in desk.ask(bare, hello("host-1")).reason
        assert isinstance(desk.ask(desk.client("generator"), hello("host-0")), messages.Welcome), "a reconnect"
    finally:
        desk.close()


def test_R7_a_key_that_is_removed_loses_its_live_connection(desk):
    client, other = desk.client("gen-a"), desk.client("gen-b")
    assert isinstance(desk.ask(client, hello("gen-a")), messages.Welcome)
    assert isinstance(desk.ask(other, hello("gen-b")), messages.Welcome)
    assert isinstance(desk.ask(client, beat()), messages.Ack)
    revoke(desk.keys, ["gen-a"])
    desk.now = LOOK_EVERY_S
    desk.generators.say_strangers(desk.now)
    refusal = desk.read(client)
    assert (refusal.code, refusal.reason) == ("fenced", "its key was removed from transport.allowed_keys_file")
    assert [session.generator_id for session in desk.generators.alive()] == ["gen-b"]
    before = desk.socket.frames_without_key
    client.send(encode(beat(), max_bytes=MEBIBYTE))
    wait_until(lambda: desk.socket.frames_without_key > before, turn=lambda: desk.socket.poll(0.05))
    assert isinstance(desk.ask(other, beat()), messages.Ack)
    assert not desk.client("gen-a").send(b"x", timeout_s=0.5), "nor is it admitted again"


def test_R7_a_list_that_is_gone_for_a_moment_cuts_nobody_off(desk, caplog):
    client = desk.client("gen-a")
    desk.ask(client, hello("gen-a"))
    path = desk.keys / "allowed_keys"
    text = path.read_text()
    path.unlink()
    for desk.now in (2.0, 4.0, 6.0):
        desk.generators.say_strangers(desk.now)
    assert isinstance(desk.ask(client, beat()), messages.Ack)
    assert caplog.text.count("connections that are there stay") == 1
    path.write_text(text)
    desk.now = 8.0
    desk.generators.say_strangers(desk.now)
    assert isinstance(desk.ask(client, beat()), messages.Ack)


def test_R7_a_routing_id_belongs_to_the_key_that_used_it_first(keys):
    allowed = AllowList(keys / "allowed_keys")
    first, second = ((keys / f"{name}.pub").read_bytes().strip() for name in ("gen-a", "gen-b"))
    peers = PeerKeys(allowed)
    assert peers.note(b"peer", first)
    assert not peers.note(b"peer", second)
    assert peers.note(b"peer", first)
    assert not peers.note(b"other", zmq.curve_keypair()[0])


def test_R7_a_second_key_of_one_generator_replaces_the_first_without_a_pause(keys):
    """As written by hand when a key is rotated: two lines of one id."""
    new = zmq.curve_keypair()[0]
    path = keys / "allowed_keys"
    path.write_text(path.read_text() + f"# rotated\n{new.decode()} gen-a\n")
    peers = PeerKeys(AllowList(path))
    old = (keys / "gen-a.pub").read_bytes().strip()
    assert peers.note(b"old", old) and peers.note(b"new", new)
    assert peers.refusal(b"old", "gen-a") == peers.refusal(b"new", "gen-a") == ""
    revoke(keys, ["gen-b"])
    assert peers.revoked(LOOK_EVERY_S) == []


def test_R18_keys_are_made_added_and_revoked_by_one_command(tmp_path):
    def keys_command(*words):
        return subprocess.run([ROOT / "bin" / "keys", *words], capture_output=True, text=True, timeout=60)

    folder = tmp_path / "keys"
    done = keys_command("make", folder, "gen-a", "gen-b")
    assert done.returncode == 0, done.stderr
    assert f"gen-a: generator.id=gen-a transport.client_key_file={folder / 'gen-a.key'}" in done.stdout
    assert keys_command("add", folder, "gen-c").returncode == 0
    assert keys_command("revoke", folder, "gen-a").returncode == 0
    lines = (folder / "allowed_keys").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["gen-b", "gen-c"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {modes[name] for name in ("learner.key", "gen-a.key", "gen-b.key", "gen-c.key", "allowed_keys")} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for words, says in (
        (("add", folder, "gen-b"), "keys are never overwritten"),
        (("revoke", folder, "gen-x"), "has no key of gen-x"),
        (("add", folder, "../evil"), "cannot be a generator.id"),
        (("add", folder, "learner"), "cannot be a generator.id"),
    ):
        refused = keys_command(*words)
        assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr
    assert (folder / "allowed_keys").read_text().splitlines() == lines


def test_R18_a_line_with_several_ids_loses_the_one_that_is_revoked(keys):
    path = keys / "allowed_keys"
    shared = zmq.curve_keypair()[0].decode()
    path.write_text(f"{shared} one two\n")
    revoke(keys, ["one"])
    assert path.read_text() == f"{shared} two\n"
    with pytest.raises(ConfigError, match="has no key of one"):
        revoke(keys, ["one"])


def test_R7_without_keys_any_local_peer_may_speak_as_before(tmp_path):
    world = World(tmp_path)
    world.generators.hello(b"p", dataclasses.replace(hello("a"), incarnation=3), 0.0)
    assert [session.incarnation for session in world.generators.alive()] == [3]
    world.parts.journal.close()
