"""Rollouts as trainer and desk have them, and as files have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncrl.report.rollouts.choice import Why
from asyncrl.report.rollouts.records import KeptRollout, RolloutRecord, record_of
from asyncrl.types import FinishReason, LeaseKind, Rollout, VersionSpan

HOSTILE = "ok\x1b[2J\x1b]0;title\x07\r\x9b31m\x00\u202etxt\u2028\udcff\x7fend"


def make_kept(ordinal: int = 7, *, num_tokens: int = 4, reward: float = 1.0, **changes: Any) -> KeptRollout:
    ramp = np.arange(num_tokens, dtype=np.float32)
    rollout = Rollout(
        token_ids=np.arange(2, 2 + num_tokens, dtype=np.int32),
        behaviour_logprobs=-1.0 - ramp / 8,
        version_spans=(VersionSpan(0, 1, 3), VersionSpan(1, num_tokens, 4)),
        finish_reason=FinishReason.STOP,
        reward=reward,
        reward_parts={"exact": reward},
    )
    values: dict[str, Any] = {
        "ordinal": ordinal,
        "attempt": 1,
        "place": 2,
        "why": Why.BEST,
        "prompt_ids": np.array([5, 6], dtype=np.int32),
        "rollout": rollout,
        "advantage": 0.5,
        "old_logprobs": -1.0 + ramp / 4,
    }
    return KeptRollout(**values | changes)


def make_record(ordinal: int = 7, *, kind: LeaseKind = LeaseKind.TRAIN, version: int = 5, **changes: Any):
    """As a file has it; `changes` are of the kept rollout or of what the desk and the text add."""
    names = ("generator", "payload", "prompt", "completion", "token_texts")
    added: dict[str, Any] = {
        "generator": "gen-a",
        "payload": {"answer": "42"},
        "prompt": "1+1=",
        "completion": "abc",
        "token_texts": ["a", "b", "c", "<end>"],
    }
    added |= {name: changes.pop(name) for name in names if name in changes}
    record = record_of(make_kept(ordinal, **changes), kind=kind, version=version, **added)
    assert isinstance(record, RolloutRecord)
    return record
