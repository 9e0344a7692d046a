"""The connections between the publishers of trainer ranks: who is let in, what is noticed, and until when."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time

import pytest

from asyncrl.errors import BindError, ChannelError, RankLost
from asyncrl.link.trainer_messages import Broadcast, CloseChannel, ShardReady
from asyncrl.weights import relay as relay_module
from asyncrl.weights.relay import Relay, join_relay
from asyncrl.weights.sender import Sending, Sent
from tests.waits import LATE_S, wait_until


@pytest.fixture
def relay():
    relay = Relay("127.0.0.1", 3)
    yield relay
    relay.close()


def joined(relay):
    """Both other ends, and how often rank 0 was woken."""
    ends, woken = [], []
    threads = [
        threading.Thread(target=lambda rank=rank: ends.append((rank, join_relay(relay.invitation, rank, 10.0))))
        for rank in (1, 2)
    ]
    for thread in threads:
        thread.start()
    relay.accept(10.0, lambda: woken.append(True))
    for thread in threads:
        thread.join()
    return dict(ends), woken


def test_messages_go_both_ways_and_wake_rank_0(relay):
    ends, woken = joined(relay)
    relay.tell(lambda rank: CloseChannel(rank) if rank == 2 else None)
    assert ends[2].receive(10.0) == CloseChannel(2)
    with pytest.raises(ChannelError, match=r"nothing came within 0.1 s"):
        ends[1].receive(0.1)
    ready = ShardReady(7, list(range(10**12, 10**12 + 50_000)), None, 1.5)
    ends[1].send(ready)
    assert relay.take(10.0) == (1, ready) and woken
    assert relay.take() is None


def test_an_end_that_closes_is_noticed_at_once_and_named(relay):
    ends, woken = joined(relay)
    started = time.monotonic()
    ends[2].close()
    wait_until(lambda: woken, "the end of rank 2")
    with pytest.raises(RankLost, match="publisher of rank 2: its connection ended"):
        relay.take(10.0)
    assert time.monotonic() - started < LATE_S
    relay.close()
    assert ends[1].receive(10.0) is None, "the other one is let go"


def test_who_does_not_come_is_named_and_strangers_do_not_count(relay):
    host, port, token = json.loads(relay.invitation)
    strangers = []
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<Q", 2**62)):
        strangers.append(socket.create_connection((host, port)))
        strangers[-1].sendall(greeting)
    for rank, shown in ((1, "wrong"), (2, token)):
        strangers.append(join_relay(json.dumps([host, port, shown]), rank, 10.0))
    with pytest.raises(RankLost, match=r"publisher of rank 1 did not come within 1 s"):
        relay.accept(1.0, lambda: None)
    assert strangers[2].receive(10.0) is None, "its token is wrong"
    for stranger in strangers:
        stranger.close()


def test_a_message_that_breaks_off_or_is_too_long_ends_the_connection(relay, monkeypatch):
    ends, _ = joined(relay)
    ends[1]._socket.sendall(struct.pack("<Q", 100) + b"half")
    ends[1].close()
    with pytest.raises(RankLost, match="publisher of rank 1: the connection ended within a message"):
        relay.take(10.0)
    ends[2]._socket.sendall(struct.pack("<Q", relay_module.MAX_FRAME_BYTES + 1))
    with pytest.raises(
        RankLost, match="publisher of rank 2: a message of 1073741825 bytes, must be at most 1073741824"
    ):
        relay.take(10.0)


def test_an_address_of_another_machine_and_a_relay_that_is_gone():
    with pytest.raises(BindError, match=r"weights.host=192.0.2.1"):
        Relay("192.0.2.1", 2)
    relay = Relay("127.0.0.1", 2)
    relay.close()
    with pytest.raises(ChannelError, match="rank 1 does not reach the publisher of rank 0"):
        join_relay(relay.invitation, 1, 1.0)


ORDER = Broadcast(version=3, attempt=0, channel_epoch=7, timeout_s=5.0)


def reports(*pairs):
    sending = Sending(ORDER, {0, 1}, 0.0)
    for rank, error in pairs:
        sending.waiting.discard(rank)
        sending.reports.append(Sent(7, ORDER, error, 10.0 + rank, 100, rank))
    return sending.result()


def test_a_broadcast_is_over_when_all_senders_are_through_and_failed_when_one_is():
    assert reports((0, "")) is None and reports((1, "")) is None
    assert reports((1, ""), (0, "")) == Sent(7, ORDER, "", 11.0, 200)
    assert reports((1, "a member is gone")) == Sent(7, ORDER, "sender 1: a member is gone", 11.0, 100)
    assert reports((0, "a member is gone")).error == "a member is gone"
