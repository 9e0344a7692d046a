"""Types of message fields: words to choose from, and what the types of Python cannot say; see `link.field_checks`.

Every number, text, list and map of a message has one of these types or a rule of `link.schema.field_rules` of its own;
`tests/faults/test_wire.py` looks for those that have none.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, TypeAlias

from asyncrl.link.schema.field_rules import AtMost, Fields, Line, Printed, Within
from asyncrl.types import LeaseKey, Setting

MAY_BE_NAN, JSON_LIKE = "may be NaN", "JSON-like"
KEY = "key"  # in `field(metadata={KEY: name})`: what the field is called on the wire, where that is not its name here

# A float field refuses NaN and infinity. This one takes them: what it carries is judged by its reader, by name.
FloatOrNaN = Annotated[float, MAY_BE_NAN]

MAX_WORKERS = 1024  # tensor-parallel ranks of one generator
MAX_ROLLOUTS = 2**12  # of one group
MAX_LEASES = 2**13  # that one generator has in hand
SPAN_BYTES = 24  # three int64
MAX_SPANS = 1024  # of one rollout: weights were swapped that often while it was sampled, less one

Count = Annotated[int, Within(0, 2**53 - 1)]  # of things, bytes, tokens: a float holds it without loss
Number = Annotated[int, Within(0, 2**62 - 1)]  # a place in an order: version, ordinal, attempt, seq, epoch
Size = Annotated[int, Within(0, 2**31 - 1)]  # of something that is held whole: a group, a completion
Rank = Annotated[int, Within(0, 2**20)]
Port = Annotated[int, Within(0, 65_535)]
Digest = Annotated[int, Within(-(2**63), 2**64 - 1)]  # any 64 bits
Finite = Annotated[float, Within(-sys.float_info.max, sys.float_info.max)]
Seconds = Annotated[float, Within(0.0, 1e12)]
BeatInterval = Annotated[float, Within(0.1, 60.0)]  # seconds
Milliseconds = Annotated[float, Within(0.0, 1e15)]
Name = Annotated[str, Line(1, 128, spaces=False)]  # of a generator
Tag = Annotated[str, Line(0, 256, spaces=False)]  # a fingerprint, a backend
Label = Annotated[str, Line(0, 1024)]  # of a tensor, a figure, a host
Text = Annotated[str, AtMost(2**24)]  # of a prompt: it goes to parts of the reward alone
Reason = Annotated[str, Printed(4096)]  # for people
Tokens = Annotated[bytes, AtMost(2**28)]  # int32 or float32 per token
Ticket = Annotated[bytes, AtMost(64)]  # proves who was granted a lease, see LeaseGrant
Canary = Annotated[list[Tokens], AtMost(4096)]  # one array for each canary sequence
WorkerDigests = Annotated[list[Annotated[list[Digest], AtMost(2**20)]], AtMost(MAX_WORKERS)]  # one for each bucket
Figures = Annotated[dict[Label, FloatOrNaN], AtMost(4096)]
Timings = Annotated[dict[Label, Milliseconds], AtMost(256)]
Times = Annotated[dict[Label, Seconds], AtMost(64)]  # by activity, see metrics.ledger
_SETTING = Fields((("name", Label), ("value", Annotated[str, AtMost(65_536)])))
Settings = Annotated[list[Annotated[Setting, _SETTING]], AtMost(1024)]
LeaseName = Annotated[LeaseKey, Fields((("ordinal", Number), ("attempt", Number)))]

# What a task gives its reward along with a prompt: it travels as it is, and nobody on the way looks into it.
PayloadValue: TypeAlias = Annotated[
    None | bool | int | float | str | bytes | list["PayloadValue"] | dict[str, "PayloadValue"], JSON_LIKE
]
Payload: TypeAlias = Annotated[dict[Annotated[str, AtMost(65_536)], PayloadValue], AtMost(65_536)]


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
