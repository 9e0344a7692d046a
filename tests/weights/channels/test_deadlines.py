"""Every call of a channel ends at its deadline, whatever the transport below it does."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.rendezvous import SLACK_S, within
from tests.waits import LATE_S, wait_until
from tests.weights.channels.hanging_transport import hanging
from tests.weights.channels.members import in_threads, pair

SPEC = ChannelSpec("127.0.0.1", 0, "hang/1", 0, 2, "hanging", 20.0)
NUM_BYTES = 4096
CLOSE_S = 0.5  # of `abort` and `close`


@pytest.fixture
def hangs():
    with hanging(CLOSE_S) as hangs:
        yield hangs


class Failing:
    """A call that must fail: how long it took and what it said."""

    def __init__(self, call):
        self._call = call

    def __call__(self):
        started = time.monotonic()
        with pytest.raises(ChannelError) as failure:
            self._call()
        self.elapsed_s, self.text = time.monotonic() - started, str(failure.value)


def buffer(value=0):
    return torch.full((NUM_BYTES,), value, dtype=torch.uint8)


def assert_bytes_arrive_in_a_new_channel(hangs, number):
    root, member = pair(dataclasses.replace(SPEC, prefix=f"hang/{number}"), **hangs.options)
    sent, taken = buffer(number), buffer()
    in_threads(lambda: root.broadcast([sent], 10.0), lambda: member.broadcast([taken], 10.0))
    assert torch.equal(sent, taken)
    root.close()
    member.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_forming_ends_on_both_sides_and_names_what_it_waited_for(hangs, rank):
    hangs.places = {("form", rank)}
    root = WeightChannel.host(SPEC, **hangs.options)
    member = WeightChannel(root.spec.for_rank(1), **hangs.options)
    calls = [Failing(lambda: root.join(1.0)), Failing(lambda: member.join(1.0))]
    in_threads(*calls)
    for call in calls:
        assert 0.9 < call.elapsed_s < 1.0 + SLACK_S + LATE_S
        assert "forming weight channel 'hang/1' as rank" in call.text
    assert "no answer within 1.5 s, waiting for a form that never ends; the call was abandoned" in calls[rank].text
    root.close()
    member.close()
    hangs.places = set()
    assert_bytes_arrive_in_a_new_channel(hangs, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broadcast_ends_on_both_sides_and_names_what_it_waited_for(hangs, rank):
    root, member = pair(SPEC, **hangs.options)
    hangs.places = {("broadcast", rank)}
    calls = [Failing(lambda: root.broadcast([buffer(1)], 1.0)), Failing(lambda: member.broadcast([buffer()], 1.0))]
    in_threads(*calls)
    for call in calls:
        assert 0.9 < call.elapsed_s < 1.0 + SLACK_S + LATE_S
        assert f"broadcast of {NUM_BYTES} bytes in weight channel 'hang/1'" in call.text
    assert "waiting for a broadcast that never ends; the call was abandoned" in calls[rank].text
    for channel in (root, member):
        with pytest.raises(ChannelError, match="the channel is dead"):
            channel.broadcast([buffer()], 1.0)
        channel.close()
    hangs.places = set()
    assert_bytes_arrive_in_a_new_channel(hangs, 2)


@pytest.mark.parametrize("method", ["abort", "close"])
@pytest.mark.parametrize("rank", [0, 1])
def test_abort_and_close_end_and_name_what_they_waited_for(hangs, method, rank):
    channel = pair(SPEC, **hangs.options)[rank]
    hangs.places = {(method, rank)}
    call = Failing(getattr(channel, method))
    in_threads(call)
    assert CLOSE_S - 0.1 < call.elapsed_s < CLOSE_S + LATE_S
    assert f"weight channel 'hang/1': no answer within {CLOSE_S} s, waiting for a {method} that never ends" in call.text
    hangs.places = set()
    channel.close()  # after a close that hung there is nothing left to do
    assert_bytes_arrive_in_a_new_channel(hangs, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_abort_reaches_a_call_that_hangs(hangs, rank):
    channel = pair(SPEC, **hangs.options)[rank]
    hangs.places = {("broadcast", rank)}
    call = Failing(lambda: channel.broadcast([buffer()], 30.0))

    def abort():
        wait_until(lambda: hangs.threads, "the call to hang")
        channel.abort()

    in_threads(call, abort, timeout_s=40.0)
    assert call.elapsed_s < LATE_S and "aborted" in call.text
    channel.close()


def test_what_was_abandoned_touches_nothing_of_a_later_channel_when_it_goes_on(hangs):
    root, member = pair(SPEC, **hangs.options)
    hangs.places = {("broadcast", 1)}
    old, sent = buffer(), buffer(5)
    in_threads(
        Failing(lambda: root.broadcast([sent], 0.5)),
        Failing(lambda: member.broadcast([old], 0.5)),
    )
    hangs.places = {("close", 0), ("close", 1)}
    in_threads(Failing(root.close), Failing(member.close))
    hangs.places = set()

    later, taken = pair(dataclasses.replace(SPEC, prefix="hang/2"), **hangs.options), buffer()
    in_threads(lambda: later[0].broadcast([sent], 10.0), lambda: later[1].broadcast([taken], 10.0))
    hangs.release()  # the abandoned broadcast overwrites its buffer, the abandoned closes close
    assert (old != 0).all() and (taken == 5).all() and (sent == 5).all()
    in_threads(lambda: later[0].broadcast([sent], 10.0), lambda: later[1].broadcast([taken], 10.0))
    assert root._transport is None and member._transport is None
    for channel in later:
        channel.close()


def test_a_call_that_fails_keeps_nothing_of_what_it_worked_with_alive():
    """Its frames would: a connection closes only when nothing holds its objects, and errors are kept for long."""
    import gc
    import weakref

    class Connection:
        pass

    alive = []

    def failing():
        connection = Connection()
        alive.append(weakref.ref(connection))
        raise RuntimeError("broken")

    gc.disable()
    try:
        with pytest.raises(ChannelError, match=r"work failed after \d+\.\d+ s: broken") as failure:
            within(5.0, "work", failing)
        assert failure.value.__cause__ is not None and alive[0]() is None
    finally:
        gc.enable()
