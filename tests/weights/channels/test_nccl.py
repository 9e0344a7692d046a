"""What an NCCL process group is told and when it is let go of, on a stand-in for torch's class: no GPU is needed."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
import weakref
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels import collectives
from asyncrl.weights.channels.channel import WeightChannel
from asyncrl.weights.channels.collectives import NcclTransport
from tests.waits import LATE_S, wait_until

SPEC = ChannelSpec("127.0.0.1", 0, "nccl/1", 0, 2, "nccl", 20.0)
SWITCH = "TORCH_NCCL_BLOCKING_WAIT"


class Work:
    """Like torch's: `wait` of a failed one raises, of one under way it would not return; both let go of tensors."""

    def __init__(self, done, error):
        self.done, self.error, self.waits = done, error, 0

    def is_completed(self):
        return self.error is not None or self.done.is_set()

    def wait(self):
        assert self.is_completed()
        self.waits += 1
        if self.error is not None:
            raise dist.DistBackendError(self.error)


class Nccl:
    """Stands for dist.ProcessGroupNCCL, and remembers what was done with those made."""

    def __init__(self):
        self.done, self.may_make = threading.Event(), threading.Event()
        self.may_make.set()
        self.being_made = threading.Event()
        self.error, self.process_groups = None, []
        self.inside, self.most_inside = 0, 0  # calls that make a process group, now and at most

    @staticmethod
    def Options(*, is_high_priority_stream):  # noqa: N802 - torch's name
        assert not is_high_priority_stream
        return SimpleNamespace(config=SimpleNamespace(blocking=None), _timeout=None)

    def __call__(self, store, rank, world_size, options):
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.being_made.set()
        assert self.may_make.wait(20.0)
        self.inside -= 1
        process_group = SimpleNamespace(
            place=(rank, world_size), options=options, switch=os.environ.get(SWITCH), sizes=[], works=[], aborts=0
        )

        def broadcast(parts, options):
            process_group.sizes += [part.nbytes for part in parts]
            process_group.works.append(Work(self.done, self.error))
            return process_group.works[-1]

        def abort():
            process_group.aborts += 1

        process_group.broadcast, process_group.abort = broadcast, abort
        self.process_groups.append(process_group)
        return process_group


class OnCpu(NcclTransport):
    def __init__(self, spec, device, aborted):
        super().__init__(spec, torch.device("cuda"), aborted)
        self._device = device

    def _own_stream(self, *, wait=False):
        return nullcontext()


def host(prefix="nccl/1"):
    return WeightChannel.host(dataclasses.replace(SPEC, prefix=prefix), transports={"nccl": OnCpu})


@pytest.fixture
def nccl(monkeypatch):
    nccl = Nccl()
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)  # torch for CPUs has none
    monkeypatch.delenv(SWITCH, raising=False)
    return nccl


def failing(call):
    """The text of the ChannelError that `call` ends with, and the seconds it took."""
    started = time.monotonic()
    with pytest.raises(ChannelError) as failure:
        call()
    return str(failure.value), time.monotonic() - started


def until_aborted(nccl):
    wait_until(lambda: nccl.process_groups and nccl.process_groups[0].aborts, "the end of the channel")


def joined(nccl):
    channel = host()
    nccl.done.set()
    channel.join()
    nccl.done.clear()
    return channel


def test_a_channel_is_formed_when_its_first_broadcast_is_done_and_has_no_watchdog(nccl):
    channel = host()
    joining = threading.Thread(target=channel.join, daemon=True)
    joining.start()
    joining.join(0.3)
    assert joining.is_alive(), "nobody else has come"
    nccl.done.set()
    joining.join(10.0)
    assert not joining.is_alive()
    (made,) = nccl.process_groups
    assert made.place == (0, 2) and made.sizes == [1] and made.works[0].waits == 1
    assert made.switch == "1" and SWITCH not in os.environ
    assert made.options.config.blocking == 0 and made.options._timeout > timedelta(hours=1)
    told = []
    channel.broadcast([torch.zeros(5), torch.zeros(7)], 10.0, told.append)
    assert made.sizes[1:] == told == [20, 28] and [work.waits for work in made.works] == [1, 1, 1]
    assert not made.aborts
    channel.close()
    assert made.aborts == 1


def test_a_member_that_does_not_come_ends_the_forming_at_its_deadline(nccl):
    channel = host()
    text, elapsed_s = failing(lambda: channel.join(0.5))
    assert "forming weight channel 'nccl/1' as rank 0 of 2" in text and "did not take part in time" in text
    assert 0.4 < elapsed_s < 0.5 + LATE_S
    channel.close()
    assert nccl.process_groups[0].aborts == 1 and not nccl.process_groups[0].works[0].waits


def test_a_broadcast_that_hangs_ends_at_its_deadline_and_its_memory_stays_until_it_was_aborted(nccl):
    channel = joined(nccl)
    part = torch.zeros(100)
    memory, alive_at_abort = weakref.ref(part), []
    text, elapsed_s = failing(lambda parts=[part]: channel.broadcast(parts, 0.5))
    assert "did not take part in time" in text and 0.4 < elapsed_s < 0.5 + LATE_S
    del part
    gc.collect()
    nccl.process_groups[0].abort = lambda: alive_at_abort.append(memory() is not None)
    channel.close()
    assert alive_at_abort == [True]
    gc.collect()
    assert memory() is None


def test_an_error_of_nccl_is_one_of_the_channel(nccl):
    channel = joined(nccl)
    nccl.error = "remote process exited\nLast error: connection reset"
    text, elapsed_s = failing(lambda: channel.broadcast([torch.zeros(5)], 30.0))
    assert "broadcast of 20 bytes" in text and text.endswith("remote process exited") and elapsed_s < LATE_S
    channel.close()
    nccl.process_groups.clear()
    channel = host("nccl/2")
    assert failing(channel.join)[0].endswith("remote process exited")
    channel.close()
    assert nccl.process_groups[0].aborts == 1


@pytest.mark.parametrize("method", ["abort", "close"])
def test_a_channel_that_is_given_up_while_it_is_formed_is_aborted(nccl, method):
    channel = host()

    def give_up():
        wait_until(lambda: nccl.process_groups and nccl.process_groups[0].works, "the first broadcast")
        getattr(channel, method)()

    giving_up = threading.Thread(target=give_up, daemon=True)
    giving_up.start()
    text, elapsed_s = failing(lambda: channel.join(30.0))
    assert text.endswith("aborted") and elapsed_s < LATE_S
    giving_up.join(10.0)
    channel.close()
    until_aborted(nccl)


@pytest.mark.parametrize("method", ["abort", "close"])
def test_a_channel_that_is_given_up_before_torch_has_made_it_is_aborted_when_it_appears(nccl, method):
    channel = host()
    nccl.may_make.clear()
    ended = []
    joining = threading.Thread(target=lambda: ended.append(failing(channel.join)[0]), daemon=True)
    joining.start()
    assert nccl.being_made.wait(10.0)
    getattr(channel, method)()
    joining.join(10.0)
    assert ended and ended[0].endswith("aborted")
    nccl.may_make.set()
    until_aborted(nccl)
    assert nccl.process_groups[0].sizes == []
    channel.close()


class CountingLock:
    """A lock that knows how many have come for it, whether they wait or have got it."""

    def __init__(self):
        self.arrivals = 0
        self._lock, self._counting = threading.Lock(), threading.Lock()

    def __enter__(self):
        with self._counting:
            self.arrivals += 1
        return self._lock.__enter__()

    def __exit__(self, *error):
        return self._lock.__exit__(*error)


def test_process_groups_made_at_the_same_time_leave_the_environment_as_it_was(nccl, monkeypatch):
    making = CountingLock()
    monkeypatch.setattr(collectives, "_making", making)
    monkeypatch.setenv(SWITCH, "0")
    nccl.done.set()
    nccl.may_make.clear()
    channels = [host(f"nccl/{number}") for number in range(3)]
    joining = [threading.Thread(target=channel.join, daemon=True) for channel in channels]
    for thread in joining:
        thread.start()
    assert nccl.being_made.wait(10.0)
    wait_until(lambda: making.arrivals == 3 or nccl.inside > 1, "the others")
    nccl.may_make.set()
    for thread in joining:
        thread.join(10.0)
    assert nccl.most_inside == 1, "one would restore what another had set"
    assert [made.switch for made in nccl.process_groups] == ["1"] * 3 and os.environ[SWITCH] == "0"
    for channel in channels:
        channel.close()


def test_nccl_needs_a_gpu():
    with pytest.raises(ChannelError, match="nccl needs a cuda device, not cpu; use gloo"):
        WeightChannel.host(SPEC, "cpu")
