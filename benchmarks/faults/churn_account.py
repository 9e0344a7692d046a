"""What a disturbed run is judged by: hangs, throughput, reward, journal. No processes here, only their traces."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from asyncrl.link.codec import decode_body
from asyncrl.link.messages import GroupResult
from asyncrl.link.rollouts import result_to_group
from asyncrl.storage.journal_reader import JournalReader
from asyncrl.storage.records import GroupFiltered, PromptGivenUp, StepTaken, StoredGroup
from benchmarks.faults.commits import Commits, why_unproven

STARTING, READY, STOPPED, LEAVING, OUT, DOWN = "starting", "ready", "stopped", "leaving", "out", "down"
WINDOWS = 40  # of a reward curve
MIN_WINDOW = 4  # steps
MAX_RMS = 2.0  # standard deviations, over all windows
MAX_END = 3.0  # and in the mean of the last quarter

Span = tuple[float, float]
Crowd = tuple[int, bool]


# -- hangs -------------------------------------------------------------------------------------------------------------


def ready_spans(changes: Iterable[tuple[float, str, str]], start: float, end: float) -> list[Span]:
    """When one generator or more was READY. `changes` are (time, generator, its state from then on), in order."""
    states: dict[str, str] = {}
    spans: list[Span] = []
    since: float | None = None
    for time, name, state in changes:
        states[name] = state
        ready = READY in states.values()
        if ready and since is None:
            since = time
        elif not ready and since is not None:
            spans.append((since, time))
            since = None
    if since is not None:
        spans.append((since, end))
    clipped = [(max(start, first), min(end, last)) for first, last in spans]
    return [(first, last) for first, last in clipped if first < last]


def gaps(spans: Iterable[Span], moments: Sequence[float]) -> list[Span]:
    """(begin, seconds) of each stretch within a span that none of `moments`, in order, falls into; longest first."""
    found = []
    for begin, end in spans:
        inner = moments[bisect.bisect_right(moments, begin) : bisect.bisect_left(moments, end)]
        cuts = [begin, *inner, end]
        found += [(first, last - first) for first, last in zip(cuts, cuts[1:], strict=False)]
    return sorted(found, key=lambda gap: -gap[1])


# -- throughput --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Offer:
    """What generators could work with, second by second: running totals by how many of them were ready.

    The key is (generators ready, whether another one was starting): a start takes the CPU's caches as well as its time.

    Offered seconds are wall-clock seconds of a ready generator less those in which its engine waited for a CPU that
    another process had. A generator that drains, or whose weights the learner does not count at present, offers no
    more than the CPU time that it took: it gets no leases, yet what it still delivers counts.
    """

    wall_s: dict[Crowd, float] = field(default_factory=dict)  # of the run, not per generator
    offered_s: dict[Crowd, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    kept_waiting_s: float = 0.0

    def add(self, seconds: float, parts: Sequence[tuple[str, float, float]]) -> None:
        """`seconds` passed; each part is a generator's state, its engine's CPU time, and its wait for a CPU."""
        offered, states = 0.0, [state for state, _, _ in parts]
        crowd = states.count(READY), STARTING in states
        for state, cpu_s, waited_s in parts:
            if state == READY:
                offered += max(0.0, seconds - waited_s)
                self.kept_waiting_s += min(seconds, waited_s)
            elif state in (LEAVING, OUT):
                offered += cpu_s
            self.cpu_s += cpu_s
        self.wall_s[crowd] = self.wall_s.get(crowd, 0.0) + seconds
        self.offered_s[crowd] = self.offered_s.get(crowd, 0.0) + offered


def tokens_between(steps: Iterable[Mapping[str, Any]], start: float, end: float) -> float:
    """Completion tokens that were acknowledged and not dropped afterwards, spread evenly over each step's interval.

    Each step has `t` (when it ended), `interval_s`, and what metrics.jsonl says of it.
    """
    total = 0.0
    for step in steps:
        rollouts = step["rollouts_acked"] - step["rollouts_dropped"]
        seconds = max(step["interval_s"], 1e-9)
        inside = max(0.0, min(end, step["t"]) - max(start, step["t"] - seconds))
        total += rollouts * (step["completion_tokens_mean"] or 0.0) * inside / seconds
    return total


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per offered second of undisturbed generators."""

    one: float
    one_in_a_crowd: float  # while another one starts
    two_in_a_crowd: float
    three: float

    def of(self, crowd: Crowd) -> float:
        """While others start, as measured with one or two; otherwise by a straight line from one to three."""
        num_ready, starting = crowd
        if starting:
            return self.two_in_a_crowd if num_ready > 1 else self.one_in_a_crowd
        return self.one + (self.three - self.one) * (min(max(num_ready, 1), 3) - 1) / 2

    def allowed_tokens(self, offer: Offer) -> float:
        """What the offered seconds would have made."""
        return sum(seconds * self.of(crowd) for crowd, seconds in offer.offered_s.items())


# -- reward ------------------------------------------------------------------------------------------------------------


def windows(rewards: Sequence[float], num_steps: int) -> list[float]:
    """Means of stretches of equal length over the first `num_steps`; what is left over goes to nobody."""
    size = max(MIN_WINDOW, num_steps // WINDOWS)
    return [fmean(rewards[first : first + size]) for first in range(0, num_steps - size + 1, size)]


def compare_rewards(disturbed: Sequence[float], calm: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """How far the disturbed curve is from the calm ones, in standard deviations of one window of one run.

    With two calm runs or more the deviation is the one between them, window by window; with one, what each window
    differs from the line between its neighbours by: a steady rise is no noise, where it bends it still counts as some.
    None when there is too little to compare.
    """
    num_steps = min(map(len, [disturbed, *calm])) if calm else 0
    ours, theirs = windows(disturbed, num_steps), [windows(curve, num_steps) for curve in calm]
    if len(ours) < 4:
        return None
    means = [fmean(values) for values in zip(*theirs, strict=True)]
    if len(calm) > 1:
        squares = [
            sum((value - mean) ** 2 for value in values) / (len(calm) - 1)
            for values, mean in zip(zip(*theirs, strict=True), means, strict=True)
        ]
    else:
        threes = zip(means, means[1:], means[2:], strict=False)
        squares = [(before - 2 * here + after) ** 2 / 6 for before, here, after in threes]
    std = math.sqrt(fmean(squares))
    spread = max(std * math.sqrt(1 + 1 / len(calm)), 1e-9)  # of the difference to the calm runs' mean
    differences = [mine - mean for mine, mean in zip(ours, means, strict=True)]
    last = differences[-max(1, len(differences) // 4) :]
    result = {
        "steps": num_steps,
        "window_steps": num_steps // len(ours),
        "std": std,
        "rms": math.sqrt(fmean([d * d for d in differences])) / spread,
        "end": abs(fmean(last)) / spread,
        "end_difference": fmean(last),
        "disturbed": ours,
        "calm": theirs,
    }
    return result | {"passed": result["rms"] <= MAX_RMS and result["end"] <= MAX_END}


# -- journal -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class JournalCheck:
    """What the journal says of every step. `faults` are sentences; none, and all is well."""

    num_steps: int = 0
    num_groups_stored: int = 0
    num_groups_trained: int = 0
    num_tokens_trained: int = 0
    max_age: int = 0
    by_generator: dict[str, int] = field(default_factory=dict)  # groups trained, by generator/incarnation
    faults: list[str] = field(default_factory=list)


def check_journal(folder: Path, *, groups_per_step: int, max_age: int, commits: Commits | None = None) -> JournalCheck:
    """Every step by +1 with all its groups stored, no prompt trained twice or skipped, every token's version known.

    commits: what the learner has committed, and when; each trained token must be of such a version. None leaves that
    out.
    """
    check = JournalCheck()
    numbers = sorted(int(path.stem) for path in folder.glob("*.segment"))
    stored: dict[tuple[int, int], StoredGroup] = {}
    trained: set[int] = set()
    left_out: set[int] = set()
    for entry in JournalReader(folder, numbers):
        record = entry.record
        if isinstance(record, StoredGroup):
            check.num_groups_stored += 1
            stored[record.ordinal, record.attempt] = record
        elif isinstance(record, PromptGivenUp | GroupFiltered):
            left_out.add(record.ordinal)
        elif isinstance(record, StepTaken):
            if record.version != check.num_steps:
                check.faults.append(f"after {check.num_steps} steps comes the batch of version {record.version}")
            if len(record.groups) != groups_per_step:
                check.faults.append(f"the batch of version {record.version} has {len(record.groups)} groups")
            check.num_steps += 1
            for key in record.groups:
                group = stored.pop(key, None)
                if group is None or key[0] in trained:
                    what = "is not in the journal" if key[0] not in trained else "was trained before"
                    check.faults.append(f"group {key} of the batch of version {record.version} {what}")
                    continue
                trained.add(key[0])
                _check_group(check, group, record.version, max_age, commits)
    # What was buffered, leased or waiting to be leased again at the end is no older than pacing lets it be.
    reach = 2 * (max_age + 1) * groups_per_step
    skipped = set(range(max(trained, default=0) - reach)) - trained - left_out
    if skipped:
        check.faults.append(f"{len(skipped)} prompts were never trained, {min(skipped)} first")
    return check


def _check_group(check: JournalCheck, group: StoredGroup, version: int, max_age: int, commits: Commits | None) -> None:
    name = f"group {group.ordinal}.{group.attempt} of {group.generator_id}/{group.incarnation}"
    check.num_groups_trained += 1
    check.num_tokens_trained += sum(group.num_tokens)
    who = f"{group.generator_id}/{group.incarnation}"
    check.by_generator[who] = check.by_generator.get(who, 0) + 1
    check.max_age = max(check.max_age, version - group.oldest_version)
    if not 0 <= group.issued_version <= group.oldest_version <= group.newest_version <= version:
        span = (group.issued_version, group.oldest_version, group.newest_version)
        check.faults.append(f"{name}: versions {span} are out of order at version {version}")
    if version - group.oldest_version > max_age:
        check.faults.append(f"{name}: age {version - group.oldest_version} at version {version}")
    versions: set[int] = set()
    for rollout in result_to_group(decode_body(GroupResult, group.body)).rollouts:
        stops = [0, *(span.stop for span in rollout.version_spans)]
        starts = [span.start for span in rollout.version_spans]
        if starts != stops[:-1] or stops[-1] != rollout.num_tokens:
            check.faults.append(f"{name}: spans {rollout.version_spans} do not cover {rollout.num_tokens} tokens")
        versions |= {span.version for span in rollout.version_spans}
    for of in sorted(versions) if commits is not None else ():
        if why := why_unproven(commits, (group.generator_id, group.incarnation, of), version):
            check.faults.append(f"{name}: tokens of {why}")
