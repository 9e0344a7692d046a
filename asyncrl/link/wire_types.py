"""Types of message fields: words to choose from, and what the types of Python cannot say; see `link.field_checks`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeAlias

MAY_BE_NAN, JSON_LIKE = "may be NaN", "JSON-like"
KEY = "key"  # in `field(metadata={KEY: name})`: what the field is called on the wire, where that is not its name here

# A float field refuses NaN and infinity. This one takes them: what it carries is judged by its reader, by name.
FloatOrNaN = Annotated[float, MAY_BE_NAN]

# What a task gives its reward along with a prompt: it travels as it is, and nobody on the way looks into it.
PayloadValue: TypeAlias = Annotated[
    None | bool | int | float | str | bytes | list["PayloadValue"] | dict[str, "PayloadValue"], JSON_LIKE
]
Payload: TypeAlias = dict[str, PayloadValue]


class FailureReason(StrEnum):
    """Why a lease ended without a group. A reason this version does not know counts as ENGINE: the lease failed."""

    RETURNED = "returned"  # handed back: the generator stops, or was told to abandon it
    DEADLINE = "deadline"
    REWARD_ERROR = "reward_error"
    REWARD_TIMEOUT = "reward_timeout"
    ENGINE = "engine"
    TAINTED = "tainted"  # the weights it was sampled under were never proven
    NOT_PINNED = "not_pinned"  # an evaluation that was sampled under another version than the leased one

    @classmethod
    def _missing_(cls, value: object) -> FailureReason:
        return cls.ENGINE


class SyncPhase(StrEnum):
    """The phases of a weight sync that a generator answers."""

    STAGE = "stage"
    SWAP = "swap"


class RefusalCode(StrEnum):
    """Why a generator is not admitted. All are final but RUN_EPOCH."""

    PROTOCOL = "protocol"
    MODEL = "model"
    TOKENIZER = "tokenizer"
    TASK = "task"
    RUN = "run"  # the two ends differ in run.name
    CONFIG = "config"  # they differ in what decides prompts or rewards, or in transport.max_frame_bytes
    FENCED = "fenced"  # another process has its generator.id
    TAINTED = "tainted"  # its weights could not be proven too often
    RUN_EPOCH = "run_epoch"  # this learner was replaced and has not noticed: its successor may take its place


class NackCode(StrEnum):
    """Why a result will never be accepted."""

    INVALID = "invalid"
    UNKNOWN_LEASE = "unknown_lease"
    HELLO = "hello"  # it is no result: the peer is not known
