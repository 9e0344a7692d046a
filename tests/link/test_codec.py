"""Frames: what goes in comes out, and nothing that is wrong does."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc
import typing
import zlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given, settings

from asyncrl.errors import FrameError, ProtocolError
from asyncrl.link import codec
from asyncrl.link.field_checks import from_plain, to_plain
from asyncrl.link.messages import (
    Abandon,
    Ack,
    ActiveLease,
    Beat,
    GroupResult,
    Hello,
    LeaseFailed,
    LeaseGrant,
    Nack,
    SyncReply,
    WireRollout,
)
from asyncrl.link.schema.body_limits import BASE_OBJECTS, MAX_DEPTH, check_body
from asyncrl.link.schema.field_rules import Fields, Line, Printed, Within
from asyncrl.link.schema.message_base import message_types
from asyncrl.link.trainer_messages import Batch, StepDone
from asyncrl.link.weight_records import DeltaInfo, Patch, TensorEntry, WeightLayout, WeightManifest
from asyncrl.link.wire_types import JSON_LIKE, KEY, FailureReason, PayloadValue, SyncPhase
from asyncrl.types import FinishReason, LeaseKey, LeaseKind

MAX_BYTES = 64 * 2**20
TYPES = sorted(message_types().values(), key=lambda cls: cls.wire_code)


def values(hint, rule=None) -> st.SearchStrategy:
    """Any value of an annotation, within its rule."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return payload_values if args[1] == JSON_LIKE else values(args[0], args[1])
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if args:  # optional
        return st.none() | values(next(arg for arg in args if arg is not type(None)))
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if isinstance(rule, Fields):
        return st.builds(hint, **{name: values(inner) for name, inner in _hints(hint, rule).items()})
    if isinstance(rule, Within):
        if hint is int:
            return st.integers(int(rule.low), int(rule.high))
        return st.floats(rule.low, rule.high)
    if isinstance(rule, Line):
        return st.from_regex(rf"[!-~]{{{rule.least},20}}", fullmatch=True)
    if isinstance(rule, Printed):
        return st.from_regex(r"[ -~]{0,20}", fullmatch=True)
    return SIMPLE[hint] if hint in SIMPLE else records(hint)


def _hints(cls, rule) -> dict:
    return typing.get_type_hints(cls, include_extras=True) | dict(rule.hints)


def records(cls) -> st.SearchStrategy:
    """Any message, or record inside one."""
    if cls in MADE_BY_RULE:
        return MADE_BY_RULE[cls]
    hints = typing.get_type_hints(cls, localns={"PayloadValue": PayloadValue}, include_extras=True)
    return st.builds(cls, **{name: values(hint) for name, hint in hints.items() if name != "wire_code"})


SIMPLE = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=50),
}
payload_values = st.recursive(
    st.none() | st.one_of(*SIMPLE.values()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
layouts = st.lists(st.integers(1, 3), max_size=3).map(
    lambda sizes: WeightLayout(
        64 * sum(sizes),
        tuple(TensorEntry(f"{i}", "bfloat16", (4, 8), 64 * sum(sizes[:i])) for i in range(len(sizes))),
        tuple((64 * sum(sizes[:i]), 64 * sum(sizes[: i + 1])) for i in range(len(sizes))),
    )
)
numbers, digests = st.integers(0, 2**62 - 1), SIMPLE[int]
MADE_BY_RULE = {  # records whose fields must fit together
    DeltaInfo: st.builds(DeltaInfo, numbers, st.integers(0, 2**53 - 1), digests, st.integers(1, 2**53 - 1)),
    WeightManifest: layouts.flatmap(
        lambda layout: st.builds(
            WeightManifest,
            numbers,
            st.just(layout),
            st.tuples(*[digests for _ in layout.buckets]),
            st.none() | st.deferred(lambda: records(Patch)),
            st.none() | st.deferred(lambda: MADE_BY_RULE[DeltaInfo]),
        )
    ),
}
messages = st.sampled_from(TYPES).flatmap(records)


def frame_of(body: bytes, code: int = Ack.wire_code, **changes) -> bytes:
    """A frame with a right checksum around any body, written here independently of the codec."""
    fields = {"magic": b"aRL\x01", "format": 1, "flags": 0, "body_len": len(body), "reserved": bytes(8)} | changes
    head = struct.pack("<4sHHIQ", fields["magic"], fields["format"], code, fields["flags"], fields["body_len"])
    return head + struct.pack("<I", zlib.crc32(head + body)) + fields["reserved"] + body


def decode(frame: bytes, **limits):
    return codec.decode(frame, **{"max_bytes": MAX_BYTES, **limits})


@given(messages)
@settings(max_examples=150, deadline=None)
def test_every_message_comes_back_as_it_was(message):
    frame = codec.encode(message, max_bytes=MAX_BYTES)
    assert decode(frame) == message
    assert codec.decode_body(type(message), codec.body_of(frame)) == message
    assert codec.frame_with_body(type(message), codec.body_of(frame), max_bytes=MAX_BYTES) == frame


@pytest.mark.parametrize("cls", TYPES, ids=lambda cls: cls.__name__)
def test_every_class_has_a_plan_and_its_own_code(cls):
    assert 0 < cls.wire_code < 2**16
    assert codec.plan_of(cls).required >= 1


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data):
    with pytest.raises(FrameError):
        decode(data)


@given(st.sampled_from(TYPES), st.binary(max_size=200))
@settings(max_examples=400, deadline=None)
def test_a_random_body_under_a_right_checksum_is_refused_or_a_whole_message(cls, body):
    try:
        message = decode(frame_of(body, cls.wire_code))
    except FrameError:
        return
    assert type(message) is cls


@given(messages, st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_is_always_noticed(message, data):
    frame = bytearray(codec.encode(message, max_bytes=MAX_BYTES))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        decode(bytes(frame))


@given(messages, st.data())
@settings(max_examples=200, deadline=None)
def test_a_body_changed_under_a_right_checksum_never_gives_a_field_of_the_wrong_type(message, data):
    """What an attacker can send: the checksum is right, the content is not."""
    body = bytearray(codec.encode_body(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode(frame_of(bytes(body), type(message).wire_code))
    except FrameError:
        return
    codec.encode_body(got)  # checks every field again


@given(messages, st.data())
@settings(max_examples=200, deadline=None)
def test_a_cut_frame_is_refused(message, data):
    frame = codec.encode(message, max_bytes=MAX_BYTES)
    with pytest.raises(FrameError):
        decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


# -- the header


ACK_BODY = msgpack.packb([1, 2, [], 3])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"magic": b"HTTP"}, "not asyncrl"),
        ({"format": 2}, "frame format 2"),
        ({"flags": 1}, "flags 0x1"),
        ({"reserved": b"12345678"}, "same asyncrl version"),
        ({"body_len": 2**40}, "header says 1099511627776 body bytes"),
        ({"code": 999}, "unknown message code 999"),
    ],
)
def test_a_wrong_header_is_refused_by_name(change, says):
    assert decode(frame_of(ACK_BODY)) == Ack(1, 2, [], 3)
    with pytest.raises(FrameError, match=says):
        decode(frame_of(ACK_BODY, **change))


def test_a_frame_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match="must be 32 to 100"):
        decode(bytes(1000), max_bytes=100)
    with pytest.raises(FrameError, match=r"LeaseFailed of \d+ bytes is over the limit of 100: raise transport"):
        codec.encode(LeaseFailed(1, 1, LeaseKind.TRAIN, 1, 0, FailureReason.ENGINE, "x" * 100), max_bytes=100)


def test_a_message_that_this_peer_may_not_send_is_refused():
    frame = codec.encode(Ack(1, 2, [], 3), max_bytes=MAX_BYTES)
    assert decode(frame, allowed=frozenset({Ack})) == Ack(1, 2, [], 3)
    with pytest.raises(FrameError, match="Ack is not a message this peer may send"):
        decode(frame, allowed=frozenset({Hello, Beat}))


# -- fields


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([True, 2, [], 3], "Ack.run_epoch is True, must be an integer"),
        ([1.0, 2, [], 3], "Ack.run_epoch is 1.0, must be an integer"),
        (["1", 2, [], 3], "Ack.run_epoch is '1', must be an integer"),
        ([None, 2, [], 3], "Ack.run_epoch is None, must be an integer"),
        ([1, 2, [3, "x"], 3], r"Ack.beyond\[1\] is 'x', must be an integer"),
        ([1, 2, {"a": 1}, 3], "Ack.beyond is dict of length 1, must be a list"),
        ([1, 2], "Ack: 2 fields, must be 4 to 5"),
        ([1, 2, [], 3, 1.0, 4], "Ack: 6 fields, must be 4 to 5"),
        ({"run_epoch": 1}, "not an array of fields"),
        (None, "not an array of fields"),
    ],
)
def test_a_wrong_field_is_refused_with_its_name_value_and_rule(fields, says):
    with pytest.raises(FrameError, match=says):
        decode(frame_of(msgpack.packb(fields)))


def grant(**changes) -> LeaseGrant:
    return LeaseGrant(**{**dict.fromkeys(("run_epoch", "ordinal", "attempt", "issued_version"), 1), **GRANT, **changes})


GRANT = {
    "kind": LeaseKind.TRAIN,
    "deadline_s": 1.0,
    "prompt": b"",
    "payload": {},
    "num_rollouts": 1,
    "max_new_tokens": 1,
    "temperature": 1.0,
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_must_be_finite_are_and_metrics_may_show_a_nan(value):
    with pytest.raises(FrameError, match="LeaseGrant.temperature is .*, must be a finite number"):
        codec.encode(grant(temperature=value), max_bytes=MAX_BYTES)
    metrics = decode(codec.encode(StepDone(1, {"loss": value}, 1.0, {}), max_bytes=MAX_BYTES)).metrics
    assert str(metrics["loss"]) == str(value)


def test_an_integer_is_taken_where_a_number_is_wanted():
    got = decode(codec.encode(grant(deadline_s=600), max_bytes=MAX_BYTES))
    assert got.deadline_s == 600.0 and type(got.deadline_s) is float


def test_missing_trailing_fields_take_their_defaults():
    body = msgpack.packb([1, 2, 0, "stage", ""])
    assert codec.decode_body(SyncReply, body) == SyncReply(1, 2, 0, SyncPhase.STAGE, "")


def test_the_sender_is_told_of_a_wrong_field_too():
    with pytest.raises(FrameError, match=r"GroupResult.rollouts\[0\] is 'x', must be a WireRollout"):
        codec.encode(GroupResult(1, 1, LeaseKind.TRAIN, 1, 0, b"", ["x"]), max_bytes=MAX_BYTES)
    with pytest.raises(FrameError, match=r"LeaseGrant.payload\['a'\]\[1\] is <object .*, must be a string, number,"):
        codec.encode(grant(payload={"a": [1, object()]}), max_bytes=MAX_BYTES)
    with pytest.raises(FrameError, match="LeaseGrant: cannot be encoded: Integer value out of range"):
        codec.encode(grant(payload={"a": 2**64}), max_bytes=MAX_BYTES)


def test_a_batch_carries_result_bodies_untouched():
    result = GroupResult(1, 1, LeaseKind.TRAIN, 5, 0, b"1234", [ROLLOUT])
    body = codec.body_of(codec.encode(result, max_bytes=MAX_BYTES))
    batch = decode(codec.encode(Batch(3, 0, [body], b"", False, True), max_bytes=MAX_BYTES))
    assert codec.decode_body(GroupResult, batch.groups[0]) == result


# -- records inside messages


ROLLOUT = WireRollout(b"5678", b"abcd", b"", FinishReason.STOP, 0.5, {"exact": 0.5})
ROLLOUT_MAP = {
    "tokens": b"5678",
    "logprobs": b"abcd",
    "spans": b"",
    "finish": "stop",
    "reward": 0.5,
    "parts": {"exact": 0.5},
}


class Place(NamedTuple):
    name: str
    offset: int | None = None


@dataclass(frozen=True)
class Map:
    """Every kind of annotation that no message uses on its own."""

    epoch: int = field(metadata={KEY: "group_epoch"})
    places: tuple[Place, ...]
    ranges: tuple[tuple[int, int], ...]
    scale: float | None = None


MAP = {"group_epoch": 1, "places": [], "ranges": []}


@pytest.mark.parametrize(
    ("record", "plain"),
    [
        (LeaseKey(LeaseKind.EVAL, 3, 1), ["eval", 3, 1]),
        (ActiveLease(LeaseKind.TRAIN, 3, 1, 7), ["train", 3, 1, 7]),
        (ActiveLease(LeaseKind.TRAIN, 3, 1), ["train", 3, 1]),
        (ROLLOUT, ROLLOUT_MAP),
        (Map(1, (Place("a", 0), Place("b")), ((0, 2),)), MAP | {"places": [["a", 0], ["b"]], "ranges": [[0, 2]]}),
        (Map(1, (), (), 0.5), MAP | {"scale": 0.5}),
    ],
)
def test_a_record_is_an_array_or_a_map_and_leaves_out_what_is_none(record, plain):
    assert to_plain(record) == plain
    assert msgpack.packb(to_plain(record)) == msgpack.packb(plain)  # the order of a map's keys counts too
    assert from_plain(type(record), msgpack.unpackb(msgpack.packb(plain))) == record


@pytest.mark.parametrize(
    ("cls", "plain", "says"),
    [
        (ActiveLease, ["train", 3], "ActiveLease is list of length 2, must be an array of kind, ordinal, attempt, iss"),
        (ActiveLease, ["train", 3, 1, None], "ActiveLease.issued_version is None, must be an integer"),
        (ActiveLease, ["weird", 3, 1], "ActiveLease.kind is 'weird', must be one of train, eval; both daemons must"),
        (ActiveLease, {"kind": "train"}, "ActiveLease is dict of length 1, must be an array"),
        (Map, [1, [], []], "Map is list of length 3, must be a map"),
        (Map, {"group_epoch": 1, "places": []}, r"keys group_epoch, places, must be .* places, ranges, scale\?"),
        (
            Map,
            {"epoch": 1, "places": [], "ranges": []},
            "keys epoch, places, ranges, must be .* keys group_epoch, pl",
        ),
        (Map, MAP | {"x": 1}, "keys group_epoch, places, ranges, x, must be"),
        (Map, MAP | {"scale": None}, "Map.scale is None, must be a number"),
        (
            Map,
            MAP | {"places": [["a", "b"]]},
            r"Map.places\[0\].offset is 'b', must be an int",
        ),
        (
            Map,
            MAP | {"ranges": [[1, 2, 3]]},
            r"Map.ranges\[0\] is list .* must be a list of 2",
        ),
    ],
)
def test_a_wrong_record_is_refused_with_the_place_the_value_and_the_rule(cls, plain, says):
    with pytest.raises(ProtocolError, match=says):
        from_plain(cls, plain)


@pytest.mark.parametrize("change", [{"reward": math.nan}, {"parts": {"exact": math.inf}}])
def test_a_reward_that_is_not_finite_travels_for_its_group_to_be_refused_by_name(change):
    rollout = from_plain(WireRollout, {**ROLLOUT_MAP, **change})
    assert str(to_plain(rollout)) == str({**ROLLOUT_MAP, **change})


def test_messages_with_records_have_the_bytes_they_always_had():
    active = [ActiveLease(LeaseKind.TRAIN, 4, 1, 9), ActiveLease(LeaseKind.EVAL, 5, 0)]
    beat = Beat(1, 8, active, 10, 2, 0, 0.5, 0.25, 100)
    wire = [1, 8, [["train", 4, 1, 9], ["eval", 5, 0]], 10, 2, 0, 0.5, 0.25, 100, None, 0, True, 0, [], {}, {}, 0.0]
    assert codec.encode_body(beat) == msgpack.packb(wire)
    assert codec.encode_body(Abandon(2, [LeaseKey(LeaseKind.EVAL, 5, 0)])) == msgpack.packb([2, [["eval", 5, 0]]])
    result = GroupResult(3, 2, LeaseKind.TRAIN, 4, 1, b"1234", [ROLLOUT])
    assert codec.encode_body(result) == msgpack.packb([3, 2, "train", 4, 1, b"1234", [ROLLOUT_MAP], None, b""])


# -- words that fields choose from


def test_a_word_outside_is_refused_with_those_that_are_allowed():
    with pytest.raises(FrameError, match="Nack.code is 'boring', must be one of invalid, unknown_lease, hello"):
        codec.decode_body(Nack, msgpack.packb([1, 2, "boring", ""]))
    with pytest.raises(FrameError, match="SyncReply.phase is 'commit', must be one of stage, swap"):
        codec.decode_body(SyncReply, msgpack.packb([1, 2, 0, "commit", ""]))


def test_a_failure_for_a_reason_not_known_here_is_still_a_failure():
    """To refuse the message would leave its lease unaccounted for, and the generator sending it for ever."""
    failed = codec.decode_body(LeaseFailed, msgpack.packb([1, 1, "train", 5, 0, "bored", "why"]))
    assert (failed.reason, failed.detail) == (FailureReason.ENGINE, "why")


# -- bombs


def array_header(length: int) -> bytes:
    return b"\xdd" + struct.pack(">I", length)


BOMBS = {
    "ten million empty arrays": array_header(10**7) + b"\x90" * 10**7,
    "ten million empty maps": array_header(10**7) + b"\x80" * 10**7,
    "ten million nils": array_header(10**7) + b"\xc0" * 10**7,
    "a map of five million": b"\xdf" + struct.pack(">I", 5 * 10**6) + b"\xa0\xc0" * (5 * 10**6),
    "two thousand levels": b"\x91" * 2000 + b"\xc0",
    "a thousand levels of long arrays": array_header(4000) * 1000,
    "a lie about an array": array_header(2**32 - 1) + b"\x01",
    "a lie about a string": b"\xdb" + struct.pack(">I", 2**32 - 1) + b"x",
    "a lie about bytes": b"\xc6" + struct.pack(">I", 2**31) + b"x",
    "an extension type": b"\xc7\x04\x01abcd",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "the reserved byte": b"\xc1",
    "an integer as a key": b"\x94\x01\x02\x90\x81\x01\x02",
    "text that is not utf-8": b"\x94\xa2\xff\xff\x02\x90\x03",
    "something after the end": ACK_BODY + b"\x00",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_fast_and_in_bounded_memory(name):
    bomb = frame_of(BOMBS[name])
    tracemalloc.start()
    started = time.thread_time()
    with pytest.raises(FrameError):
        decode(bomb)
    cpu_s, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cpu_s < 0.5  # far below the seconds that decoding would take
    assert peak < 2**20


def test_the_largest_body_the_limits_allow_stays_within_sixteen_mebibytes_of_objects():
    body = msgpack.packb([1, 2, [[]] * (BASE_OBJECTS - 10), 3])
    tracemalloc.start()
    with pytest.raises(FrameError, match="Ack.beyond is list of length 65526, must be of at most 4096"):
        decode(frame_of(body))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(body) + 16 * 2**20


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(plain_values)
@settings(max_examples=150, deadline=None)
def test_the_walk_over_type_bytes_reads_whatever_msgpack_writes(value):
    body = msgpack.packb(value)
    check_body(body)
    for wrong in (body[:-1], body + b"\x00"):
        with pytest.raises(ValueError, match="truncated|bytes follow|bytes left"):
            check_body(wrong)


@pytest.mark.parametrize("length", [0, 31, 32, 255, 256, 65_535, 65_536])
def test_the_walk_over_type_bytes_knows_every_width_of_length(length):
    for value in (
        "x" * length,
        b"x" * length,
        [None] * min(length, 60_000),
        dict.fromkeys(map(str, range(length % 300))),
    ):
        check_body(msgpack.packb(value))


def test_depth_is_allowed_up_to_the_limit():
    check_body(b"\x91" * MAX_DEPTH + b"\xc0")
    with pytest.raises(ValueError, match="at depth 16"):
        check_body(b"\x91" * (MAX_DEPTH + 1) + b"\xc0")
