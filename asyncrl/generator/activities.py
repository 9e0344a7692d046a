"""What a generator does at a moment: one activity, the first of `GeneratorActivity` that holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncrl.metrics.ledger import GeneratorActivity

BUSY = (GeneratorActivity.SWAP, GeneratorActivity.DECODE, GeneratorActivity.EVAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What decides it.

    ready        the engine is up
    swapping     it stands still for new weights
    training     a lease to train on has sequences that have not ended
    evaluating   so does one of an evaluation
    scoring      a lease has all its sequences and waits for rewards
    in_hand      there are leases
    held         the engine holds a version that is proven
    blocked      results may not leave, or no more may be made
    stopping     no lease is asked for any more
    """

    ready: bool
    swapping: bool
    training: bool
    evaluating: bool
    scoring: bool
    in_hand: bool
    held: bool
    blocked: bool
    stopping: bool


def activity_of(now: Situation) -> GeneratorActivity:
    """The activity in a situation."""
    if not now.ready:
        return GeneratorActivity.START
    if now.swapping:
        return GeneratorActivity.SWAP
    if now.training:
        return GeneratorActivity.DECODE
    if now.evaluating:
        return GeneratorActivity.EVAL
    if now.scoring:
        return GeneratorActivity.REWARDS
    if now.in_hand or not (now.held or now.stopping):
        return GeneratorActivity.WEIGHTS
    if now.blocked:
        return GeneratorActivity.ROOM
    return GeneratorActivity.OTHER if now.stopping else GeneratorActivity.LEASES


def busy_s(seconds: Mapping[str, float]) -> float:
    """Seconds with at least one sequence in the engine, or in a swap."""
    return sum(seconds.get(activity, 0.0) for activity in BUSY)


def idle_s(seconds: Mapping[str, float]) -> float:
    """Seconds of an engine that is up, without a sequence in it."""
    others = (*BUSY, GeneratorActivity.START)
    return sum(spent for activity, spent in seconds.items() if activity not in others)
