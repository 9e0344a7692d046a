"""Lists in messages that came before are not converted again: what a reader of the message sees of that is nothing."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest

from asyncrl.errors import FrameError
from asyncrl.link import field_checks
from asyncrl.link.codec import decode, decode_body, encode, encode_body
from asyncrl.link.messages import ActiveLease, Beat
from asyncrl.types import LeaseKind
from tests.desk.desk_parts import beat


def test_a_list_that_came_before_is_a_list_of_its_own_each_time():
    frame = encode(beat(active=[ActiveLease(LeaseKind.TRAIN, 1, 0, 3)], tickets=[b"one"]), max_bytes=2**20)
    first, second = (decode(frame, max_bytes=2**20) for _ in range(2))
    assert first == second
    first.active.append(ActiveLease(LeaseKind.TRAIN, 2, 0, 3))
    first.tickets.clear()
    assert decode(frame, max_bytes=2**20) == second and second.tickets == [b"one"]


@pytest.mark.parametrize("wrong", [[["train", True, 0, 3]], [["train", 1.0, 0, 3]], [["train", 1, 0, -1]]])
def test_a_list_that_resembles_one_that_came_before_is_checked(wrong):
    right = beat(active=[ActiveLease(LeaseKind.TRAIN, 1, 0, 3)])
    body = msgpack.unpackb(encode_body(right))
    assert decode_body(Beat, msgpack.packb(body)) == right
    (place,) = (number for number, field in enumerate(dataclasses.fields(Beat)) if field.name == "active")
    body[place] = wrong
    with pytest.raises(FrameError, match=r"Beat\.active\[0\]"):
        decode_body(Beat, msgpack.packb(body))


def test_what_is_remembered_of_lists_is_bounded(monkeypatch):
    monkeypatch.setattr(field_checks, "_KNOWN_ARRAYS", {})
    monkeypatch.setattr(field_checks, "_MAX_KNOWN_ARRAYS", 10)
    for number in range(100):
        tickets = [b"%d" % number, bytes(64)]
        assert decode_body(Beat, encode_body(beat(tickets=tickets))).tickets == tickets
        assert len(field_checks._KNOWN_ARRAYS) <= 10
    long = [bytes(64)] * 100
    field_checks._KNOWN_ARRAYS.clear()
    assert decode_body(Beat, encode_body(beat(tickets=long))).tickets == long
    assert not field_checks._KNOWN_ARRAYS
