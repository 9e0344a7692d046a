"""What peers send: every field has its range, and nothing that an admitted peer sends ends the learner."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path

import msgpack
import pytest

from asyncrl.desk.generators import Generators
from asyncrl.errors import ConfigError, FrameError
from asyncrl.generator.identity import claim_identity
from asyncrl.link import codec
from asyncrl.link.messages import Beat, Bye, GroupResult, Hello, LeaseFailed
from asyncrl.link.schema.field_rules import Fields
from asyncrl.link.schema.message_base import message_types
from asyncrl.link.wire_types import JSON_LIKE, MAX_SPANS, MAY_BE_NAN, PayloadValue
from asyncrl.types import FinishReason
from tests.faults import hostile_desk
from tests.sizes import usual

ROOT = Path(__file__).resolve().parents[2]
HELLO = [3, "gen-a", 2, 3, "0123", "4567", "own.module:Task", 2, 17]
BEAT = [3, 640, [], 123, 7, 3, 512.5, 7.25, 65_536]
ROLLOUT = {"tokens": b"", "logprobs": b"", "spans": b"", "finish": "stop", "reward": 0.5, "parts": {"exact": 0.5}}
RESULT = [90, 3, "train", 11, 1, b"", [ROLLOUT]]


def fields_without_a_rule(hint, where):
    """The places inside an annotation that hold a number, text or container of which nothing is said."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        if args[1] in (JSON_LIKE, MAY_BE_NAN):
            return
        if isinstance(args[1], Fields):
            for name, inner in args[1].hints:
                yield from fields_without_a_rule(inner, f"{where}.{name}")
        elif typing.get_origin(args[0]) is not None:
            for inner in typing.get_args(args[0]):
                yield from fields_without_a_rule(inner, f"{where}[]")
    elif origin is tuple and args[-1] is not Ellipsis:
        for inner in args:
            yield from fields_without_a_rule(inner, f"{where}[]")
    elif origin in (list, tuple, dict) or hint in (int, float, str, bytes):
        yield where
    elif args:
        for inner in args:
            yield from fields_without_a_rule(inner, where)
    elif dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        yield from fields_of_a_record(hint, where)
    else:
        assert hint in (bool, type(None), Ellipsis) or issubclass(hint, StrEnum), f"{where}: {hint}"


def fields_of_a_record(cls, where):
    hints = typing.get_type_hints(cls, localns={"PayloadValue": PayloadValue}, include_extras=True)
    for name, hint in hints.items():
        if name != "wire_code":
            yield from fields_without_a_rule(hint, f"{where}.{name}")


def test_R3_every_field_of_every_message_has_a_rule():
    unruled = [where for cls in message_types().values() for where in fields_of_a_record(cls, cls.__name__)]
    assert unruled == []


def test_R3_a_field_without_a_rule_is_found():
    @dataclasses.dataclass
    class Bad:
        """As a message that somebody adds in a hurry."""

        number: int
        texts: list[str]

    hints = typing.get_type_hints(Bad)
    found = [where for name, hint in hints.items() for where in fields_without_a_rule(hint, name)]
    assert found == ["number", "texts"]


def changed(values, place, value):
    return [*values[:place], value, *values[place + 1 :]]


def rollout(**changes):
    return [*RESULT[:6], [ROLLOUT | changes]]


WRONG = [
    (Beat, changed(BEAT, 2, [["train", math.inf, 0, 0]]), r"active\[0\].ordinal is inf, must be an integer"),
    (Beat, changed(BEAT, 2, [["train", 2**63, 0, 0]]), r"active\[0\].ordinal is 9223372036854775808, must be from 0"),
    (Beat, changed(BEAT, 2, [["train", 1, -1, 0]]), r"active\[0\].attempt is -1"),
    (Beat, changed(BEAT, 2, [["train", 1, 0, -5]]), r"active\[0\].issued_version is -5"),
    (Beat, changed(BEAT, 2, [["train", 1, 0]] * 9_000), "active is list of length 9000, must be of at most 8192"),
    (Beat, changed(BEAT, 1, -1), "sequences_wanted is -1"),
    (Beat, changed(BEAT, 3, 2**53), "tokens_generated is 9007199254740992"),
    (Beat, changed(BEAT, 6, math.inf), "busy_s is inf, must be a finite number"),
    (Beat, changed(BEAT, 7, math.nan), "idle_s is nan, must be a finite number"),
    (Beat, changed(BEAT, 7, -1.0), "idle_s is -1.0"),
    (Beat, [*BEAT, None, 0, True, 0, [], {"decode": math.nan}], r"time_s\['decode'\] is nan"),
    (Beat, [*BEAT, None, 0, True, 0, [], {"decode": -1.0}], r"time_s\['decode'\] is -1.0"),
    (Beat, [*BEAT, None, 0, True, 0, [], {str(n): 0.0 for n in range(65)}], "time_s is dict of length 65"),
    (Beat, [*BEAT, None, 0, True, 0, [], {}, {"fixed": -1.0}], r"engine_step_ms\['fixed'\] is -1.0"),
    (Hello, changed(HELLO, 7, 0), "num_workers is 0, must be from 1 to 1024"),
    (Hello, changed(HELLO, 7, -1), "num_workers is -1"),
    (Hello, changed(HELLO, 7, 10**10), "num_workers is 10000000000"),
    (Hello, changed(HELLO, 1, ""), "generator_id is '', must be 1 to 128"),
    (Hello, changed(HELLO, 1, "g" * 129), "generator_id is .*, must be 1 to 128"),
    (Hello, changed(HELLO, 2, 2**63), "incarnation is 9223372036854775808"),
    (Hello, changed(HELLO, 8, -1), "first_unacked_seq is -1"),
    (GroupResult, changed(RESULT, 3, 2**62), "ordinal is 4611686018427387904"),
    (GroupResult, changed(RESULT, 6, [ROLLOUT] * 4_097), "rollouts is list of length 4097, must be of at most 4096"),
    (GroupResult, rollout(spans=bytes(24 * MAX_SPANS + 24)), r"rollouts\[0\].spans is bytes of length 24600"),
    (GroupResult, rollout(parts={str(n): 0.0 for n in range(300)}), r"parts is dict of length 300"),
    (GroupResult, rollout(parts={"a\nb": 0.0}), r"parts is 'a\\nb', must be 0 to 1024 printable"),
]


@pytest.mark.parametrize(("cls", "values", "says"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_R3_a_value_out_of_its_range_is_refused_by_name(cls, values, says):
    with pytest.raises(FrameError, match=says):
        codec.decode_body(cls, msgpack.packb(values))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a b", "\u202eabc", "a\u2028b", "\x00", "a\x85"])
def test_R14_a_generator_id_that_a_log_would_obey_is_refused(name):
    with pytest.raises(FrameError, match="generator_id is .* must be 1 to 128 printable characters without a space"):
        codec.decode_body(Hello, msgpack.packb(changed(HELLO, 1, name)))


HOSTILE = "done\n2026-01-01 ERROR all is lost\x1b[2J\x1b]0;title\x07 \u202e\u2028"
SHOWN = "done\\n2026-01-01 ERROR all is lost\\x1b[2J\\x1b]0;title\\x07 \\u202e\\u2028"


def test_R14_text_for_people_is_printable_once_it_is_decoded():
    assert codec.decode_body(Bye, msgpack.packb([HOSTILE])).reason == SHOWN
    failed = codec.decode_body(LeaseFailed, msgpack.packb([1, 1, "train", 1, 0, "engine", HOSTILE]))
    assert failed.detail == SHOWN
    with pytest.raises(FrameError, match="Bye.reason is .* must be of at most 4096 characters"):
        codec.decode_body(Bye, msgpack.packb(["x" * 4097]))


def test_R14_a_text_too_long_for_the_wire_is_cut_by_its_sender():
    body = codec.encode_body(Bye("x" * 100_000))
    assert codec.decode_body(Bye, body).reason == "x" * 4095 + "…"


def test_a_result_within_the_ranges_is_taken():
    got = codec.decode_body(GroupResult, msgpack.packb(RESULT))
    assert got.rollouts[0].finish is FinishReason.STOP


@pytest.mark.parametrize("name", ["a b", "a\nb", "../a", "g" * 129, "a\x1b[2J"])
def test_R14_a_generator_id_that_could_not_be_sent_is_refused_at_its_start(tmp_path, name):
    with pytest.raises(ConfigError, match="generator.id=.* must have at most 128 printable characters"):
        claim_identity(tmp_path, name)
    assert claim_identity(tmp_path, "gpu-7.rack_3").incarnation == 1


def stalled_desk(stall_s, num_vanishing, num_staying):
    command = [sys.executable, "-m", "tests.faults.stalled_desk", str(stall_s), str(num_vanishing), str(num_staying)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_R19_a_desk_that_stands_still_survives_peers_that_leave_with_unread_frames():
    done = stalled_desk(3.0, num_vanishing=4, num_staying=4)
    assert done.returncode == 0, done.stderr
    assert "alive: read" in done.stdout


@pytest.mark.slow
def test_R19_a_desk_survives_a_stall_of_twelve_seconds_each_time():
    with ThreadPoolExecutor(4) as pool:  # at once: they do nothing but wait
        for done in pool.map(lambda _: stalled_desk(12.0, num_vanishing=8, num_staying=4), range(4)):
            assert done.returncode == 0, done.stderr


def test_R3_hostile_values_and_orders_are_refused_and_the_honest_generator_is_served():
    for seed in range(2):
        world = hostile_desk.run(seed, 5_000)
        assert {"Hello", "Beat", "GroupResult", "LeaseFailed", "SyncReply", "Bye"} == set(world.sent)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_R3_very_many_hostile_messages_are_refused():
    """A million with all seeds. The handler that is broken below for ten numbers is found within 20,000."""
    for seed in range(usual(3, full=20)):
        hostile_desk.run(seed, 50_000)


def test_R3_the_fuzz_finds_a_handler_that_raises(monkeypatch):
    beat_of = Generators.beat

    def break_at_a_few(self, session, beat, now):
        assert beat.outbox_bytes not in range(10, 20)
        beat_of(self, session, beat, now)

    monkeypatch.setattr(Generators, "beat", break_at_a_few)
    with pytest.raises(AssertionError, match="AssertionError at test_wire.py"):
        hostile_desk.run(0, 20_000)
