"""One simulated engine: continuous batching, in which every running sequence gets one token in each decode step."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from asyncrl.replay.lease_records import LeaseRecord


@dataclass(slots=True)
class SimulatedGroup:
    """A lease at work: how many of its sequences are left, and how many tokens were sampled under which version."""

    lease: LeaseRecord
    left: int
    lengths: list[int] = field(default_factory=list)
    tokens_by_version: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _RunningSequence:
    began: float  # on the clock of tokens
    tokens: int
    group: SimulatedGroup


class SimulatedEngine:
    """Sequences share the engine, so that all of them advance at one pace: one clock of tokens serves all.

    The clock counts the decode steps made. A sequence of n tokens that begins when it shows c ends when it shows c + n,
    whatever the pace in between: only the pace changes with the number of running sequences and with pauses.
    While prompts of new sequences are computed it stands still.
    `stamp` changes whenever an end that was foretold (`next_end`) may be wrong.
    """

    def __init__(
        self, max_sequences: int, decode_s: float, decode_sequence_s: float, new_sequence_s: float = 0.0
    ) -> None:
        self._max_sequences = max_sequences
        self._decode_s = decode_s
        self._decode_sequence_s = decode_sequence_s
        self._new_sequence_s = new_sequence_s
        self._clock = 0.0  # decode steps
        self._prompts_s = 0.0  # of prompts that are still to be computed, on cores of its own; the clock waits for them
        self._at = 0.0  # seconds
        self._pace = 1.0
        self._paused = False
        self._running: list[tuple[float, int, _RunningSequence]] = []  # by the clock at their end
        self._waiting: deque[tuple[SimulatedGroup, int]] = deque()
        self._versions: list[tuple[float, int]] = [(0.0, 0)]  # the clock at each swap, and the version since
        self._order = count()
        self.busy_s = 0.0
        self.stamp = 0

    @property
    def works(self) -> bool:
        """Whether it samples: sequences run, and no swap holds them."""
        return bool(self._running) and not self._paused

    @property
    def version(self) -> int:
        """The version that it samples from."""
        return self._versions[-1][1]

    @property
    def sequences_left(self) -> int:
        """Sequences that run or wait."""
        return len(self._running) + len(self._waiting)

    def add(self, group: SimulatedGroup, lengths: list[int], now: float) -> None:
        """Takes in a group whose completions will have these lengths."""
        self.advance(now)
        self._waiting.extend((group, tokens) for tokens in lengths)
        self._fill()

    def swap(self, version: int, now: float) -> None:
        """From now on it samples from `version`, and not before `resume`."""
        self.advance(now)
        self._paused = True
        self._versions.append((self._clock, version))
        self.stamp += 1

    def resume(self, now: float) -> None:
        """Ends the pause of a swap."""
        self.advance(now)
        self._paused = False
        self.stamp += 1

    def begin_at(self, version: int, now: float) -> None:
        """An engine without sequences took this version at some time before now."""
        if not self._running and version != self.version:
            self.advance(now)
            self._versions = [(self._clock, version)]

    def set_pace(self, pace: float, now: float) -> None:
        """How fast the cores are that it has, 1 where it has them for itself."""
        if pace != self._pace:
            self.advance(now)
            self._pace = pace
            self.stamp += 1

    def next_end(self) -> float | None:
        """When the next sequence ends, in seconds, if nothing changes; None when none does."""
        if not self.works:
            return None
        return self._at + self._prompts_s / self._pace + (self._running[0][0] - self._clock) / self._steps_per_s()

    def take_ended(self, now: float) -> list[SimulatedGroup]:
        """The groups that lost their last sequence by now; slots that came free are taken by waiting sequences."""
        self.advance(now)
        complete = []
        # The clock is a sum of shares: what should be there may lack the last bit.
        while self._running and self._running[0][0] <= self._clock + 1e-6:
            _, _, ended = heapq.heappop(self._running)
            self._count_versions(ended)
            ended.group.left -= 1
            ended.group.lengths.append(ended.tokens)
            if ended.group.left == 0:
                complete.append(ended.group)
        self._fill()
        return complete

    def advance(self, now: float) -> None:
        """Brings clock and busy time up to now."""
        if now > self._at:
            if self.works:
                prompts_s = min(self._prompts_s, (now - self._at) * self._pace)
                self._prompts_s -= prompts_s
                self._clock += max(0.0, now - self._at - prompts_s / self._pace) * self._steps_per_s()
            if self._running:
                self.busy_s += now - self._at
            self._at = now

    def _steps_per_s(self) -> float:
        return self._pace / (self._decode_s + self._decode_sequence_s * len(self._running))

    def _fill(self) -> None:
        self.stamp += 1
        while self._waiting and len(self._running) < self._max_sequences:
            group, tokens = self._waiting.popleft()
            self._prompts_s += self._new_sequence_s
            running = _RunningSequence(self._clock, tokens, group)
            heapq.heappush(self._running, (self._clock + tokens, next(self._order), running))
        if not self._running and len(self._versions) > 1:
            del self._versions[:-1]  # nobody looks back any more

    def _count_versions(self, ended: _RunningSequence) -> None:
        """Attributes the tokens of a sequence to the versions of the swaps between its begin and its end."""
        end, counted = ended.began + ended.tokens, 0
        tokens = ended.group.tokens_by_version
        for clock, version in reversed(self._versions):
            since = min(ended.tokens, round(end - max(clock, ended.began)))  # tokens sampled since that swap
            if since > counted:
                tokens[version] = tokens.get(version, 0) + since - counted
                counted = since
            if clock <= ended.began:
                return
