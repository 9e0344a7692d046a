"""The schema of run.dir/rollouts, and what a rollout is before its text is known.

    KeptRollout    numbers, as trainer and desk have them; travels as bytes
    RolloutRecord  a line of `step_N.jsonl` or `eval_N.jsonl`: the same with its text

A line is one JSON object in ASCII: no completion can write control characters to a terminal that shows the file.
Fields that a reader does not know are to be ignored; another meaning of a field is another `schema`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgpack
import numpy as np

from asyncrl.report.rollouts.choice import Why
from asyncrl.types import LOGPROB_DTYPE, TOKEN_DTYPE, FinishReason, Group, LeaseKind, Rollout, VersionSpan

SCHEMA = 1
DECIMALS = 6  # of log-probs and advantages in a line
MAX_PAYLOAD_CHARACTERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRollout:
    """A rollout that is to be written, in numbers. What is not known of it is None.

    token_advantages, old_logprobs and current_logprobs are float32 [T], of the completion's tokens.
    """

    ordinal: int
    attempt: int
    place: int  # in its group, from 0
    why: Why
    prompt_ids: np.ndarray  # int32 [P]
    rollout: Rollout
    advantage: float | None = None
    token_advantages: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    current_logprobs: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """The form in which it travels between processes of one learner."""
        rollout = self.rollout
        body: bytes = msgpack.packb(
            {
                "name": (self.ordinal, self.attempt, self.place, self.why),
                "prompt_ids": _raw(self.prompt_ids, TOKEN_DTYPE),
                "token_ids": _raw(rollout.token_ids, TOKEN_DTYPE),
                "behaviour_logprobs": _raw(rollout.behaviour_logprobs, LOGPROB_DTYPE),
                "spans": [(span.start, span.stop, span.version) for span in rollout.version_spans],
                "finish": rollout.finish_reason,
                "reward": float(rollout.reward),
                "reward_parts": rollout.reward_parts,
                "advantage": self.advantage,
                **{name: _raw(getattr(self, name), LOGPROB_DTYPE) for name in _TRAINERS},
            }
        )
        return body

    @classmethod
    def from_bytes(cls, body: bytes) -> KeptRollout:
        """What `to_bytes` made into `body`."""
        packed = msgpack.unpackb(body)
        ordinal, attempt, place, why = packed["name"]
        rollout = Rollout(
            token_ids=np.frombuffer(packed["token_ids"], TOKEN_DTYPE),
            behaviour_logprobs=np.frombuffer(packed["behaviour_logprobs"], LOGPROB_DTYPE),
            version_spans=tuple(VersionSpan(*span) for span in packed["spans"]),
            finish_reason=FinishReason(packed["finish"]),
            reward=packed["reward"],
            reward_parts=packed["reward_parts"],
        )
        trainers = {name: packed[name] for name in _TRAINERS}
        return cls(
            ordinal=ordinal,
            attempt=attempt,
            place=place,
            why=Why(why),
            prompt_ids=np.frombuffer(packed["prompt_ids"], TOKEN_DTYPE),
            rollout=rollout,
            advantage=packed["advantage"],
            **{name: None if raw is None else np.frombuffer(raw, LOGPROB_DTYPE) for name, raw in trainers.items()},
        )


_TRAINERS = ("token_advantages", "old_logprobs", "current_logprobs")


def kept_answers(group: Group, ordinal: int) -> list[KeptRollout]:
    """The answers to the held-out prompt number `ordinal` of an evaluation."""
    return [
        KeptRollout(
            ordinal=ordinal,
            attempt=group.key.attempt,
            place=place,
            why=Why.EVALUATED,
            prompt_ids=group.prompt_token_ids,
            rollout=rollout,
        )
        for place, rollout in enumerate(group.rollouts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecord:
    """One line: a rollout with its text. T is the number of its completion tokens, the end token included.

    Of a step, kind is `train` and version is the one that the step made; of an evaluation, `eval` and the one that was
    evaluated. An ordinal names a training prompt, or a held-out one by its place.
    """

    kind: LeaseKind
    version: int
    ordinal: int
    attempt: int  # at that prompt, from 0
    place: int  # in its group, from 0
    why: Why
    generator: str | None  # its id; None where the desk did not know it any more
    prompt: str | None  # special tokens included; None, as all text, where the tokenizer failed
    prompt_ids: list[int]
    completion: str | None  # as the reward saw it: without special tokens
    token_texts: list[str] | None  # [T], special tokens included; None where the text cannot be cut so
    token_ids: list[int]  # [T]
    versions: list[VersionSpan]  # of the policy that sampled: contiguous, in order, over [0, T)
    behaviour_logprobs: list[float]  # [T], as the rollout engine reported them
    old_logprobs: list[float] | None  # [T], of the actor at the start of the step; None where that was not computed
    current_logprobs: list[float] | None  # [T], at its last pass in the step; None where that pass was at the start
    advantage: float | None  # of the rollout, or the mean over its tokens
    token_advantages: list[float] | None  # [T], where they differ between tokens
    reward: float
    reward_parts: dict[str, float]
    truncated: bool  # at sampling.max_new_tokens
    payload: Any  # what the task gave its reward; None where it was not at hand, or over 4,096 characters of JSON

    @property
    def trainer_logprobs(self) -> list[float] | None:
        """The trainer's own log-probs, [T]: at the start of the step where they are known, else at its last pass."""
        return self.current_logprobs if self.old_logprobs is None else self.old_logprobs

    @property
    def mismatches(self) -> list[float] | None:
        """The trainer's log-prob minus the behaviour log-prob of each token, in nats, [T]."""
        ours = self.trainer_logprobs
        return None if ours is None else [a - b for a, b in zip(ours, self.behaviour_logprobs, strict=True)]

    @property
    def advantages(self) -> list[float] | None:
        """The advantage of each token, [T]."""
        if self.token_advantages is not None or self.advantage is None:
            return self.token_advantages
        return [self.advantage] * len(self.token_ids)

    @property
    def token_versions(self) -> list[int]:
        """The policy version that sampled each token, [T]."""
        return [span.version for span in self.versions for _ in range(span.start, span.stop)]

    def to_line(self) -> bytes:
        """The line of a file, its end included."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["versions"] = [[span.start, span.stop, span.version] for span in self.versions]
        text = json.dumps({"schema": SCHEMA} | values, allow_nan=False, separators=(",", ":"))
        return text.encode("ascii") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> RolloutRecord:
        """The record in a line. Raises ValueError, in words, where it is none."""
        try:
            given = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"it is nested too deeply ({error})") from None
        if not isinstance(given, dict) or type(given.get("schema")) is not int:
            raise ValueError("it is no object with a number `schema`")
        if given["schema"] != SCHEMA:
            raise ValueError(f"its schema is {given['schema']}, this release reads {SCHEMA}: use the one that wrote it")
        if missing := [name for name in _FIELDS if name not in given]:
            raise ValueError(f"it has no {', '.join(missing)}")
        return _checked(cls, given)


_FIELDS = tuple(entry.name for entry in fields(RolloutRecord))
_PER_TOKEN = ("token_texts", "behaviour_logprobs", "old_logprobs", "current_logprobs", "token_advantages")
_WHOLE = ("version", "ordinal", "attempt", "place")
_TEXTS = ("generator", "prompt", "completion")


def record_of(
    kept: KeptRollout,
    *,
    kind: LeaseKind,
    version: int,
    generator: str | None,
    payload: Any,
    prompt: str | None,
    completion: str | None,
    token_texts: list[str] | None,
) -> RolloutRecord:
    """The record of a kept rollout, with what the desk adds (generator, payload) and its text."""
    rollout = kept.rollout
    return RolloutRecord(
        kind=kind,
        version=version,
        ordinal=kept.ordinal,
        attempt=kept.attempt,
        place=kept.place,
        why=kept.why,
        generator=generator,
        prompt=prompt,
        prompt_ids=kept.prompt_ids.tolist(),
        completion=completion,
        token_texts=token_texts,
        token_ids=rollout.token_ids.tolist(),
        versions=list(rollout.version_spans),
        behaviour_logprobs=_rounded(rollout.behaviour_logprobs),
        old_logprobs=None if kept.old_logprobs is None else _rounded(kept.old_logprobs),
        current_logprobs=None if kept.current_logprobs is None else _rounded(kept.current_logprobs),
        advantage=None if kept.advantage is None else round(kept.advantage, DECIMALS),
        token_advantages=None if kept.token_advantages is None else _rounded(kept.token_advantages),
        reward=rollout.reward,
        reward_parts=dict(rollout.reward_parts),
        truncated=rollout.finish_reason is FinishReason.LENGTH,
        payload=payload,
    )


def small_payload(payload: Mapping[str, Any] | None) -> str | None:
    """A payload as JSON of at most MAX_PAYLOAD_CHARACTERS; None where it is larger, or no JSON.

    A large one is not written out first: a payload may have megabytes.
    """
    if payload is None or not _may_be_small(payload):
        return None
    try:
        text = json.dumps(payload, allow_nan=False)
    except (TypeError, ValueError):  # bytes, or a number that is not finite
        return None
    return text if len(text) <= MAX_PAYLOAD_CHARACTERS else None


def _may_be_small(payload: Mapping[str, Any]) -> bool:
    room, waiting = MAX_PAYLOAD_CHARACTERS, [payload]
    while waiting and room >= 0:
        value: Any = waiting.pop()
        room -= 1
        if isinstance(value, str | bytes):
            room -= len(value)
        elif isinstance(value, Mapping):
            room -= sum(len(str(name)) for name in value) if len(value) <= room else room + 1
            waiting.extend(value.values() if room >= 0 else ())
        elif isinstance(value, list | tuple):
            waiting.extend(value if len(value) <= room else ())
            room -= len(value)
    return room >= 0


def _checked(kind: type[RolloutRecord], given: Mapping[str, Any]) -> RolloutRecord:
    """The record of a line whose fields are all there. Raises ValueError where one of them cannot be."""
    values = {name: given[name] for name in _FIELDS}
    ids = values["token_ids"]
    if not _are(ids, int) or not _are(values["prompt_ids"], int):
        raise ValueError("token_ids and prompt_ids must be lists of whole numbers")
    for name in _PER_TOKEN:
        value, kind_of_entry = values[name], str if name == "token_texts" else float
        if value is None and name != "behaviour_logprobs":
            continue
        if not _are(value, kind_of_entry) or len(value) != len(ids):
            raise ValueError(f"{name} must have an entry for each of the {len(ids)} tokens")
    for name in _WHOLE:
        if type(values[name]) is not int:
            raise ValueError(f"{name} must be a whole number")
    for name in _TEXTS:
        if values[name] is not None and not _are([values[name]], str):
            raise ValueError(f"{name} must be a text or null")
    parts = values["reward_parts"]
    if not isinstance(parts, dict) or not _are([values["reward"], *parts.values()], float):
        raise ValueError("reward must be a number, and reward_parts an object of numbers")
    advantage = values["advantage"]
    if not _are([] if advantage is None else [advantage], float) or not isinstance(values["truncated"], bool):
        raise ValueError("advantage must be a number or null, and truncated true or false")
    values["kind"], values["why"] = LeaseKind(values["kind"]), Why(values["why"])
    values["versions"] = _spans(values["versions"], len(ids))
    return kind(**values)


def _spans(given: Any, num_tokens: int) -> list[VersionSpan]:
    spans, covered = [], 0
    for span in given if isinstance(given, list) else ():
        if not _are(span, int) or len(span) != 3 or span[0] != covered or span[1] <= covered:
            break
        spans.append(VersionSpan(*span))
        covered = span[1]
    if covered != num_tokens:
        raise ValueError(f"versions must cover the {num_tokens} tokens in order")
    return spans


def _are(values: Any, kind: type) -> bool:
    """Whether `values` is a list of texts (str), whole numbers (int), or finite numbers (float)."""
    if not isinstance(values, list):
        return False
    if kind is float:
        return all(type(v) in (int, float) and math.isfinite(v) for v in values)
    return all(type(v) is kind for v in values)


def _raw(values: np.ndarray | None, dtype: np.dtype[Any]) -> bytes | None:
    return None if values is None else np.ascontiguousarray(values, dtype=dtype).tobytes()


def _rounded(values: np.ndarray | Sequence[float]) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]
