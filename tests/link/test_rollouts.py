"""Groups and leases over the wire, and every way in which a group can be bad."""

from __future__ import annotations

import dataclasses
import math

import msgpack
import numpy as np
import pytest

from asyncrl.errors import FrameError, ProtocolError
from asyncrl.link import codec
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import (
    grant_to_lease,
    group_to_result,
    lease_to_grant,
    result_to_group,
    validate_group,
)
from asyncrl.types import FinishReason, Group, Lease, LeaseKey, LeaseKind, Rollout, VersionSpan

MAX_BYTES = 1 << 20
PROMPT = np.array([1, 2, 3], dtype=np.int32)


def rollout(length=4, **changes) -> Rollout:
    base = Rollout(
        token_ids=np.arange(length, dtype=np.int32),
        behaviour_logprobs=np.linspace(-2.0, 0.0, length, dtype=np.float32),
        version_spans=(VersionSpan(0, 1, 3), VersionSpan(1, length, 5)),
        finish_reason=FinishReason.STOP,
        reward=0.5,
        reward_parts={"exact": 0.0, "format": 0.5},
    )
    return dataclasses.replace(base, **changes)


def group(*rollouts: Rollout) -> Group:
    return Group(LeaseKey(LeaseKind.TRAIN, 7, 1), PROMPT, list(rollouts or (rollout(), rollout(6))))


def lease(**changes) -> Lease:
    base = Lease(
        key=LeaseKey(LeaseKind.EVAL, 3, 0),
        issued_version=2,
        deadline_s=60.0,
        prompt_token_ids=PROMPT,
        payload={"answer": "42", "nested": [1, {"a": None}]},
        num_rollouts=4,
        max_new_tokens=16,
        temperature=0.0,
        pinned_version=2,
        seed=11,
        greedy_baseline=True,
    )
    return dataclasses.replace(base, **changes)


def validate(item: Group, **changes) -> None:
    limits = {
        "vocab_size": 100,
        "prompt_token_ids": PROMPT,
        "num_rollouts": len(item.rollouts),
        "max_new_tokens": 8,
        "oldest_version": 2,
        "newest_version": 5,
    }
    validate_group(item, **{**limits, **changes})


def through_the_wire(item: Group) -> Group:
    frame = codec.encode(group_to_result(item, 1, 1), max_bytes=MAX_BYTES)
    return result_to_group(codec.decode(frame, max_bytes=MAX_BYTES))


def test_a_group_comes_back_as_it_was_without_copies_of_its_arrays():
    result = codec.decode(codec.encode(group_to_result(group(), 9, 2), max_bytes=MAX_BYTES), max_bytes=MAX_BYTES)
    got = result_to_group(result)
    assert (result.seq, result.run_epoch, got.key) == (9, 2, LeaseKey(LeaseKind.TRAIN, 7, 1))
    assert np.array_equal(got.prompt_token_ids, PROMPT)
    for mine, theirs in zip(group().rollouts, got.rollouts, strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids) and theirs.token_ids.dtype == np.int32
        assert np.array_equal(mine.behaviour_logprobs, theirs.behaviour_logprobs)
        assert theirs.behaviour_logprobs.dtype == np.float32
        assert (mine.version_spans, mine.finish_reason) == (theirs.version_spans, theirs.finish_reason)
        assert (mine.reward, mine.reward_parts) == (theirs.reward, theirs.reward_parts)
        assert not theirs.token_ids.flags.owndata
    validate(got)


def test_a_lease_comes_back_as_it_was():
    frame = codec.encode(lease_to_grant(lease(), 4), max_bytes=MAX_BYTES)
    grant = codec.decode(frame, max_bytes=MAX_BYTES)
    got = grant_to_lease(grant)
    assert grant.run_epoch == 4
    assert np.array_equal(got.prompt_token_ids, PROMPT)
    for field in dataclasses.fields(Lease):
        if field.name != "prompt_token_ids":
            assert getattr(got, field.name) == getattr(lease(), field.name)


@pytest.mark.parametrize(
    "change",
    [
        {"num_rollouts": 0},
        {"max_new_tokens": 0},
        {"deadline_s": 0.0},
        {"temperature": -1.0},
        {"prompt_token_ids": np.array([], dtype=np.int32)},
    ],
)
def test_a_lease_that_asks_for_nothing_is_refused(change):
    with pytest.raises(ProtocolError, match="lease eval 3: .* must be above 0"):
        grant_to_lease(lease_to_grant(lease(**change), 1))


def test_a_baseline_travels_with_its_group_and_must_be_there_exactly_when_asked_for():
    with_baseline = dataclasses.replace(group(), baseline_reward=-0.5)
    assert through_the_wire(with_baseline).baseline_reward == -0.5
    assert through_the_wire(group()).baseline_reward is None
    validate(with_baseline, greedy_baseline=True)
    with pytest.raises(ProtocolError, match="no reward of a greedy completion"):
        validate(group(), greedy_baseline=True)
    with pytest.raises(ProtocolError, match="reward -0.5, the lease asked for none"):
        validate(with_baseline)
    with pytest.raises(ProtocolError, match="greedy completion: reward nan is not finite"):
        validate(dataclasses.replace(group(), baseline_reward=math.nan), greedy_baseline=True)


def test_a_group_of_before_there_were_baselines_can_still_be_read():
    fields = msgpack.unpackb(codec.encode_body(group_to_result(group(), 1, 1)))
    result = codec.decode_body(GroupResult, msgpack.packb(fields[:-1]))
    assert result_to_group(result).baseline_reward is None


@pytest.mark.parametrize("key", [(-1, 0), (0, -1)])
def test_a_lease_key_that_cannot_be_is_refused(key):
    result = dataclasses.replace(group_to_result(group(), 1, 1), ordinal=key[0], attempt=key[1])
    with pytest.raises(ProtocolError, match="must not be negative"):
        result_to_group(result)


# -- what cannot be decoded


def with_rollout_1(**changes) -> GroupResult:
    result = group_to_result(group(), 1, 1)
    wire = dataclasses.replace(result.rollouts[1], **changes)
    return dataclasses.replace(result, rollouts=[result.rollouts[0], wire])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": b"123"}, "tokens of 3 bytes: .* multiple of 4"),
        ({"logprobs": b"12345"}, "logprobs of 5 bytes: .* multiple of 4"),
        ({"spans": b"1234"}, "spans of 4 bytes .* rows of 24"),
    ],
)
def test_arrays_that_do_not_end_with_a_whole_number_are_refused(change, says):
    with pytest.raises(ProtocolError, match=f"group train 7 rollout 1: {says}"):
        result_to_group(with_rollout_1(**change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logprobs": "text"}, "logprobs is 'text', must be bytes"),
        ({"spans": [0, 1, 2]}, "spans is list of length 3, must be bytes"),
        ({"finish": "bored"}, "finish is 'bored', must be one of stop, length"),
        ({"finish": ["stop"]}, "finish is list of length 1, must be a string"),
        ({"reward": True}, "reward is True, must be a number"),
        ({"parts": {"exact": "1"}}, r"parts\['exact'\] is '1', must be a number"),
        ({"parts": None}, "parts is None, must be a map"),
    ],
)
def test_a_rollout_with_a_wrong_field_is_refused_by_sender_and_receiver(change, says):
    with pytest.raises(FrameError, match=rf"GroupResult.rollouts\[1\]\.{says}"):
        codec.encode_body(with_rollout_1(**change))
    fields = msgpack.unpackb(codec.encode_body(with_rollout_1()))
    fields[6][1].update(change)
    with pytest.raises(FrameError, match=rf"GroupResult.rollouts\[1\]\.{says}"):
        codec.decode_body(GroupResult, msgpack.packb(fields))


def test_a_rollout_with_other_fields_is_refused():
    fields = msgpack.unpackb(codec.encode_body(with_rollout_1()))
    for change in (lambda rollout: rollout.pop("logprobs"), lambda rollout: rollout.update(extra=1)):
        change(fields[6][0])
        with pytest.raises(FrameError, match=r"rollouts\[0\] is a map with the keys tokens, .* must be a map with"):
            codec.decode_body(GroupResult, msgpack.packb(fields))


# -- what must not be trained on


def with_value(array: np.ndarray, place: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


BAD_LOGPROBS = [math.nan, math.inf, -math.inf, 1e-5, 1.0, -10_001.0]


@pytest.mark.parametrize("value", BAD_LOGPROBS)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_log_prob_that_no_sampled_token_has_is_refused(value, place):
    bad = rollout(behaviour_logprobs=with_value(rollout().behaviour_logprobs, place, value))
    with pytest.raises(ProtocolError, match=f"attempt 1 rollout 1: token {place} has id {place} and log-prob"):
        validate(through_the_wire(group(rollout(6), bad)))


@pytest.mark.parametrize("value", [-1, -(2**31), 100, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_refused(value):
    bad = rollout(token_ids=with_value(rollout().token_ids, 2, value))
    with pytest.raises(ProtocolError, match=rf"rollout 0: token 2 has id {value} .* \[0, 100\)"):
        validate(through_the_wire(group(bad, rollout(6))))


@pytest.mark.parametrize("value", [0.0, 1e-6, -1e4])
def test_log_probs_at_the_bounds_are_accepted(value):
    validate(group(rollout(behaviour_logprobs=with_value(rollout().behaviour_logprobs, 1, value))))


SPANS = {
    "a gap": [(0, 1, 3), (2, 4, 5)],
    "an overlap": [(0, 3, 3), (2, 4, 5)],
    "a late start": [(1, 4, 3)],
    "an early end": [(0, 3, 3)],
    "a late end": [(0, 5, 3)],
    "an empty span": [(0, 0, 3), (0, 4, 5)],
    "a backward span": [(0, 3, 3), (3, 2, 3), (2, 4, 3)],
    "a falling version": [(0, 2, 5), (2, 4, 3)],
    "a version too old": [(0, 4, 1)],
    "a version too new": [(0, 2, 5), (2, 4, 6)],
    "no span": [],
}


@pytest.mark.parametrize("name", SPANS)
def test_version_spans_that_do_not_name_every_tokens_version_are_refused(name):
    bad = rollout(version_spans=tuple(VersionSpan(*span) for span in SPANS[name]))
    with pytest.raises(ProtocolError, match="rollout 1: .*(span|Span)"):
        validate(through_the_wire(group(rollout(), bad)))


def test_a_pinned_group_must_come_from_exactly_its_version():
    pinned = rollout(version_spans=(VersionSpan(0, 4, 4),))
    validate(group(pinned), pinned_version=4)
    for version in (3, 5):
        with pytest.raises(ProtocolError, match=rf"must lie in \[{version}, {version}\]"):
            validate(group(pinned), pinned_version=version)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward": math.nan}, "reward nan"),
        ({"reward": -math.inf}, "reward -inf"),
        ({"reward_parts": {"exact": math.nan}}, "is not finite"),
        ({"behaviour_logprobs": np.zeros(3, dtype=np.float32)}, "4 tokens but 3 log-probs"),
        ({"token_ids": np.array([], np.int32), "behaviour_logprobs": np.array([], np.float32)}, "0 tokens, must be 1"),
    ],
)
def test_a_rollout_that_cannot_be_trained_on_is_refused(change, says):
    with pytest.raises(ProtocolError, match=f"group train 7 attempt 1 rollout 1: .*{says}"):
        validate(group(rollout(), rollout(**change)))


def test_a_group_that_is_not_what_was_leased_is_refused():
    with pytest.raises(ProtocolError, match="2 rollouts, the lease asked for 3"):
        validate(group(), num_rollouts=3)
    with pytest.raises(ProtocolError, match="prompt of 3 tokens is not the leased one"):
        validate(group(), prompt_token_ids=np.array([1, 2, 4]))
    with pytest.raises(ProtocolError, match="6 tokens, must be 1 to max_new_tokens = 5"):
        validate(group(), max_new_tokens=5)


def test_valid_groups_of_any_shape_are_accepted():
    chance = np.random.default_rng(0)
    for _ in range(300):
        rollouts = []
        for _ in range(chance.integers(1, 6)):
            length = int(chance.integers(1, 9))
            cuts = sorted({0, length, *map(int, chance.integers(0, length + 1, 2))})
            versions = sorted(map(int, chance.integers(2, 6, len(cuts) - 1)))
            spans = [VersionSpan(a, b, v) for a, b, v in zip(cuts, cuts[1:], versions, strict=False)]
            rollouts.append(
                rollout(
                    length,
                    token_ids=chance.integers(0, 100, length, dtype=np.int32),
                    behaviour_logprobs=-chance.exponential(2.0, length).astype(np.float32),
                    version_spans=tuple(spans),
                )
            )
        validate(through_the_wire(group(*rollouts)))
