"""The pipes of a reward worker: messages survive them, and what is no message is an error and never a result."""

import msgpack
import pytest

from asyncrl.errors import ProtocolError
from asyncrl.host.pipes import LENGTH, FrameBuffer, framed
from asyncrl.rewards.pipe import (
    MAX_FRAME_BYTES,
    RewardJob,
    Scored,
    WorkerSetup,
    WorkerStarted,
    decode_job,
    decode_scored,
    decode_setup,
    decode_started,
    encode,
)

JOB = RewardJob(["a", "b"], [3, None], "prompt", {"answer": ["7", 1.5, None]}, "<user>prompt")


def packed(content):
    return msgpack.packb(content)


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (WorkerSetup("m:Task", {"n": 1}, {"j": {"kind": "judge"}}, {"j": 0.5}, 2**30), decode_setup),
        (JOB, decode_job),
        (WorkerStarted(), decode_started),
        (WorkerStarted("no such task"), decode_started),
        (Scored({"exact": 1.0}), decode_scored),
        (Scored(None, "reward_timeout", "too late", server_down=True), decode_scored),
    ],
)
def test_a_message_comes_out_as_it_went_in(message, decode):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {"parts": {"exact": "1"}, "reason": "", "detail": "", "server_down": False},
        {"parts": {"exact": 1.0}, "reason": "reward_error", "detail": "", "server_down": False},
        {"parts": {"exact": 1.0}, "reason": "", "detail": "", "server_down": False, "more": 1},
        {"parts": None, "reason": "", "detail": "", "server_down": False},
        {"parts": None, "reason": "reward_error", "detail": 1, "server_down": False},
        {"error": ""},
    ],
)
def test_what_is_no_result_is_an_error(content):
    with pytest.raises(ProtocolError, match="something that is not a result"):
        decode_scored(packed(content))


def test_what_cannot_be_read_is_an_error():
    for decode in (decode_scored, decode_started):
        with pytest.raises(ProtocolError, match="cannot be read"):
            decode(b"\xc1")


def test_frames_are_cut_wherever_the_pipe_cut_them():
    frames = framed(encode(Scored({"exact": 1.0}))) + framed(encode(Scored({"exact": 0.0})))
    buffer, taken = FrameBuffer(MAX_FRAME_BYTES), []
    for byte in frames:
        buffer.feed(bytes([byte]))
        taken += buffer.take(decode_scored)
    assert [scored.parts for scored in taken] == [{"exact": 1.0}, {"exact": 0.0}]


@pytest.mark.parametrize(
    "bad", [framed(packed(["nonsense"])), LENGTH.pack(MAX_FRAME_BYTES + 1), LENGTH.pack(1) + b"\xc1"]
)
def test_results_before_what_is_none_are_taken_first(bad):
    buffer = FrameBuffer(MAX_FRAME_BYTES)
    buffer.feed(framed(encode(Scored({"exact": 1.0}))) + bad)
    assert buffer.take(decode_scored) == [Scored({"exact": 1.0})]
    with pytest.raises(ProtocolError):
        buffer.take(decode_scored)
    buffer.clear()
    assert buffer.take(decode_scored) == []


def test_a_job_goes_on_after_the_completions_that_are_scored():
    rest = JOB.without_first(1)
    assert (rest.completions, rest.num_tokens, rest.prompt, rest.payload) == (["b"], [None], "prompt", JOB.payload)
    (sample,) = rest.samples()
    assert (sample.completion, sample.num_tokens) == ("b", None)
