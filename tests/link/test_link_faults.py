"""A session over real sockets through a proxy that delays, cuts and swallows; and a desk that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncrl.host.addresses import parse_address
from asyncrl.link import codec, limits
from asyncrl.link.desk_session import DeskSessions, Seen
from asyncrl.link.generator_session import GeneratorSession
from asyncrl.link.messages import Beat, Hello, Refusal
from asyncrl.link.sockets import ClientSocket, ServerSocket
from tests.link.chaos_proxy import ChaosProxy
from tests.link.test_session import beat, desk, failed, generator
from tests.waits import LATE_S

MAX_BYTES = 1 << 20
DESK_SCRIPT = Path(__file__).with_name("killable_desk.py")


class Generator:
    """GeneratorSession on a real socket; `turn` is one round of its loop."""

    def __init__(self, address: str, **session) -> None:
        self.session: GeneratorSession = generator(now=time.monotonic(), outbox_bytes=100_000, **session)
        self.socket = ClientSocket(address, max_frame_bytes=MAX_BYTES)
        self.beat_at = 0.0
        self.reconnects = 0

    def turn(self, wait_s: float = 0.01) -> None:
        now = time.monotonic()
        if self.session.reconnect_due(now):
            self.socket.reconnect()
            self.session.reconnected(now)
            self.reconnects += 1
        frames = self.session.due(now)
        if self.session.welcomed and now >= self.beat_at:
            self.beat_at = now + limits.BEAT_S
            frames.append(codec.encode(beat(), max_bytes=MAX_BYTES))
        for frame in frames:
            self.socket.send(frame, timeout_s=0.0)
        frame = self.socket.recv(wait_s)
        while frame is not None:
            self.session.receive(codec.decode(frame, max_bytes=MAX_BYTES), time.monotonic())
            frame = self.socket.recv(0.0)


class MemoryDesk:
    """DeskSessions on a real socket; what it takes counts as durable at once."""

    def __init__(self) -> None:
        self.socket = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
        self.sessions: DeskSessions = desk()
        self.taken: list[int] = []

    def turn(self, wait_s: float = 0.0) -> None:
        for peer, frame in self.socket.poll(wait_s):
            self.socket.send(peer, codec.encode(self.answer(peer, frame), max_bytes=MAX_BYTES))

    def answer(self, peer: bytes, frame: bytes):
        now, message = time.monotonic(), codec.decode(frame, max_bytes=MAX_BYTES)
        if isinstance(message, Hello):
            return self.sessions.hello(peer, message, version=0, now=now).reply
        session = self.sessions.of(peer, now)
        if session is None:
            return self.sessions.unknown_peer()
        if isinstance(message, Beat):
            session.on_beat(message, now)
        elif self.sessions.see(session, message.seq, len(frame)) is Seen.NEW:
            self.taken.append(message.ordinal)
            self.sessions.mark_durable(session, message.seq)
        return self.sessions.ack(session)


@pytest.fixture
def link():
    """A desk, a proxy in front of it and a generator behind that."""
    end = MemoryDesk()
    with ChaosProxy(parse_address(end.socket.address).port) as proxy:
        source = Generator(proxy.address)
        yield end, proxy, source
        source.socket.close()
        end.socket.close()


def run_until(condition, end: MemoryDesk, source: Generator, timeout_s: float) -> float:
    """Seconds until `condition` held while both ends turn; fails at the deadline."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s"
        source.turn()
        end.turn()
    return time.monotonic() - started


def put(source: Generator, number: int) -> None:
    for _ in range(number):
        source.session.put(failed(), time.monotonic())


def test_a_link_that_is_cut_again_and_again_loses_nothing_and_repeats_nothing(link):
    end, proxy, source = link
    run_until(lambda: source.session.welcomed, end, source, 5)
    for _ in range(8):
        put(source, 20)
        source.turn()
        proxy.cut()
        run_until(lambda: len(end.taken) % 20 > 0 or source.session.outbox_bytes == 0, end, source, 5)
    run_until(lambda: source.session.outbox_bytes == 0, end, source, 10)
    assert end.taken == list(range(1, 161))


def test_a_slow_link_works(link):
    end, proxy, source = link
    proxy.delay_s = 0.2
    put(source, 10)
    run_until(lambda: source.session.outbox_bytes == 0, end, source, 10)
    assert end.taken == list(range(1, 11))


def test_a_half_open_link_is_noticed_by_its_heartbeats_and_replaced_when_the_session_suspects_it(link, monkeypatch):
    end, proxy, source = link
    heartbeats_s = (limits.HEARTBEAT_MS + max(limits.HEARTBEAT_TIMEOUT_MS, limits.HEARTBEAT_TTL_MS)) / 1e3
    monkeypatch.setattr(limits, "SUSPECT_S", 10 * heartbeats_s)  # so that the session is not who notices
    run_until(lambda: source.session.welcomed, end, source, 5)
    put(source, 3)
    proxy.swallow = True
    run_until(lambda: source.socket.disconnects and end.socket.disconnects, end, source, heartbeats_s + LATE_S)
    monkeypatch.undo()
    run_until(lambda: source.reconnects == 1, end, source, limits.SUSPECT_S + LATE_S)
    proxy.swallow = False
    proxy.cut()
    run_until(lambda: source.session.outbox_bytes == 0, end, source, limits.SUSPECT_S + LATE_S)
    assert end.taken == [1, 2, 3]


def test_a_fenced_generator_learns_it_over_the_wire(link):
    end, proxy, source = link
    run_until(lambda: source.session.welcomed, end, source, 5)
    newer = Generator(proxy.address, incarnation=2, instance="i2")
    run_until(lambda: newer.session.welcomed, end, newer, 5)
    run_until(lambda: source.session.refusal is not None, end, source, 5)
    assert isinstance(source.session.refusal, Refusal) and source.session.refusal.code == "fenced"
    newer.socket.close()


# -- a desk that is killed


def start_desk(folder: Path, port: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(DESK_SCRIPT), str(folder), str(port)])


def free_port() -> int:
    """A port that was free a moment ago: each desk must come back on the same one."""
    probe = ServerSocket("tcp://127.0.0.1:*", max_frame_bytes=MAX_BYTES)
    probe.close()
    return parse_address(probe.address).port


def test_nothing_acknowledged_is_lost_while_the_desk_is_killed_again_and_again(tmp_path):
    port, kills = free_port(), 8
    source = Generator(f"tcp://127.0.0.1:{port}")
    process = start_desk(tmp_path, port)
    put_so_far = 0
    try:
        for kill in range(kills):
            settled = put_so_far - len(source.session.unacked_leases())
            goal = settled + 150 + 13 * kill  # at another moment of its work each time
            deadline = time.monotonic() + 15
            while put_so_far - len(source.session.unacked_leases()) < goal:
                assert time.monotonic() < deadline, f"desk {kill} acknowledged too little; link {source.socket.link}"
                while source.session.has_room and source.session.outbox_bytes < 20_000:
                    put(source, 1)
                    put_so_far += 1
                source.turn()
            process.send_signal(signal.SIGKILL)
            process.wait(5)
            check_journal(tmp_path, source, put_so_far)
            process = start_desk(tmp_path, port)
        deadline = time.monotonic() + 15
        while source.session.outbox_bytes:
            assert time.monotonic() < deadline
            source.turn()
    finally:
        process.kill()
        process.wait(5)
        source.socket.close()
    assert journalled(tmp_path) == list(range(1, put_so_far + 1))
    assert source.session.run_epoch == kills + 1


def journalled(folder: Path) -> list[int]:
    """Ordinals in the journal; a torn last line was never acknowledged."""
    text = (folder / "journal").read_text()
    return sorted(int(line.split()[2]) for line in text[: text.rfind("\n") + 1].splitlines())


def check_journal(folder: Path, source: Generator, put_so_far: int) -> None:
    found = journalled(folder)
    assert len(found) == len(set(found)), "accepted twice"
    unacked = {lease.ordinal for lease in source.session.unacked_leases()}
    lost = set(range(1, put_so_far + 1)) - unacked - set(found)
    assert not lost, f"acknowledged but not in the journal: {sorted(lost)}"
