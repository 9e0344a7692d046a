"""The schema of a line: what goes in comes out, and a line that is none is refused in words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from asyncrl.report.rollouts.choice import Why
from asyncrl.report.rollouts.records import (
    MAX_PAYLOAD_CHARACTERS,
    SCHEMA,
    KeptRollout,
    RolloutRecord,
    kept_answers,
    small_payload,
)
from asyncrl.types import LeaseKind
from tests.desk.desk_parts import eval_group
from tests.report.rollouts.making import HOSTILE, make_kept, make_record

FIELDS = [
    *("schema", "kind", "version", "ordinal", "attempt", "place", "why", "generator", "prompt", "prompt_ids"),
    *("completion", "token_texts", "token_ids", "versions", "behaviour_logprobs", "old_logprobs", "current_logprobs"),
    *("advantage", "token_advantages", "reward", "reward_parts", "truncated", "payload"),
]


def same(ours: KeptRollout, theirs: KeptRollout) -> bool:
    return ours.to_bytes() == theirs.to_bytes()


@pytest.mark.parametrize(
    "kept",
    [
        make_kept(),
        make_kept(advantage=None, old_logprobs=None),
        make_kept(token_advantages=np.ones(4), current_logprobs=np.zeros(4), why=Why.RANDOM),
    ],
)
def test_a_kept_rollout_comes_back_from_its_bytes(kept):
    back = KeptRollout.from_bytes(kept.to_bytes())
    assert same(back, kept)
    assert (back.ordinal, back.attempt, back.place, back.why) == (7, 1, 2, kept.why)
    np.testing.assert_array_equal(back.rollout.token_ids, kept.rollout.token_ids)
    np.testing.assert_array_equal(back.rollout.behaviour_logprobs, kept.rollout.behaviour_logprobs)
    assert back.rollout.version_spans == kept.rollout.version_spans
    for name in ("token_advantages", "old_logprobs", "current_logprobs"):
        ours, theirs = getattr(back, name), getattr(kept, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)


def test_the_answers_to_a_held_out_prompt_are_named_by_its_place_and_theirs():
    group = eval_group(1007, prompt=40, reward=0.25, attempt=2)
    group.rollouts *= 2
    kept = kept_answers(group, 7)
    assert [(one.ordinal, one.attempt, one.place, one.why) for one in kept] == [
        (7, 2, 0, Why.EVALUATED),
        (7, 2, 1, Why.EVALUATED),
    ]
    assert [(one.rollout.reward, one.prompt_ids.tolist()) for one in kept] == [(0.25, [40])] * 2


def test_a_line_has_exactly_the_documented_fields_in_their_order_and_comes_back():
    record = make_record()
    line = record.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    given = json.loads(line)
    assert list(given) == FIELDS
    assert given["schema"] == SCHEMA == 1
    assert given["versions"] == [[0, 1, 3], [1, 4, 4]]
    assert RolloutRecord.from_line(line) == record


def test_a_line_is_ascii_whatever_the_model_said():
    record = make_record(completion=HOSTILE, prompt="ünïcode 東京", token_texts=[HOSTILE, "", "🙂", "\n"])
    line = record.to_line()
    assert all(32 <= byte < 127 for byte in line[:-1])
    assert RolloutRecord.from_line(line) == record


def test_the_mismatch_is_against_the_start_of_the_step_and_else_against_its_last_pass():
    record = make_record()
    assert record.mismatches == pytest.approx([0.0, 0.375, 0.75, 1.125])
    later = make_record(old_logprobs=None, current_logprobs=np.full(4, -2.0))
    assert later.mismatches == pytest.approx([-1.0, -0.875, -0.75, -0.625])
    assert make_record(old_logprobs=None).mismatches is None


def test_advantages_and_versions_are_spread_over_the_tokens():
    assert make_record().advantages == [0.5] * 4
    assert make_record(token_advantages=np.array([1.0, -1.0, 0.0, 2.0])).advantages == [1.0, -1.0, 0.0, 2.0]
    assert make_record(advantage=None).advantages is None
    assert make_record().token_versions == [3, 4, 4, 4]


BROKEN = {
    "schema": (2, "its schema is 2, this release reads 1"),
    "kind": ("test", "is not a valid LeaseKind"),
    "why": ("because", "is not a valid Why"),
    "version": (1.0, "version must be a whole number"),
    "token_ids": ([1, 2.5, 3, 4], "lists of whole numbers"),
    "token_texts": (["a"], "token_texts must have an entry for each of the 4 tokens"),
    "behaviour_logprobs": (None, "behaviour_logprobs must have an entry"),
    "old_logprobs": ([0.0, "x", 0.0, 0.0], "old_logprobs must have an entry"),
    "versions": ([[0, 2, 3], [3, 4, 4]], "versions must cover the 4 tokens in order"),
    "reward": ("1", "reward must be a number"),
    "reward_parts": ({"exact": None}, "reward_parts an object of numbers"),
    "advantage": (float("nan"), "advantage must be a number or null"),
    "completion": (7, "completion must be a text or null"),
    "truncated": (0, "truncated true or false"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_field_that_cannot_be_is_refused_by_name(name):
    value, message = BROKEN[name]
    given = json.loads(make_record().to_line()) | {name: value}
    with pytest.raises(ValueError, match=message):
        RolloutRecord.from_line(json.dumps(given).encode())


@pytest.mark.parametrize("line", [b"", b"[]", b'{"schema":1}', b"\xff", b"{", b"[" * 100_000, b'{"schema": true}'])
def test_what_is_no_record_is_refused(line):
    with pytest.raises(ValueError):
        RolloutRecord.from_line(line)


def test_a_field_of_a_later_release_is_ignored():
    given = json.loads(make_record().to_line()) | {"later": [1, 2]}
    assert RolloutRecord.from_line(json.dumps(given).encode()) == make_record()


def test_of_a_payload_only_small_json_is_kept():
    assert small_payload({"answer": "42", "deep": {"marks": [1.0, None, True]}}) is not None
    assert small_payload(None) is None
    assert small_payload({"answer": b"bytes"}) is None
    assert small_payload({"answer": float("nan")}) is None
    assert small_payload({"tests": "x" * (MAX_PAYLOAD_CHARACTERS + 1)}) is None
    assert small_payload({"numbers": list(range(10**6))}) is None
    assert small_payload({str(number): None for number in range(10**5)}) is None


def test_a_large_payload_is_not_walked_through(monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *a, **k: pytest.fail("a large payload was written out"))
    assert small_payload({"tests": ["x" * 1000] * 1000}) is None


@pytest.mark.parametrize("kind", list(LeaseKind))
def test_both_kinds_are_there(kind):
    assert RolloutRecord.from_line(make_record(kind=kind).to_line()).kind is kind
