"""What goes through the pipes between a daemon and the helper process that runs a task's code.

    daemon -> helper   first   HelperSetup    which task, and how prompts are made of its examples
                       then    PromptsWanted  ordinals
    helper -> daemon   first   HelperStage    what it is at, each time before foreign code is called
                               HeldOutMade    one per held-out example
                               HelperStarted  ready, or why not
                       then    PromptMade     one per ordinal, in the order in which they were asked for

The body of a frame (`host.pipes`) is msgpack: the name of the message's class and its fields. What comes from the
helper is not trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import msgpack
import numpy as np

from asyncrl.errors import ProtocolError
from asyncrl.tasks.prompts import LeftOut, Prompt
from asyncrl.types import TOKEN_DTYPE

_M = TypeVar("_M")

FRAME_SLACK_BYTES = 2**20  # of a frame, beside the payload: token ids, text, what msgpack adds


@dataclass(frozen=True, slots=True)
class HelperSetup:
    """The task, and how prompts are made of its examples.

    model_path: the folder whose tokenizer is used; empty where only the task itself is looked at. num_rows: of the
    model's embedding, None where that is not known. num_evals: held-out examples to make, 0 for none. with_text: each
    prompt's text is sent too. is_restart: all that is to be said once was said by the helper before.
    """

    path: str
    args: Mapping[str, Any]
    model_path: str
    num_rows: int | None
    seed: int
    max_prompt_tokens: int
    max_payload_bytes: int
    num_evals: int = 0
    with_text: bool = False
    is_restart: bool = False


@dataclass(frozen=True, slots=True)
class PromptsWanted:
    """Ordinals of training prompts to make, in this order."""

    ordinals: list[int]


@dataclass(frozen=True, slots=True)
class HelperStage:
    """What the helper does next: foreign code, which may never return from it."""

    what: str


@dataclass(frozen=True, slots=True)
class HelperStarted:
    """The helper is ready, or `error` says what cannot be made."""

    error: str = ""
    is_model_error: bool = False  # else it is the task's
    train_size: int | None = None
    part_names: list[str] | None = None  # of the reward, where the task says
    left_out: list[str] = field(default_factory=list)  # records that the task left out of its data, with the reason


@dataclass(frozen=True, slots=True)
class PromptMade:
    """One training prompt; or the reason why there is none. `token_ids` are int32, little-endian."""

    ordinal: int
    index: int
    token_ids: bytes = b""
    payload: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    user_text: str = ""
    reason: str = ""
    too_long: bool = False
    is_fatal: bool = False  # no prompt can be made of any example

    def made(self) -> Prompt | LeftOut:
        """What it says."""
        if self.reason:
            return LeftOut(self.index, self.reason, self.too_long)
        return Prompt(np.frombuffer(self.token_ids, TOKEN_DTYPE), self.payload, self.user_text)


@dataclass(frozen=True, slots=True)
class HeldOutMade(PromptMade):
    """As `PromptMade`, of a held-out example; its ordinal is its place."""


HelperMessage = HelperStage | HelperStarted | PromptMade
_FROM_HELPER: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (HelperStage, HelperStarted, PromptMade, HeldOutMade)
}


def encode(message: HelperMessage | HelperSetup | PromptsWanted) -> bytes:
    """The body of a message's frame."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    body: bytes = msgpack.packb([type(message).__name__, values])
    return body


def decode_setup(body: bytes) -> HelperSetup:
    """The daemon's first message, in the helper."""
    return HelperSetup(**msgpack.unpackb(body)[1])


def decode_wanted(body: bytes) -> PromptsWanted:
    """The daemon's later messages, in the helper."""
    return PromptsWanted(**msgpack.unpackb(body)[1])


def decode_from_helper(body: bytes) -> HelperMessage:
    """A message of the helper. Raises ProtocolError."""
    try:
        match msgpack.unpackb(body):
            case [str() as name, dict() as values] if name in _FROM_HELPER:
                message: HelperMessage = _FROM_HELPER[name](**values)
                _check_types(message)
                return message
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"a message in the task's pipe cannot be read: {error}") from None
    raise ProtocolError("the task's pipe carries something that is no message; does the task write to it?")


def _check_types(message: HelperMessage) -> None:
    """Raises TypeError for a field whose type another process could only have meant to be wrong."""
    for item in fields(message):
        value, expected = getattr(message, item.name), _EXPECTED[item.name]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise TypeError(f"{item.name} is a {type(value).__name__}")


_EXPECTED: dict[str, tuple[type, ...]] = {
    "what": (str,),
    "error": (str,),
    "is_model_error": (bool,),
    "train_size": (int, type(None)),
    "part_names": (list, type(None)),
    "left_out": (list,),
    "ordinal": (int,),
    "index": (int,),
    "token_ids": (bytes,),
    "payload": (dict,),
    "text": (str,),
    "user_text": (str,),
    "reason": (str,),
    "too_long": (bool,),
    "is_fatal": (bool,),
}
