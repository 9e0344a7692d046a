"""What goes through the pipes between the reward pool and one of its workers, and how it is written.

    pool -> worker   first   WorkerSetup    what to make
                     then    RewardJob      one at a time
    worker -> pool   first   WorkerStarted  ready, or why not
                     then    Scored         one per completion of the job, in order, each as soon as it is known

The body of a frame (`host.pipes`) is a msgpack map of the message's fields. What comes from a worker is not trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack

from asyncrl.errors import ProtocolError
from asyncrl.rewards.base import Sample
from asyncrl.types import reward_parts_problem

MAX_FRAME_BYTES = 1024 * 1024  # of what a worker sends
FAILURES = ("reward_error", "reward_timeout")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """The task, the further parts of the reward, what each counts, and how much memory the worker may fill."""

    path: str
    args: Mapping[str, Any]
    parts: Mapping[str, Any]
    weights: Mapping[str, float]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class RewardJob:
    """Completions of one prompt. num_tokens of each, None where it is not known."""

    completions: Sequence[str]
    num_tokens: Sequence[int | None]
    prompt: str
    payload: dict[str, Any]
    rendered_prompt: str

    def without_first(self, count: int) -> RewardJob:
        """The same job without its first `count` completions."""
        return replace(self, completions=self.completions[count:], num_tokens=self.num_tokens[count:])

    def samples(self) -> list[Sample]:
        """The completions as parts of the reward see them."""
        return [
            Sample(completion, self.payload, self.prompt, num_tokens, self.rendered_prompt)
            for completion, num_tokens in zip(self.completions, self.num_tokens, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """The worker is ready, or `error` says what cannot be made."""

    error: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """The values of the reward's parts for one completion, or why there are none."""

    parts: dict[str, float] | None
    reason: str = ""  # one of FAILURES where there are none
    detail: str = ""
    server_down: bool = False  # the server of a part did not answer at all
    worker_full: bool = False  # the worker has no memory, file descriptors or threads left: a new one may have


PipeMessage = WorkerSetup | RewardJob | WorkerStarted | Scored


def encode(message: PipeMessage) -> bytes:
    """The body of a message's frame."""
    body: bytes = msgpack.packb({field.name: getattr(message, field.name) for field in fields(message)})
    return body


def decode_setup(body: bytes) -> WorkerSetup:
    """The pool's first message, in the worker."""
    return WorkerSetup(**msgpack.unpackb(body))


def decode_job(body: bytes) -> RewardJob:
    """The pool's later messages, in the worker."""
    return RewardJob(**msgpack.unpackb(body))


def decode_started(body: bytes) -> WorkerStarted:
    """A worker's first message. Raises ProtocolError."""
    match _unpacked(body):
        case {"error": str() as error, **others} if not others:
            return WorkerStarted(error)
    raise _not_a_message()


def decode_scored(body: bytes) -> Scored:
    """A worker's later messages. Raises ProtocolError."""
    match _unpacked(body):
        case {"parts": dict() as parts, "reason": "", "detail": "", "server_down": False, "worker_full": False}:
            if parts and _are_named_numbers(parts) and not reward_parts_problem(parts):
                return Scored(parts)
        case {
            "parts": None,
            "reason": str() as reason,
            "detail": str() as detail,
            "server_down": bool() as down,
            "worker_full": bool() as full,
        }:
            if reason in FAILURES:
                return Scored(None, reason, detail, down, full)
    raise _not_a_message()


def _are_named_numbers(parts: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, float) for name, value in parts.items())


def _unpacked(body: bytes) -> object:
    try:
        return msgpack.unpackb(body)
    except ValueError as error:
        raise ProtocolError(f"a result in the reward worker's pipe cannot be read: {error}") from None


def _not_a_message() -> ProtocolError:
    return ProtocolError(
        "the reward worker's pipe carries something that is not a result; does the reward write to it?"
    )
