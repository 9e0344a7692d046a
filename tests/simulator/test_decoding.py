"""The simulated engine against one that makes every decode step by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from asyncrl.replay.lease_records import LeaseRecord
from asyncrl.simulator.decoding import SimulatedEngine, SimulatedGroup
from asyncrl.types import LeaseKey, LeaseKind

DECODE_S, SEQUENCE_S, PROMPT_S = 0.5, 0.125, 0.25  # exact in binary: both sides add up the same numbers


def group_of(ordinal: int, sequences: int) -> SimulatedGroup:
    lease = LeaseRecord(LeaseKey(LeaseKind.TRAIN, ordinal, 0), "0", 0, 0.0, 1e9)
    return SimulatedGroup(lease, sequences)


@dataclass
class SlowSequence:
    group: int
    left: int
    by_version: dict[int, int] = field(default_factory=dict)
    is_new: bool = True


class SlowEngine:
    """Token by token: each decode step takes its time and gives every running sequence one token."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.running: list[SlowSequence] = []
        self.waiting: list[SlowSequence] = []
        self.ended: list[tuple[float, SlowSequence]] = []

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.max_sequences:
            self.running.append(self.waiting.pop(0))

    def step(self, now: float, version: int) -> float:
        """One decode step; returns when it ended."""
        now += DECODE_S + SEQUENCE_S * len(self.running)
        now += PROMPT_S * sum(sequence.is_new for sequence in self.running)
        for sequence in self.running:
            sequence.is_new = False
            sequence.left -= 1
            sequence.by_version[version] = sequence.by_version.get(version, 0) + 1
        self.ended += [(now, sequence) for sequence in self.running if sequence.left == 0]
        self.running = [sequence for sequence in self.running if sequence.left]
        self.fill()
        return now


@pytest.mark.parametrize("seed", range(20))
def test_ends_and_versions_are_those_of_an_engine_that_makes_every_step(seed):
    rng = random.Random(seed)
    max_sequences, group_size = rng.randint(1, 6), rng.randint(1, 4)
    lengths = [[rng.randint(1, 12) for _ in range(group_size)] for _ in range(rng.randint(1, 8))]
    swap_after = sorted(rng.sample(range(1, 30), 3))  # decode steps; between two of them, as in an engine

    slow = SlowEngine(max_sequences)
    slow.waiting = [SlowSequence(place, tokens) for place, group in enumerate(lengths) for tokens in group]
    slow.fill()
    now, steps, version, swaps = 0.0, 0, 0, []
    while slow.running:
        if steps in swap_after:
            version += 1
            swaps.append((now, version))
            now += 7.0  # the pause
        now = slow.step(now, version)
        steps += 1

    engine = SimulatedEngine(max_sequences, DECODE_S, SEQUENCE_S, PROMPT_S)
    groups = [group_of(place, group_size) for place in range(len(lengths))]
    for group, tokens in zip(groups, lengths, strict=True):
        engine.add(group, tokens, 0.0)
    ends: dict[int, float] = {}
    while engine.sequences_left:
        end = engine.next_end()
        assert end is not None
        if swaps and swaps[0][0] < end - 1e-9:
            at, swapped_to = swaps.pop(0)
            engine.swap(swapped_to, at)
            assert engine.next_end() is None and not engine.works
            engine.resume(at + 7.0)
            continue
        for group in engine.take_ended(end):
            ends[group.lease.key.ordinal] = end

    for place, group in enumerate(groups):
        own = [(at, sequence) for at, sequence in slow.ended if sequence.group == place]
        assert ends[place] == pytest.approx(max(at for at, _ in own), rel=1e-9)
        expected: dict[int, int] = {}
        for _, sequence in own:
            for of_version, tokens in sequence.by_version.items():
                expected[of_version] = expected.get(of_version, 0) + tokens
        assert group.tokens_by_version == expected
        assert sorted(group.lengths) == sorted(lengths[place])


def test_half_the_pace_takes_twice_the_time_and_no_token_is_lost():
    engine = SimulatedEngine(4, DECODE_S, SEQUENCE_S)
    group = group_of(0, 1)
    engine.add(group, [8], 0.0)
    whole = engine.next_end()
    assert whole == pytest.approx(8 * (DECODE_S + SEQUENCE_S))
    engine.set_pace(0.5, whole / 2)
    assert engine.next_end() == pytest.approx(whole / 2 + whole)
    assert engine.take_ended(engine.next_end()) == [group] and group.tokens_by_version == {0: 8}
    assert engine.busy_s == pytest.approx(1.5 * whole)


def test_prompts_take_longer_on_slower_cores_and_hold_up_all_sequences():
    engine = SimulatedEngine(4, DECODE_S, 0.0, PROMPT_S)
    engine.add(group_of(0, 1), [8], 0.0)
    engine.set_pace(0.5, 0.0)
    assert engine.next_end() == pytest.approx(2 * (PROMPT_S + 8 * DECODE_S))
    at = 2 * (PROMPT_S + 4 * DECODE_S)
    engine.add(group_of(1, 2), [4, 4], at)
    engine.advance(at + PROMPT_S)  # a quarter of both prompts
    assert engine.next_end() == pytest.approx(at + 2 * (2 * PROMPT_S + 4 * DECODE_S))
    assert len(engine.take_ended(engine.next_end())) == 2


def test_an_idle_engine_begins_with_the_version_that_its_cell_has():
    engine = SimulatedEngine(4, DECODE_S, SEQUENCE_S)
    engine.begin_at(5, 1.0)
    group = group_of(0, 1)
    engine.add(group, [3], 1.0)
    engine.begin_at(6, 1.5)  # it is not idle: it learns of a version by its swap
    engine.take_ended(engine.next_end())
    assert group.tokens_by_version == {5: 3}
