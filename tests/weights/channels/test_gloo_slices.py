"""gloo's broadcast is waited for slice by slice: a slice that expires says nothing about the transfer."""

from __future__ import annotations

import threading

import pytest
import torch

from asyncrl.errors import ChannelError
from asyncrl.link.weight_records import ChannelSpec
from asyncrl.weights.channels.collectives import GlooTransport

SPEC = ChannelSpec("127.0.0.1", 1, "slices", 0, 2, "gloo", 5.0)


class Work:
    """A transfer that outlasts some slices and ends right after the last of them, in the eyes of who waited for it."""

    def __init__(self, slices, failure=None):
        self.slices, self.failure = slices, failure

    def wait(self, timeout=None):
        if self.slices > 0:
            self.slices -= 1
            raise RuntimeError("Operation timed out!")
        if self.failure:
            raise self.failure
        return True

    def is_completed(self):
        return self.slices == 0


class ProcessGroup:
    def __init__(self, work):
        self.work = work

    def broadcast(self, tensors, options):
        return self.work


def broadcast(work, timeout_s=5.0):
    transport = GlooTransport(SPEC, torch.device("cpu"), threading.Event())
    transport._process_group = ProcessGroup(work)
    transport.broadcast([torch.zeros(4)], timeout_s, lambda num_bytes: None, [0])


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_a_transfer_that_ends_just_after_a_slice_expired_is_no_failure(slices):
    broadcast(Work(slices))


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_a_transfer_that_failed_is_one_with_its_own_reason(slices):
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        broadcast(Work(slices, RuntimeError("Connection closed by peer")))


def test_a_transfer_that_never_ends_is_given_up_at_the_deadline():
    with pytest.raises(ChannelError, match="did not take part"):
        broadcast(Work(10**9), timeout_s=0.05)
