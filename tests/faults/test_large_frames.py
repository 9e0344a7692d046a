"""Large frames: what is too long is refused before objects are made of it."""

from __future__ import annotations

import gc
import time

import msgpack
import numpy as np
import pytest

from asyncrl.config.checks import largest_group_bytes
from asyncrl.desk.boundary import Boundary
from asyncrl.desk.daemon import MIN_RECEIVED_BYTES, largest_received_bytes
from asyncrl.desk.desk import FROM_GENERATOR
from asyncrl.errors import FrameError, ProtocolError
from asyncrl.link import codec, messages
from asyncrl.link.rollouts import check_lengths, result_to_group
from asyncrl.link.wire_types import MAX_LEASES, MAX_ROLLOUTS, MAX_SPANS
from asyncrl.types import LeaseKey, LeaseKind
from tests.desk.desk_parts import beat, small_config
from tests.link.test_codec import frame_of

MAX_BYTES = 64 * 2**20
FROZE_S = 5.0  # what such a frame cost when an object was made of each span
REFUSED_S = 0.5  # of CPU time: the frame has to be read and its checksum computed
NUM_SPANS = 2_600_000


def spans(number):
    starts = np.arange(number, dtype="<i8")
    return np.stack([starts, starts + 1, np.zeros(number, "<i8")], axis=1).tobytes()


def rollout(**changes):
    values = {
        "tokens": bytes(12),
        "logprobs": bytes(12),
        "spans": spans(1),
        "finish": "stop",
        "reward": 0.5,
        "parts": {},
    }
    return values | changes


def result_frame(rollouts):
    body = msgpack.packb([1, 1, "train", 0, 0, bytes(8), rollouts])
    return frame_of(body, messages.GroupResult.wire_code)


@pytest.fixture
def small_heap():
    """As a daemon has: what other tests have left is nothing that the garbage collector walks through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
def test_R9_a_frame_of_millions_of_version_spans_is_refused_at_once():
    frame = result_frame([rollout(spans=spans(NUM_SPANS))])
    assert len(frame) > 60 * 10**6
    started = time.thread_time()
    with pytest.raises(FrameError, match="spans is bytes of length 62400000, must be of at most 24576"):
        codec.decode(frame, max_bytes=MAX_BYTES)
    assert time.thread_time() - started < REFUSED_S < FROZE_S / 5


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([rollout()] * 20_000, "rollouts is list of length 20000|container of"),
        ([rollout(parts={f"{n}": 0.0 for n in range(30_000)})], "parts is dict of length 30000"),
        ([[[]] * 60_000], "must be a map"),
    ],
    ids=["rollouts", "parts", "empty lists"],
)
def test_R9_other_long_things_are_refused_at_once(fields, says):
    frame = result_frame(fields)
    started = time.thread_time()
    with pytest.raises(FrameError, match=says):
        codec.decode(frame, max_bytes=MAX_BYTES)
    assert time.thread_time() - started < REFUSED_S


@pytest.mark.parametrize(
    ("rollouts", "says"),
    [
        ([rollout()] * 5, "5 rollouts, at most 4 were leased"),
        ([rollout(tokens=bytes(28))], "rollout 0: 7 tokens, at most max_new_tokens = 6"),
        ([rollout(logprobs=bytes(4_000_000))], "1000000 tokens, at most max_new_tokens = 6"),
        ([rollout(), rollout(spans=spans(MAX_SPANS))], "rollout 1: 1024 version spans for 3 tokens"),
    ],
)
def test_R9_what_no_lease_can_have_asked_for_is_refused_before_it_is_a_group(rollouts, says):
    result = codec.decode(result_frame(rollouts), max_bytes=MAX_BYTES)
    with pytest.raises(ProtocolError, match=says):
        check_lengths(result, max_rollouts=4, max_new_tokens=6)


def test_R9_the_largest_result_that_passes_takes_milliseconds():
    longest = rollout(tokens=bytes(4 * MAX_SPANS), logprobs=bytes(4 * MAX_SPANS), spans=spans(MAX_SPANS))
    result = codec.decode(result_frame([longest] * 64), max_bytes=MAX_BYTES)
    started = time.thread_time()
    check_lengths(result, max_rollouts=64, max_new_tokens=MAX_SPANS)
    result_to_group(result)
    assert time.thread_time() - started < 2 * REFUSED_S  # 65,536 spans, each of them an object


def test_R9_a_beat_with_as_many_leases_as_may_be_is_read_fast():
    active = [messages.ActiveLease(LeaseKind.TRAIN, 2**40 + n, 2**20, 2**20) for n in range(MAX_LEASES)]
    frame = codec.encode(beat(active=active, tickets=[bytes(16)] * MAX_LEASES), max_bytes=MIN_RECEIVED_BYTES)
    started = time.thread_time()
    codec.decode(frame, max_bytes=MIN_RECEIVED_BYTES)
    assert time.thread_time() - started < REFUSED_S


def test_R9_frames_are_bounded_by_what_the_run_can_need():
    small = small_config()
    assert largest_received_bytes(small) == MIN_RECEIVED_BYTES < small.transport.max_frame_bytes
    large = small_config(sampling__group_size=64, sampling__max_new_tokens=16_384)
    assert largest_group_bytes(large) < largest_received_bytes(large) < large.transport.max_frame_bytes
    huge = small_config(sampling__group_size=MAX_ROLLOUTS, sampling__max_new_tokens=16_384)
    assert largest_received_bytes(huge) == huge.transport.max_frame_bytes


def test_R9_an_abandon_of_all_leases_of_a_beat_can_be_sent():
    needless = [LeaseKey(LeaseKind.TRAIN, 2**60 + n, 2**60) for n in range(MAX_LEASES)]
    codec.encode(messages.Abandon(1, needless), max_bytes=MIN_RECEIVED_BYTES)


def test_R9_the_boundary_reads_no_frame_over_the_limit_of_its_socket():
    class Inbox:
        """Hands out one frame that libzmq would not have taken."""

        max_frame_bytes = 1000

        def receive(self):
            return [(b"p", codec.encode(messages.Bye("x" * 2000), max_bytes=MAX_BYTES))]

    class Generators:
        """Knows nobody."""

        def name_of(self, peer):
            return ""

    handled = []
    Boundary(Generators()).from_generators(Inbox(), FROM_GENERATOR, lambda *call: handled.append(call), 0.0)
    assert handled == []
