"""The thread that sends in one weight channel: how each end of it is reported."""

from __future__ import annotations

import queue

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.link.trainer_messages import Broadcast
from asyncrl.weights.sender import ChannelSender, Parts, Sent

TIMEOUT_S = 10.0
PARTS = Parts([torch.zeros(10, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)], [0, 0])


class Channel:
    """A channel that sends one part and then does what it was told to."""

    def __init__(self, failure=None):
        self.failure, self.closed = failure, 0

    def join(self, timeout_s):
        pass

    def broadcast(self, parts, timeout_s, on_part, senders=None):
        on_part(parts[0].nbytes)
        if self.failure is not None:
            raise self.failure
        on_part(parts[1].nbytes)

    def abort(self):
        pass

    def close(self):
        self.closed += 1


def start(channel):
    reports = queue.Queue()
    sender = ChannelSender(channel, 7, reports.put)
    sender.start()
    return sender, lambda: reports.get(timeout=TIMEOUT_S)


def order(attempt=0):
    return Broadcast(version=3, attempt=attempt, channel_epoch=7, timeout_s=TIMEOUT_S)


def test_broadcasts_follow_each_other_until_the_channel_is_closed():
    channel = Channel()
    sender, report = start(channel)
    for attempt in (0, 1):
        sender.send(order(attempt), PARTS)
        sent = report()
        assert (sent.order.attempt, sent.error, sent.num_bytes) == (attempt, "", 15) and channel.closed == 0
    sender.close()
    assert report() == Sent(7) and channel.closed == 1


def test_a_channel_that_failed_is_closed_before_it_is_reported_and_how_far_it_was_is_told():
    channel = Channel(ChannelError("worker 2 is gone"))
    sender, report = start(channel)
    sender.send(order(), PARTS)
    assert report().error == "worker 2 is gone (10 of 15 bytes were sent)" and channel.closed == 1
    sender.close()
    assert report() == Sent(7)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_our_own_is_reported_with_its_order_and_closes_the_channel_and_frees_its_memory():
    channel = Channel(ZeroDivisionError("a bug"))
    sender, report = start(channel)
    sender.send(order(4), PARTS)
    sent = report()
    assert (sent.order.attempt, sent.error) == (4, "ZeroDivisionError('a bug') (10 of 15 bytes were sent)")
    assert channel.closed
    assert report() == Sent(7)
    sender.join(TIMEOUT_S)
    assert not sender.is_alive()
