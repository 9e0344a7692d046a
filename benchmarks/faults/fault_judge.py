"""Whether one cell of the fault matrix met its bar: figures in, complaints out. No processes, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from asyncrl.link.limits import DEAD_S
from benchmarks.faults.commits import Commits, why_unproven

SLACK_S = 2.0  # the bar: survivors commit within the deadline and this
MIN_STEPS = 2  # while the sick one is out for STEPS_S, and again once it is back
STEPS_S = DEAD_S + 5.0  # so long it is watched; leases of a silent generator have gone back by then

Event = dict[str, Any]  # {"event", "at", ...}, see `benchmarks.faults.faulty_generator`
Key = tuple[int, int]  # (ordinal, attempt) of a group


@dataclass(slots=True)
class Seen:
    """What was seen of one cell. Times are those of one monotonic clock."""

    fault: str
    phase: str
    sick: str
    timeout_s: float
    events: dict[str, list[Event]]  # of each generator that takes part
    version: int | None = None  # of the sync that the fault happened to; None = the fault did not happen
    fault_at: float = 0.0
    resumed_at: float | None = None  # SIGCONT, or the start of a replacement; None = it recovers by itself
    stood: bool = True  # one that was stopped stood until it was told to go on
    until: float = 0.0  # how long was looked; of later steps nothing is known
    learner_said: str = ""  # why the learner left the sick one out of that sync; empty = it did not
    steps: list[tuple[float, int]] = field(default_factory=list)  # when each version was first seen in the metrics
    trainer_starts: int = 1
    learner_running: bool = True

    @property
    def survivors(self) -> list[str]:
        return sorted(set(self.events) - {self.sick})

    @property
    def learner_had_decided(self) -> bool:
        """The fault happened to the commit, so the version was proven: the learner may send another one."""
        return self.phase == "COMMIT" and self.fault != "canary"

    @property
    def back_at(self) -> float | None:
        """When the sick one, or its replacement, first committed in a sync, or by a commit, from after the fault."""
        begun = False
        for event in self.events[self.sick]:
            if event["at"] > max(self.fault_at, self.resumed_at or 0.0):
                begun = begun or event["event"] in (("offer", "commit") if self.learner_had_decided else ("offer",))
                if begun and _is_commit(event):
                    return event["at"]
        return None

    @property
    def step_s(self) -> float:
        """What a step takes: the median between those before the fault."""
        before = [at for at, _ in self.steps if at <= self.fault_at]
        return median(later - earlier for earlier, later in pairwise(before)) if len(before) > 1 else 0.0

    @property
    def allowed_standstill_s(self) -> float:
        return self.timeout_s + SLACK_S + self.step_s

    def standstill_s(self, since: float) -> float:
        """The longest time without a step, from `since` to the last step that is waited for, or else to `until`."""
        back_at = self.back_at  # looked for once: runs of hours have many events
        later = [at for at, _ in self.steps if back_at is not None and at > back_at]
        end = later[MIN_STEPS - 1] if len(later) >= MIN_STEPS else self.until
        ends = [since, *(at for at, _ in self.steps if since < at < end), end]
        return max(after - before for before, after in pairwise(ends))

    def steps_between(self, since: float, until: float = float("inf")) -> int:
        return sum(since < at <= until for at, _ in self.steps)


def complaints(seen: Seen) -> list[str]:
    """What keeps a cell from having passed; empty = passed. What was trained on is judged at the end: `tainted`."""
    if seen.version is None:
        return ["the fault did not happen: the cell says nothing"]
    return [
        *_committed_on_the_sick_one(seen),
        *_late_survivors(seen),
        *_too_few_steps(seen),
        *_standstill(seen),
        *([] if seen.stood else [f"{seen.sick} was stopped and runs all the same"]),
        *([] if seen.back_at is not None else [f"{seen.sick} did not come back to a committed version"]),
        *([] if seen.learner_running else ["the learner ended"]),
        *([] if seen.trainer_starts == 1 else [f"the trainer was started {seen.trainer_starts} times"]),
    ]


def _is_commit(event: Event) -> bool:
    return event["event"] == "held" and event["version"] is not None


def _rest_of_that_sync(seen: Seen) -> Iterator[Event]:
    """The sick one's events after the fault, up to its next sync or its next life."""
    for event in seen.events[seen.sick]:
        if event["at"] > seen.fault_at:
            if event["event"] in ("offer", "started"):
                return
            yield event


def _committed_on_the_sick_one(seen: Seen) -> list[str]:
    found, told_again = [], False
    for event in _rest_of_that_sync(seen):
        if event["event"] == "commit":
            told_again = True
            if not seen.learner_had_decided:
                found.append(f"the learner told {seen.sick} to commit version {event['version']}")
        if _is_commit(event) and not (seen.learner_had_decided and (told_again or _late(seen, event))):
            found.append(f"{seen.sick} committed version {event['version']} in the sync with the fault")
    if not seen.learner_had_decided and not seen.learner_said:
        found.append(f"the learner did not notice that {seen.sick} failed in the sync to version {seen.version}")
    return found


def _late(seen: Seen, event: Event) -> bool:
    """The commit that it was stopped in the middle of takes effect when it goes on."""
    return seen.fault == "stop" and event["at"] > (seen.resumed_at or float("inf"))


def survivor_delays(seen: Seen) -> dict[str, float | None]:
    """Seconds from the fault to a commit of that version or a newer one, by survivor; 0 if it was first, None if never.

    A snapshot that was replaced between two attempts never comes: the newer version takes its place.
    """
    assert seen.version is not None
    delays: dict[str, float | None] = {}
    for name in seen.survivors:
        held = [e["at"] for e in seen.events[name] if _is_commit(e) and e["version"] >= seen.version]
        delays[name] = max(0.0, min(held) - seen.fault_at) if held else None
    return delays


def _late_survivors(seen: Seen) -> list[str]:
    limit_s = seen.timeout_s + SLACK_S
    return [
        f"{name} committed version {seen.version} "
        + ("never" if delay is None else f"{delay:.1f} s after the fault, allowed {limit_s:g}")
        for name, delay in survivor_delays(seen).items()
        if delay is None or delay > limit_s
    ]


def _too_few_steps(seen: Seen) -> Iterator[str]:
    """With survivors steps go on while one is out; and always once it is back."""
    back_at = float("inf") if seen.back_at is None else seen.back_at
    if seen.survivors:
        limit = min(seen.fault_at + STEPS_S, seen.resumed_at or float("inf"))
        end = min(limit, back_at)
        wanted = int(MIN_STEPS * (end - seen.fault_at) / (limit - seen.fault_at))  # back sooner: fewer
        count = seen.steps_between(seen.fault_at, end)
        if count < wanted:
            yield f"{count} steps in the {end - seen.fault_at:.1f} s in which {seen.sick} was out"
    if seen.back_at is not None and (count := seen.steps_between(back_at)) < MIN_STEPS:
        yield f"{count} steps after {seen.sick} was back"


def _standstill(seen: Seen) -> Iterator[str]:
    """Without survivors it begins when the sick one is back: until then there is nobody to make tokens."""
    since = seen.fault_at if seen.survivors else seen.back_at
    if since is not None and (stood_s := seen.standstill_s(since)) > seen.allowed_standstill_s:
        yield f"no step for {stood_s:.1f} s, allowed {seen.allowed_standstill_s:.1f}"


# -- what was trained on -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """A group that a step was taken with."""

    key: Key
    generator: str
    incarnation: int
    versions: frozenset[int]
    batch: int  # the version that the step began with


def tainted(
    trained: Iterable[TrainedGroup], commits: Commits, events: Mapping[str, list[Event]]
) -> dict[tuple[str, int], str]:
    """(generator, version) → why a token of that version should not have been trained on.

    Either the learner had not committed the version for that life of the generator, or the group was begun under
    weights that were called by its number and were found wrong: a later, good sync to the same number does not make
    those tokens good.
    """
    begun_too_early: dict[Key, list[int]] = {}
    for lines in events.values():
        for event in lines:
            if event["event"] == "tainted group" and event["key"][0] == "train":
                ordinal, attempt = event["key"][1:]
                begun_too_early[ordinal, attempt] = event["versions"]
    found = {}
    for group in trained:
        for version in group.versions:
            if why := why_unproven(commits, (group.generator, group.incarnation, version), group.batch):
                found[group.generator, version] = f"trained on group {group.key} with tokens of {why}"
        for version in begun_too_early.get(group.key, ()):
            found[group.generator, version] = (
                f"trained on group {group.key}, begun under weights of version {version} that were found wrong"
            )
    return found
